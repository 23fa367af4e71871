"""Check a saved state completely before any average is changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak._checks import difference, report, require, require_count, require_not_negative
from polyak._dtypes import can_hold
from polyak._engine.live import ModelTensors
from polyak._engine.slots import Average
from polyak._ranks.sharding import Layout, Shape, local, shape
from polyak.rules import START, Tick
from polyak.specs import as_specs

STATE_FORMAT = 1
_CALL = "load_state_dict"
_Form = tuple[Shape, torch.dtype]


@dataclass(frozen=True)
class AverageState:
    """A checked average: its clock, and its slots by name."""

    tick: Tick
    slots: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class State:
    """A checked state: calls and time since the last update, copied tensors, averages by name."""

    calls: int
    elapsed: float
    skipped: int
    copies: dict[str, Tensor]
    averages: dict[str, AverageState]
    run: str | None
    mixed: bool


def checked(state: object, live: ModelTensors, averages: Mapping[str, Average]) -> State:
    """Checks a state; raises `ValueError` that says what differs from what this averager needs."""
    data = _mapping(
        state, "the state", ("format", "calls", "elapsed", "skipped", "copies", "averages")
    )
    found = data["format"]
    require(found == STATE_FORMAT, f"{_CALL}: format", found, str(STATE_FORMAT))
    held = _mapping(data["averages"], "averages")
    _require_same_rules(held, averages)
    states = {name: _average(held[name], name, live, each) for name, each in averages.items()}
    begun = any(each.tick.n for each in states.values())
    return State(
        calls=require_count(f"{_CALL}: calls", data["calls"], least=0),
        elapsed=_time(data["elapsed"], "elapsed"),
        skipped=require_count(f"{_CALL}: skipped", data["skipped"], least=0),
        copies=_copies(data["copies"], live, begun=begun),
        averages=states,
        run=None if data.get("run") is None else str(data["run"]),
        mixed=data.get("mixed") is True,
    )


def set_together(changes: Sequence[tuple[object, dict[str, object]]]) -> None:
    """Sets attributes of several objects in one step, in which no signal handler can raise."""
    owners, attributes = zip(*changes, strict=True)
    deque(map(dict.update, map(vars, owners), attributes), maxlen=0)


def _require_same_rules(held: Mapping[str, Any], averages: Mapping[str, Average]) -> None:
    fields = ("rule", "tick", "slots")
    got = {name: _mapping(data, f"average {name!r}", fields)["rule"] for name, data in held.items()}
    if lines := difference(as_specs({n: each.rule for n, each in averages.items()}), got):
        title = "load_state_dict: the state has other rules than this averager; make it with the state's"
        cure = "call change_rule() afterwards to change one (the callbacks: pass change_rule=True)"
        raise ValueError(report(f"{title}, and {cure}", lines))


def _average(
    data: Mapping[str, Any], name: str, live: ModelTensors, average: Average
) -> AverageState:
    where = f"average {name!r}"
    tick = _tick(data["tick"], average.rule.tick(START, 1.0), f"{where}, tick")
    slots = {
        slot: dict(_mapping(held, f"{where}, slot {slot}"))
        for slot, held in _mapping(data["slots"], f"{where}, slots").items()
    }
    known, needed = average.known_slots(), average.needed_slots(tick)
    if not needed <= set(slots) <= known:
        wanted = sorted(needed) if needed else f"none, or of {sorted(known)}"
        text = f"load_state_dict: {where} has slots {sorted(slots)}, wanted {wanted}"
        cure = "; torch.distributed.checkpoint fills slots that exist, so begin() first"
        raise ValueError(text if slots else text + cure)
    dtypes = {name: spec.dtype for name, spec in average.specs(live).items()}
    for slot, held in slots.items():
        forms = {
            item.name: (item.shape(), _widened(held.get(item.name), dtypes[item.name]))
            for item in live.averaged
        }
        _require_forms(forms, held, f"{where}, slot {slot}")
        slots[slot] = {name: local(tensor) for name, tensor in held.items()}
    return AverageState(tick, slots)


def _widened(given: object, dtype: torch.dtype) -> torch.dtype:
    """The dtype to expect of a stored tensor: its own, if the slot's dtype can hold all its values."""
    own = getattr(given, "dtype", dtype)
    return own if can_hold(dtype, own) else dtype


def _copies(data: object, live: ModelTensors, *, begun: bool) -> dict[str, Tensor]:
    """The copied tensors. The model may have another float dtype now than when they were copied."""
    copies = dict(_mapping(data, "copies"))
    if copies or begun:
        forms = {item.name: (item.shape(), item.local().dtype) for item in live.copied}
        for name, (held, dtype) in forms.items():
            got = getattr(copies.get(name), "dtype", None)
            if got is not None and got.is_floating_point and dtype.is_floating_point:
                forms[name] = held, got
        _require_forms(forms, copies, "copies")
    return {name: local(tensor) for name, tensor in copies.items()}


def _require_forms(wanted: Mapping[str, _Form], held: Mapping[str, Any], where: str) -> None:
    got = {name: _form(value) for name, value in held.items()}
    if lines := difference(wanted, got):
        if any(isinstance(held, Layout) for held, _ in wanted.values()):
            lines.append("polyak.load takes each rank's part from a file of any layout")
        raise ValueError(report(f"load_state_dict: {where}: the tensors differ", lines))


def _form(value: object) -> _Form | str:
    """The shape (of a sharded tensor, the layout) and dtype; a text for anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if local(value).is_meta or value.layout != torch.strided:
        return f"a tensor on {value.device} of layout {value.layout}"
    return shape(value), value.dtype


def _mapping(value: object, where: str, fields: Sequence[str] = ()) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"load_state_dict: {where} is {type(value).__name__}, wanted a mapping")
    if missing := [field for field in fields if field not in value]:
        raise ValueError(f"load_state_dict: {where} lacks {', '.join(missing)}")
    return value


def as_tick(data: object, where: str = "tick") -> Tick:
    """Reads a clock from its data, `[n, t, elapsed, inner]`; raises `ValueError` for other data."""
    if not isinstance(data, Sequence) or isinstance(data, str) or len(data) != len(START):
        raise ValueError(f"load_state_dict: {where} is {data!r}, wanted [n, t, elapsed, inner]")
    n, t, elapsed, inner = data
    n = require_count(f"{_CALL}: {where}, n", n, least=0)
    times = _time(t, f"{where}, t"), _time(elapsed, f"{where}, elapsed")
    if n and not 0 < times[1] <= times[0]:
        raise ValueError(f"load_state_dict: {where} is {data!r}, wanted 0 < elapsed <= t")
    return Tick(n, *times, None if inner is None else as_tick(inner, f"{where}, inner"))


def _tick(data: object, like: Tick, where: str) -> Tick:
    """Reads a clock, and checks that it has as many inner clocks as the rule has."""
    tick = as_tick(data, where)
    held, wanted = tick, like
    while held.n and wanted.inner is not None and held.inner is not None:
        held, wanted = held.inner, wanted.inner
    if (held.inner is None) != (wanted.inner is None or held.n == 0):
        raise ValueError(f"load_state_dict: {where} is {data!r}, which is not this rule's clock")
    return tick


def _time(value: object, where: str) -> float:
    return float(require_not_negative(f"{_CALL}: {where}", value))
