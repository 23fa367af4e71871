"""States of averagers that were saved as they are, by torch.distributed.checkpoint's own `save`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from polyak.checkpoints._distributed import DistributedTensors
from polyak.checkpoints._loading import naming
from polyak.checkpoints._parts import Chunked


def find_state(folder: DistributedTensors, key: str | None) -> dict[str, Any] | None:
    """The state that `averager.state_dict()` gave, in a folder or under a key of it, if there is one.

    Its tensors are those of `DistributedTensors.unread`. Raises `ValueError` for a folder with
    several.
    """
    path = folder.path if key is None else folder.path / key
    roots = [root for root in _roots(folder) if key is None or root == (key,)]
    if len(roots) > 1:
        keys = [key for root in roots for key in root]
        raise ValueError(
            f"{path} has the states of several averagers, {', '.join(keys)}: give one, as "
            f"{path / keys[-1]}"
        )
    with naming(str(path), "a damaged state"):
        return _state(folder, roots[0]) if roots else None


def _roots(folder: DistributedTensors) -> list[tuple[str, ...]]:
    """Where states begin: at the top, or under a key."""
    paths = {tuple(map(str, path)) for path in folder.paths.values()}
    begins = {path[: path.index("averages")] for path in paths if "averages" in path}
    return sorted(root for root in begins if len(root) < 2 and (*root, "format") in paths)


def _state(folder: DistributedTensors, root: tuple[str, ...]) -> dict[str, Any]:
    """What lies under a root, as it was before it was flattened; empty mappings are not stored."""
    state: dict[str, Any] = {"copies": {}, "averages": {}}
    for name, path in folder.paths.items():
        keys = tuple(map(str, path))
        if keys[: len(root)] == root:
            place, (*outer, last) = state, keys[len(root) :]
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = folder.unread(name) if name in folder.forms else folder.objects[name]
    slots = [each.setdefault("slots", {}) for each in state["averages"].values()]
    for tensors in (state["copies"], *(held for each in slots for held in each.values())):
        if not all(isinstance(tensor, Tensor | Chunked) for tensor in tensors.values()):
            raise ValueError("it has something else among its tensors")
    return state
