"""Training: a model, its optimizer and its averages, saved by all ranks into one folder.

The folder is one of torch.distributed.checkpoint. An averager in it is what `native` writes of it, so
that every reader of averages here reads it too, in one process and without a process group.
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
from polyak.checkpoints._distributed import DistributedTensors
from polyak.checkpoints._folders import load_folder, save_folder
from polyak.checkpoints._load import adopt, fitted, require_fit
from polyak.checkpoints._own_format import Stored

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def save_distributed(
    path: Path | str,
    state: Mapping[str, Any],
    *,
    group: ProcessGroup | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a training's state, averagers among it, as a folder of torch.distributed.checkpoint.

    Collective: every rank of the group (by default all) calls it at the same place. Each writes its
    own parts into a hidden folder beside, which the first rank renames when all are done: a process
    killed at any moment leaves the last complete folder. What fails on one rank fails on all.

    Args:
        state: what `torch.distributed.checkpoint.save` takes: key -> a state dict, or an object
            with `state_dict()`; and key -> `Averager`. What several ranks have whole is saved from
            the lowest: under DistributedDataParallel ranks' buffers may differ.
        path: the same on all ranks.
        group: whose ranks save; they must share a file system.

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

    Raises `FileExistsError` for a path that exists, unless `overwrite`; `FileNotFoundError` where a
    rank does not see the folder; `ValueError` where ranks are not at the same update, or for parts
    that torch.distributed.checkpoint would misplace; `RuntimeError` inside `applied()`, and where
    another rank failed.
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
    """Takes over what `save_distributed` wrote, on any number of ranks: into tensors and averagers.

    `state` is as for saving: of each of its keys the folder must have the same names, shapes and
    dtypes, neither more nor less; keys of the folder that it lacks are left alone. Averagers may be
    fresh. It is collective where there is a process group, and works in one process without.

    Objects that are no tensors (an optimizer's settings) are read by torch.distributed.checkpoint,
    which unpickles them: code in them is run, so load folders of your own training only. An averager's
    part runs nothing: `polyak.load(path / "average", averager)` and `checkpoints.read` read it
    from any folder.

    Raises `ValueError` on all ranks that lists what is missing, extra, of another shape or dtype,
    and what `polyak.load` raises; then nothing has changed. A damaged part of the other tensors may
    be found when some are read already: then load another folder before going on.
    """
    call, path = "load_distributed", Path(path)
    averagers = {key: each for key, each in state.items() if isinstance(each, Averager)}
    with together(call, group):
        folder = DistributedTensors(path)
        others = _plain({key: each for key, each in state.items() if key not in averagers})
        for key, held in others.items():
            _require_names(call, key, held)
        _require_fit(folder, others)
        saved = Stored.within(folder)
        _require_averagers(path, saved, averagers)
        states = {key: fitted(saved[key], each) for key, each in averagers.items()}
        for key, averager in averagers.items():
            require_fit(path / key, averager, states[key])
    if others:
        load_folder(call, path, others, group=group)
    with together(call, group):
        for key, averager in averagers.items():
            adopt(path / key, averager, states[key])
        for key, held in others.items():
            _restore_keys(held)
            _give(state, key, held)


def content_of(call: str, state: Mapping[str, Any], group: ProcessGroup | None) -> dict[str, Any]:
    """A state as nested mappings of tensors and objects. Collective."""
    averagers = {key: each for key, each in state.items() if isinstance(each, Averager)}
    with together(call, group):
        for key in averagers:
            wanted = "the name of a folder's part: text without a slash"
            plain = isinstance(key, str) and key not in ("", ".", "..") and "/" not in key
            require(plain, f"{call}: an averager's key", key, wanted)
        others = _plain({key: each for key, each in state.items() if key not in averagers})
        for key, held in others.items():
            _require_names(call, key, held)
    return others | native.encoded(call, averagers, native.packed, group)


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """What torch.distributed.checkpoint would make of a state: the state dicts of objects."""
    from torch.distributed.checkpoint.stateful import Stateful

    return {
        k: each.state_dict() if isinstance(each, Stateful) else each for k, each in state.items()
    }


def _require_names(call: str, where: str, held: object) -> None:
    """Raises `ValueError` for an averager below the top, and for keys that are one as text."""
    if isinstance(held, Averager):
        raise ValueError(f"{call}: {where} is an averager, wanted it at the top of the state")
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
    """Puts objects back under keys that are no text, where loading has put them beside, under text."""
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
    """Gives what was loaded to an object that takes it, or puts it into the state."""
    from torch.distributed.checkpoint.stateful import Stateful

    if isinstance(state[key], Stateful):
        state[key].load_state_dict(held)
    else:
        state[key] = held


def _require_fit(folder: DistributedTensors, held: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless the folder has just what is to be loaded, in the same forms."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(held))
    wanted = {name: _described(each) for name, each in planner.state_dict.items()}
    got = dict.fromkeys(folder.objects, _described(None))
    got |= {name: f"{form.dtype} {form.shape}" for name, form in folder.forms.items()}
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
            f"{path} has no averager {', '.join(missing)}; it has {has}. Leave it out, and the new "
            "one begins with its first update"
        )
