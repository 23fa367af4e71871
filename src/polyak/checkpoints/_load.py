"""Make an averager continue from a file of polyak, or of another library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak._checks import difference, prefixed, report
from polyak._engine.changes import tick_under
from polyak._engine.slots import tick_data
from polyak._lazy import LazyTensors, as_lazy, joined, renamed, spec_of
from polyak.averager import Averager
from polyak.checkpoints import _own_format as own
from polyak.checkpoints._checkpoint import Checkpoint
from polyak.checkpoints._dcp.tensors import DistributedTensors
from polyak.checkpoints._open.files import labelled
from polyak.checkpoints._own_format import Stored
from polyak.checkpoints._peers.common import is_state
from polyak.checkpoints._peers.common import state as state_of
from polyak.checkpoints._peers.own_state import states
from polyak.checkpoints._read import content
from polyak.checkpoints._resume_foreign import foreign_state, local_parts, require_rules
from polyak.checkpoints._sniff import Source, sniff
from polyak.ema import EMA


def load(
    path: Path | str | Checkpoint,
    averager: Averager | EMA,
    *,
    names: Sequence[str] | None = None,
    count: int | None = None,
    change_rule: bool = False,
) -> None:
    """Make an averager continue from a file: after `save` bit for bit, as if it had not been interrupted.

    `path` may also be the result of `read`, such as `read(path, key="ema")`. From a file of another library
    (`read` lists them) it continues as that library would, if the averager
    has the rule and `every` that the library had: `polyak.theory.from_library` gives them from the
    library's call. If the file does not name its rule, a warning names the assumed one. Pass what the
    file does not say: `count`, the number of updates so far; `names`, the order of tensors without
    names (by default that of the model's parameters). Buffers and frozen parameters that the library
    does not average are taken from the file's live weights, or else from the model. If a file
    holds a state dict alone, and `count` is given, these weights are the average.

    With `change_rule` it continues with the averager's own rule, `every` and `pull`, from the file's slots and
    clock. A `Recorder` does not take such an average, since its slots come from two rules. Nothing is
    changed unless everything fits.

    A sharded averager, on any number of ranks, takes its parts from any of these files, no matter how
    many ranks saved it, and without communication. If a folder has several averagers
    (`save_distributed`), `path` names one: `folder / "average"`.

    Raises `ValueError` if something does not fit, with a list of averages, rules, names, shapes or dtypes
    that differ, and if the file is damaged or lacks what is needed; `RuntimeError` inside `applied()`.
    """
    if isinstance(averager, EMA):
        if isinstance(path, Checkpoint):
            raise ValueError(
                "load: path is a Checkpoint, wanted the path of a file for a polyak.EMA"
            )
        _load_module(sniff(path), averager)
        return
    options: Any = {"names": names, "count": count, "change_rule": change_rule}
    if isinstance(path, Checkpoint):
        adopt(path.path, averager, foreign_state(path, averager, **options))
    else:
        adopt(Path(path), averager, prepared(Path(path), averager, **options))


def prepared(
    path: Path,
    averager: Averager,
    *,
    names: Sequence[str] | None = None,
    count: int | None = None,
    change_rule: bool = False,
) -> dict[str, Any]:
    """The state in a file, with this rank's parts of its tensors, for `adopt`; raises as `load`."""
    source = sniff(path)
    if (stored := own.of_source(source)) is not None:
        return fitted(stored, averager, change_rule)
    state = None
    if isinstance(source.opened, DistributedTensors):
        state = find_state(source.opened, source.key)
    elif source.opened is not None:
        state = _only_state(source)
    if state is not None:
        return _placed(path, state, averager)
    return foreign_state(source, averager, names=names, count=count, change_rule=change_rule)


def _only_state(source: Source) -> dict[str, Any] | None:
    """The state of an averager that torch.save wrote, alone or beside other things."""
    found = states(content(source).top)
    if len(found) > 1:
        raise ValueError(
            f"{source.path} has the states of several averagers, {', '.join(found)}: save the one that "
            "you want in a file of its own"
        )
    return next(iter(found.values()), None)


def fitted(stored: Stored, averager: Averager, change_rule: bool = False) -> dict[str, Any]:
    """The state in a file of ours, for `adopt`."""
    return _placed(stored.path, _own_state(stored, averager, change_rule), averager)


def _placed(path: Path, state: dict[str, Any], averager: Averager) -> dict[str, Any]:
    """A state with this rank's parts of its tensors."""
    held = {item.name: item.held() for item in averager.tracked}
    for average, each in state["averages"].items():
        for slot, tensors in each["slots"].items():
            label = f"average {average!r}, slot {slot}"
            each["slots"][slot] = local_parts(path, label, tensors, held)
    state["copies"] = local_parts(path, "copies", state["copies"], held)
    return state


def adopt(path: Path, averager: Averager, state: dict[str, Any]) -> None:
    """Make an averager continue from a state; a `ValueError` names the file."""
    with prefixed(path):
        averager.load_state_dict(state)


def require_fit(path: Path, averager: Averager, state: dict[str, Any]) -> None:
    """Raise what `adopt` would raise, and change nothing."""
    with prefixed(path):
        averager.check_state(state)


def _load_module(source: Source, ema: EMA) -> None:
    """Load the state of the article's class, after all names, shapes and dtypes are compared."""
    path, stored = source.path, own.of_source(source)
    saved = _module_state(source) if stored is None else stored.under("ema/")
    wanted = {name: spec_of(tensor) for name, tensor in ema.state_dict().items()}
    got = dict(saved.specs)
    for counter in {"initted", "step"} & got.keys():  # in ema-pytorch they have other dtypes
        if got[counter].numel == 1 and not got[counter].dtype.is_complex:
            got[counter] = wanted[counter]
    if lines := difference(wanted, got):
        raise ValueError(report(f"{path}: not the state of this EMA", lines))
    mine = theirs = {"rule": str(ema.rule), "update_every": ema.update_every}
    if stored is not None:
        theirs = {"rule": stored.value("rule"), "update_every": stored.value("every")}
    if lines := difference(mine, theirs):
        raise ValueError(
            report(f"{path}: the saved EMA has other settings; make them the same", lines)
        )
    with labelled(path, "a damaged file"):
        ema.load_state_dict(saved)


def _module_state(source: Source) -> LazyTensors:
    """The state dict in a file that holds nothing else; empty for any other file."""
    top = content(source).top
    with labelled(source.path, "a damaged file"):
        return state_of(top) if is_state(top) else as_lazy({})


def _own_state(stored: Stored, averager: Averager, change_rule: bool) -> dict[str, Any]:
    """The state in a file of ours, with the averager's rules if they may change."""
    if stored.value("kind") == "ema":
        raise stored.error("it holds a polyak.EMA: load it into a polyak.EMA")
    averages, mine = stored.averages(), averager.rules
    theirs = {name: each.rule for name, each in averages.items()}
    require_rules(stored.path, mine, theirs, change_rule)
    state = own.state(stored)
    for option in ("every", "pull") if change_rule else ():
        state.pop(option, None)
    for name, rule in mine.items():
        if theirs[name] != rule:
            tick = tick_data(tick_under(rule, averages[name].tick))
            state["averages"][name] |= {"rule": str(rule), "tick": tick}
            state["mixed"] = True
    return state


def find_state(folder: DistributedTensors, key: str | None) -> dict[str, Any] | None:
    """Find what `averager.state_dict()` gave, saved by torch.distributed.checkpoint itself.

    It is the whole folder, or lies under a key. Its tensors are not read yet. None if there is no such
    state; raises `ValueError` if there are several.
    """
    path = folder.path if key is None else folder.path / key
    roots = [root for root in _roots(folder) if key is None or root == (key,)]
    if len(roots) > 1:
        keys = [key for root in roots for key in root]
        raise ValueError(
            f"{path} has the states of several averagers, {', '.join(keys)}: give the path of one, "
            f"such as {path / keys[-1]}"
        )
    with labelled(path, "a damaged state"):
        return _state(folder, roots[0]) if roots else None


def _roots(folder: DistributedTensors) -> list[tuple[str, ...]]:
    """The keys under which states lie; the empty one for a state that is the whole folder."""
    paths = {tuple(map(str, path)) for path in folder.paths.values()}
    begins = {path[: path.index("averages")] for path in paths if "averages" in path}
    return sorted(root for root in begins if len(root) < 2 and (*root, "format") in paths)


def _state(folder: DistributedTensors, root: tuple[str, ...]) -> dict[str, Any]:
    """The state under a root, nested again; empty mappings were not stored."""
    state: dict[str, Any] = {"copies": {}, "averages": {}}
    for name, path in folder.paths.items():
        keys = tuple(map(str, path))
        if keys[: len(root)] == root:
            place, (*outer, last) = state, keys[len(root) :]
            for key in outer:
                place = place.setdefault(key, {})
            alone = renamed(folder, {last: name}) if name in folder else None
            place[last] = folder.object(name) if alone is None else alone
    state["copies"] = _tensors(state["copies"])
    for average in state["averages"].values():
        slots = average.setdefault("slots", {})
        average["slots"] = {slot: _tensors(tensors) for slot, tensors in slots.items()}
    return state


def _tensors(held: Mapping[str, Any]) -> LazyTensors:
    if not all(isinstance(value, LazyTensors) for value in held.values()):
        raise ValueError("it has an object among its tensors")
    return joined(*held.values())
