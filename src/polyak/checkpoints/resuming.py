"""Resuming: an averager goes on from a file, our own or another library's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.averager import Averager
from polyak.checkpoints import native
from polyak.checkpoints.checkpoint import Checkpoint, Clock, Weights, ticked
from polyak.checkpoints.loading import load_pickle
from polyak.checkpoints.names import named
from polyak.checkpoints.reading import read
from polyak.checkpoints.stored import KEY, Stored
from polyak.checkpoints.tensorfile import TensorFile, is_safetensors
from polyak.checks import require_count
from polyak.ema import EMA
from polyak.engine import COMPENSATION, Form, tick_data
from polyak.rules import AVERAGE, START, Power, Rule, Tick
from polyak.sharding import require_whole
from polyak.specs import as_specs
from polyak.states import STATE_FORMAT
from polyak.tracking import Tracked, difference, report


def load(
    path: Path | str,
    averager: Averager | EMA,
    *,
    names: Sequence[str] | None = None,
    count: int | None = None,
    change_rule: bool = False,
) -> None:
    """Makes an averager go on where a file's average was: after `save`, bit for bit.

    A file of another library (`read` lists them) goes on along that library's own path, where the
    averager's rule and `every` are what the library had: `polyak.theory.equivalents` names them.
    What a file does not hold must be given: `count`, the updates made so far; `names`, the order of
    tensors without names (by default that of the model's parameters). Buffers and frozen parameters
    that the library does not average are taken from the file's live weights, or from the model.

    `change_rule` goes on with the averager's own rule and `every`, from the file's slots and clock;
    no `Recorder` takes such an average, whose slots are of two rules. Nothing is changed unless
    everything fits.

    Raises `ValueError` that lists what differs: averages, rules, names, shapes, dtypes; for a file
    that is damaged or lacks what is needed, and for a sharded model. `RuntimeError` inside
    `applied()`.
    """
    path = Path(path)
    if isinstance(averager, Averager):
        require_whole("load", {item.name: item.held() for item in averager.tracked})
    stored = _stored(path)
    if isinstance(averager, EMA):
        _load_module(path, stored, averager)
    elif stored is not None:
        _adopt(path, averager, _own_state(stored, averager, change_rule))
    else:
        found = _read(path, averager, names)
        _adopt(path, averager, _foreign_state(found, averager, count, change_rule))


def _adopt(path: Path, averager: Averager, state: dict[str, Any]) -> None:
    try:
        averager.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _stored(path: Path) -> Stored | None:
    """The file as one of ours, or None."""
    if not path.is_file() or not is_safetensors(path):
        return None
    file = TensorFile(path)
    return Stored(file) if KEY in file.metadata else None


def _load_module(path: Path, stored: Stored | None, ema: EMA) -> None:
    """The article's class goes on: all names, shapes and dtypes are compared before it changes."""
    held = load_pickle(path) if stored is None else stored.under("ema/")
    wanted = {name: _form(tensor) for name, tensor in ema.state_dict().items()}
    got = {name: _form(tensor) for name, tensor in held.items()} if _is_state(held) else {}
    for counter in {"initted", "step"} & got.keys():  # ema-pytorch's are scalars, of other dtypes
        if held[counter].numel() == 1 and not held[counter].is_complex():
            got[counter] = wanted[counter]
    if lines := difference(wanted, got):
        raise ValueError(report(f"{path}: not the state of this EMA", lines))
    if stored is not None and (rule := stored.get("rule")) != str(ema.rule):
        mine = f"this one {ema.rule}"
        raise ValueError(f"{path}: the EMA saved has the rule {rule}, {mine}; make it so")
    if stored is not None and (every := stored.get("every")) != ema.update_every:
        mine = f"this one {ema.update_every}"
        raise ValueError(f"{path}: the EMA saved has update_every={every!r}, {mine}; make it so")
    ema.load_state_dict(held)


def _is_state(held: object) -> bool:
    return isinstance(held, Mapping) and all(isinstance(t, Tensor) for t in held.values())


def _form(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _own_state(stored: Stored, averager: Averager, change_rule: bool) -> dict[str, Any]:
    """A state of ours, under the averager's rules where they are to change."""
    if stored.get("kind") == "ema":
        raise stored.error("it holds a polyak.EMA: load it into one")
    held, mine = stored.averages(), averager.rules
    theirs = {name: each.rule for name, each in held.items()}
    _require_rules(stored.path, mine, theirs, change_rule)
    state = native.state(stored)
    for name, rule in mine.items():
        if theirs[name] != rule:
            tick = tick_data(_tick_under(rule, held[name].tick))
            state["averages"][name] |= {"rule": str(rule), "tick": tick}
            state["mixed"] = True
    if (every := stored.get("every")) != averager.every and not change_rule:
        raise stored.error(
            f"saved with every={every!r}, this averager has every={averager.every}; make it so, or "
            "change_rule=True goes on by its own"
        )
    return state


def _tick_under(rule: Rule, was: Tick) -> Tick:
    """The clock of an average that goes on by another rule: as many updates in the same time."""
    nested = was.n and rule.tick(START, 1.0).inner is not None
    inner = ticked(rule, repeat(was.t / was.n, was.n)).inner if nested else None
    return was._replace(inner=inner)


def _require_rules(
    path: Path, wanted: Mapping[str, Rule], got: Mapping[str, Rule | None], change_rule: bool
) -> None:
    """Raises `ValueError` for averages that are missing or extra, and for rules that differ."""
    lines = difference(dict.fromkeys(wanted), dict.fromkeys(got))
    if lines:
        raise ValueError(report(f"{path}: other averages than this averager's", lines))
    if lines := [] if change_rule else difference(as_specs(wanted), as_specs(got)):
        title = f"{path}: other rules than this averager's; change_rule=True goes on by its own"
        raise ValueError(report(title, lines))


def _read(path: Path, averager: Averager, names: Sequence[str] | None) -> Checkpoint:
    """What another library wrote; tensors without names are those of the model's parameters."""
    found = read(path, names or "positions")
    parameters = [item for item in averager.tracked if item.kind != "buffer"]
    trainable = [item.name for item in parameters if item.live().requires_grad]
    averages = {}
    for name, weights in found.averages.items():
        if names is None and list(weights) == [str(i) for i in range(len(weights))]:
            every = [item.name for item in parameters]
            order = trainable if len(weights) == len(trainable) else every
            weights = _named(path, list(weights.values()), order)
        averages[name] = weights
    return replace(found, averages=averages)


def _named(path: Path, tensors: list[Tensor], order: list[str]) -> Weights:
    try:
        return named(tensors, order)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _foreign_state(
    found: Checkpoint, averager: Averager, count: int | None, change_rule: bool
) -> dict[str, Any]:
    """Another library's checkpoint as a state of this averager."""
    rules = averager.rules
    told = {name: found.rules.get(name, rules.get(name)) for name in found.averages}
    _require_rules(found.path, rules, told, change_rule)
    clock = _clock(found, count)
    tracked = averager.tracked
    weights = {name: _complete(found, name, tracked) for name in rules}
    averages = {
        name: {
            "rule": str(rule),
            "tick": _tick(found, clock, rule, averager.every),
            "slots": _slots(found, weights[name], averager.slot_forms(name)),
        }
        for name, rule in rules.items()
    }
    since = clock.since(averager.every)
    last = weights[next(iter(rules))]
    return {
        "format": STATE_FORMAT,
        "calls": since,
        "elapsed": float(since),
        "skipped": 0,
        "copies": {item.name: last[item.name] for item in tracked if item.policy == "copy"},
        "averages": averages,
    }


def _clock(found: Checkpoint, count: int | None) -> Clock:
    """How far the file's average had come, by the file or as given."""
    if count is not None:
        require_count("count", count, "updates made so far")
        return Clock(count)
    if found.clock is None:
        raise ValueError(
            f"{found.path}: a {found.format} file does not hold how many updates its average had; "
            "give count="
        )
    return found.clock


def _tick(found: Checkpoint, clock: Clock, rule: Rule, every: int) -> Any:
    try:
        return tick_data(_clock_under(found, clock, rule).tick(rule, every))
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}") from None


def _clock_under(found: Checkpoint, clock: Clock, rule: Rule) -> Clock:
    """The clock as a rule of ours counts it: KarrasEMA, stored as EMA is, runs one update ahead."""
    if found.format == "ema-pytorch" and isinstance(rule, Power):
        return Clock(clock.count, "updates", ahead=1)
    return clock


def _complete(found: Checkpoint, name: str, tracked: list[Tracked]) -> dict[str, Tensor]:
    """The average of a file, and for what its library does not average the live weights."""
    held, live = found.averages[name], found.live or {}
    known = {item.name for item in tracked} | {n for item in tracked for n in item.aliases}
    extra = [each for each in held if each not in known]
    complete, missing = {}, []
    tracked = [item for item in tracked if item.policy != "live"]
    for item in tracked:
        given = [n for n in (item.name, *item.aliases) if n in held]
        if given:
            complete[item.name] = held[given[0]]
        elif item.kind == "buffer" or not item.live().requires_grad:
            complete[item.name] = live.get(item.name, item.live())
        else:
            missing.append(item.name)
    if missing or extra:
        wanted = dict.fromkeys(item.name for item in tracked)
        got = dict.fromkeys([*complete, *extra])
        raise ValueError(report(f"{found.path}: other tensors", difference(wanted, got)))
    return complete


def _slots(
    found: Checkpoint, weights: Mapping[str, Tensor], forms: Mapping[str, Mapping[str, Form]]
) -> dict[str, dict[str, Tensor]]:
    """The slots of an average from its weights: only a rule of one slot has its average there."""
    plain = [slot for slot in forms if not slot.endswith(COMPENSATION)]
    if plain != [AVERAGE]:
        raise ValueError(
            f"{found.path}: a file of another library holds an average, and this averager's rule "
            f"needs the slots {', '.join(plain)}"
        )
    slots = {
        AVERAGE: {n: _widened(found, n, weights[n], form[1]) for n, form in forms[AVERAGE].items()}
    }
    for slot in forms.keys() - slots.keys():
        slots[slot] = {n: torch.zeros(shape, dtype=d) for n, (shape, d) in forms[slot].items()}
    return slots


def _widened(found: Checkpoint, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a slot's dtype, which must hold its values."""
    if not _holds(dtype, tensor.dtype):
        raise ValueError(
            f"{found.path}: {name} is {tensor.dtype}, and the averager's slots are {dtype}, which "
            f"would round it; make the averager with dtype={tensor.dtype}"
        )
    return tensor.to(dtype)


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype has all values of another."""
    try:
        return torch.promote_types(other, dtype) == dtype
    except RuntimeError:  # it has no rule for 8-bit floating-point numbers
        return False
