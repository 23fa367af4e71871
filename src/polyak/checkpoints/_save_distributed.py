"""Save a whole training in one folder, from all ranks: model, optimizer and averages.

The folder is one of torch.distributed.checkpoint. An averager in it is stored as `polyak.save` stores
it, so that `load` and `read` take it too, in one process and without a process group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from polyak._checks import difference, report, require
from polyak._ranks.agreement import together
from polyak.averager import Averager
from polyak.checkpoints import _save as native
from polyak.checkpoints._dcp.folders import load_folder, save_folder
from polyak.checkpoints._dcp.tensors import DistributedTensors
from polyak.checkpoints._load import adopt, fitted, require_fit
from polyak.checkpoints._own_format import Stored, within

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def save_distributed(
    path: Path | str,
    state: Mapping[str, Any],
    *,
    group: ProcessGroup | None = None,
    overwrite: bool = False,
) -> None:
    """Write the state of a training, with its averagers, as a folder of torch.distributed.checkpoint.

    Collective: every rank of the group (by default all ranks) calls it at the same place. Each rank
    writes its parts into a hidden folder, which the first rank renames when all are done. A process that
    is killed at any moment leaves the last complete folder. An error on one rank is raised on all.

    Args:
        path: the folder, the same on all ranks.
        state: what `torch.distributed.checkpoint.save` takes: key -> a state dict, or an object
            with `state_dict()`; and key -> `Averager`. A tensor that several ranks have whole is saved from
            the lowest of them: under DistributedDataParallel the buffers of ranks may differ.
        group: the ranks that save; they must share a file system.
        overwrite: whether to replace a folder that exists.

    >>> import tempfile, torch
    >>> model = torch.nn.Linear(2, 1)
    >>> averager = Averager(model, "exponential(0.9)")
    >>> averager.update()
    >>> place = Path(tempfile.mkdtemp()) / "step-1"
    >>> save_distributed(place, {"model": model, "average": averager, "step": 1})
    >>> state = {"model": model, "average": Averager(model, "exponential(0.9)"), "step": 0}
    >>> load_distributed(place, state)
    >>> state["average"].count, state["step"]
    (1, 1)

    Raises `FileExistsError` if the path exists, unless `overwrite`; `FileNotFoundError` if a rank does
    not see the folder; `ValueError` if the ranks are at different updates, and for parts that
    torch.distributed.checkpoint would store at a wrong place; `RuntimeError` inside `applied()`, and if
    another rank failed; `OSError` if the folder cannot be written.
    """
    call = "save_distributed"
    content = content_of(call, state, group)
    save_folder(call, path, content, group=group, overwrite=overwrite)


def load_distributed(
    path: Path | str,
    state: MutableMapping[str, Any],
    *,
    group: ProcessGroup | None = None,
) -> None:
    """Load what `save_distributed` wrote into tensors and averagers, on any number of ranks.

    `state` is as for saving. For each of its keys the folder must have exactly the same names, shapes
    and dtypes. Other keys of the folder are not read. Averagers may be new. It is collective if there is
    a process group, and works in one process without one.

    Objects that are not tensors (an optimizer's settings) are read by torch.distributed.checkpoint, which
    unpickles them and runs the code in them: load only folders that you trust. The part of an averager
    runs nothing: `polyak.load(path / "average", averager)` and `checkpoints.read` read it from any
    folder.

    Raises `ValueError` on all ranks, with a list of what is missing, extra, or of another shape or dtype,
    and what `polyak.load` raises; then nothing has changed. Damage to the other tensors may be found
    when some of them are read already: then load another folder before you continue.
    """
    call, path = "load_distributed", Path(path)
    with together(call, group):
        folder = DistributedTensors(path)
        averagers, others = _parted(call, state)
        _require_fit(folder, others)
        saved = within(folder)
        _require_averagers(path, saved, averagers)
        states = {key: fitted(saved[key], each) for key, each in averagers.items()}
        for key, averager in averagers.items():
            require_fit(path / key, averager, states[key])
    # Only now, as everything fits: from here on tensors change.
    if others:
        load_folder(call, folder, others, group=group)
    with together(call, group):
        for key, averager in averagers.items():
            adopt(path / key, averager, states[key])
        for key, value in others.items():
            _restore_keys(value)
            _give(state, key, value)


def content_of(call: str, state: Mapping[str, Any], group: ProcessGroup | None) -> dict[str, Any]:
    """A state as nested mappings of tensors and objects, averagers among them. Collective."""
    with together(call, group):
        averagers, others = _parted(call, state)
        for key in averagers:
            wanted = "the name of a folder's part: text without a slash"
            plain = isinstance(key, str) and key not in ("", ".", "..") and "/" not in key
            require(plain, f"{call}: an averager's key", key, wanted)
    return others | native.encoded(call, averagers, native.packed, group)


def _parted(call: str, state: Mapping[str, Any]) -> tuple[dict[str, Averager], dict[str, Any]]:
    """The averagers of a state, and the rest with the state dicts of its objects, as torch makes it."""
    from torch.distributed.checkpoint.stateful import Stateful

    averagers = {key: each for key, each in state.items() if isinstance(each, Averager)}
    rest = {key: each for key, each in state.items() if key not in averagers}
    others = {k: one.state_dict() if isinstance(one, Stateful) else one for k, one in rest.items()}
    for key, value in others.items():
        _require_names(call, key, value)
    return averagers, others


def _require_names(call: str, where: str, held: object) -> None:
    """Raise `ValueError` for an averager below the top, and for two keys that are equal as text."""
    if isinstance(held, Averager):
        raise ValueError(f"{call}: {where} is an averager; put it at the top level of the state")
    if isinstance(held, Mapping):
        if twice := [key for key in held if not isinstance(key, str) and str(key) in held]:
            raise ValueError(
                f"{call}: {where} has the keys {twice[0]!r} and {str(twice[0])!r}, which would be stored "
                "under one name: rename one"
            )
        for key, each in held.items():
            _require_names(call, f"{where}.{key}", each)
    elif isinstance(held, (list, tuple)):
        for index, each in enumerate(held):
            _require_names(call, f"{where}.{index}", each)


def _restore_keys(held: object) -> None:
    """Move objects back to keys that are not text: loading has put them beside, under the key as text."""
    if isinstance(held, MutableMapping):
        for key in [key for key in held if not isinstance(key, str) and str(key) in held]:
            loaded = held.pop(str(key))
            if isinstance(loaded, Mapping) and isinstance(held[key], MutableMapping):
                held[key].update(loaded)
            else:
                held[key] = loaded
    values: Iterable[object] = held.values() if isinstance(held, Mapping) else ()
    for each in held if isinstance(held, (list, tuple)) else values:
        _restore_keys(each)


def _give(state: MutableMapping[str, Any], key: str, held: Any) -> None:
    """Give what was loaded to an object that has `load_state_dict`, or put it into the state."""
    from torch.distributed.checkpoint.stateful import Stateful

    if isinstance(state[key], Stateful):
        state[key].load_state_dict(held)
    else:
        state[key] = held


def _require_fit(folder: DistributedTensors, held: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the folder has exactly the names, shapes and dtypes that are to be loaded."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(held))
    wanted = {name: _described(each) for name, each in planner.state_dict.items()}
    got = dict.fromkeys(folder.objects, _described(None))
    got |= {name: f"{spec.dtype} {spec.shape}" for name, spec in folder.specs.items()}
    keys = set(map(str, held))
    asked = {name: each for name, each in got.items() if str(folder.paths[name][0]) in keys}
    if lines := difference(wanted, asked):
        raise ValueError(report(f"{folder.path} does not fit what is to be loaded", lines))


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return "an object"


def _require_averagers(
    path: Path, saved: Mapping[str, Stored], wanted: Mapping[str, Averager]
) -> None:
    if missing := [key for key in wanted if key not in saved]:
        has = ", ".join(filter(None, saved)) or "none"
        raise ValueError(
            f"{path} has no averager {', '.join(missing)}; it has {has}. Leave it out of `state`: a new "
            "averager begins with its first update"
        )
