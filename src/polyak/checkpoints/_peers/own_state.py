"""The state of an `Averager` in a file of torch.save: alone, or anywhere beside a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyak._engine.slots import COMPENSATION
from polyak._engine.states import STATE_FORMAT, as_tick
from polyak._lazy import LazyTensors
from polyak.checkpoints._checkpoint import Checkpoint, Clock, ReadOut, Terms, read_out_terms
from polyak.checkpoints._peers.common import Found, state
from polyak.checkpoints._peers.walk import walk
from polyak.checkpoints._torch_save.files import StoredTensors
from polyak.rules import LIVE, Rule, Tick
from polyak.specs import parse

_KEYS = {"format", "calls", "elapsed", "skipped", "copies", "averages"}


def own_state(found: Found, live: LazyTensors | None = None) -> Checkpoint | None:
    """The averages in the state of an `Averager`, read out by their rules.

    A rule that reads the live weights too needs `live`; without them its average is refused.
    """
    if not _is_state(found.top):
        return None
    copies = _tensors(found.top["copies"])
    averages, refused, rules, ticks = {}, {}, {}, {}
    for name, average in found.top["averages"].items():
        rule, tick = parse(average["rule"]), as_tick(average["tick"])
        rules[name], ticks[name] = rule, tick
        if tick.n and live is None and LIVE in rule.readout(tick):
            refused[name] = (
                f"{rule} needs the live weights, and the file does not say which they are"
            )
        elif tick.n:
            averages[name] = _read_out(found, rule, tick, average["slots"], copies, live)
    clock = Clock(max((tick.n for tick in ticks.values()), default=0))
    return Checkpoint(
        found.path, "polyak", None, averages, rules, clock, ticks=ticks, refused=refused
    )


def states(top: Any) -> dict[str, dict[str, Any]]:
    """The states of averagers in a file, for `load_state_dict`, by the keys on the way to them."""
    is_own = lambda held: Checkpoint if _is_state(held) else None  # noqa: E731
    return {part.label: _loadable(part.held) for part in walk(top, is_own) if part.reading}  # type: ignore[arg-type]


def _is_state(top: object) -> bool:
    return isinstance(top, dict) and top.keys() >= _KEYS and top["format"] == STATE_FORMAT


def _loadable(top: Mapping[str, Any]) -> dict[str, Any]:
    averages = {
        name: {**average, "slots": {slot: _tensors(t) for slot, t in average["slots"].items()}}
        for name, average in top["averages"].items()
    }
    return {**top, "copies": _tensors(top["copies"]), "averages": averages}


def _tensors(held: Any) -> LazyTensors:
    return state(held) if held else StoredTensors({})


def _read_out(
    found: Found,
    rule: Rule,
    tick: Tick,
    slots: Mapping[str, Any],
    copies: LazyTensors,
    live: LazyTensors | None,
) -> ReadOut:
    of_slot = {
        slot: _tensors(tensors) for slot, tensors in slots.items() if COMPENSATION not in slot
    }
    names = list(dict.fromkeys(name for tensors in of_slot.values() for name in tensors))
    of_slot |= {} if live is None else {LIVE: live}
    terms: dict[str, Terms] = read_out_terms(rule, tick, names, lambda s, name: (of_slot[s], name))
    if missing := [
        (n, key) for n, term in terms.items() for tensors, key, _ in term if key not in tensors
    ]:
        raise ValueError(f"{missing[0][0]}: a slot or the live weights lack this tensor")
    terms |= {name: [(copies, name, 1.0)] for name in copies}
    return ReadOut(terms, lambda problem: ValueError(f"{found.path}: {problem}"))
