"""Continue an average from other weights, under another rule, in another dtype or on another device.

Each function returns what is to be set on which object, so that the averager can set it in one step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak._checks import difference, report, require, require_count
from polyak._contract import is_ours
from polyak._dtypes import slot_dtype
from polyak._engine.live import ModelTensors
from polyak._engine.slots import COMPENSATION, Average, tick_data
from polyak._engine.tracking import Tracked
from polyak._engine.twins import refuse_unlike
from polyak._engine.updating import Updating
from polyak._modes import no_grad, ordinary
from polyak._ranks.sharding import as_distributed, is_distributed, local, spread
from polyak.rules import START, Rule, Tick
from polyak.rules._clocks import tick_after

MOST_UPDATES = 10**8
"""The most updates of an average that files and other programs tell of."""

Change = tuple[object, dict[str, object]]


def tick_under(rule: Rule, was: Tick) -> Tick:
    """The clock of an average under another rule: the same number of updates in the same time."""
    nested = was.n and rule.tick(START, 1.0).inner is not None
    mean = was.t / was.n if nested else 0.0
    return was._replace(inner=tick_after(rule, was.n, mean, mean).inner if nested else None)


def begun(
    weights: Mapping[str, Tensor], count: int, live: ModelTensors, average: Average, every: int
) -> dict[str, Any]:
    """The state of an average that is these weights after `count` updates; raises `ValueError`."""
    require_count("begin: count", count, "the number of updates that made the weights")
    require(count <= MOST_UPDATES, "begin: count", count, f"at most {MOST_UPDATES}")
    rule = average.rule
    tick = tick_after(rule, count, 1.0, float(every))
    moved = [slot for slot in rule.fractions(tick) if count == 1 or len(rule.slots) == 1]
    if not moved:
        raise ValueError(
            f"begin: {rule} has the slots {', '.join(rule.slots)}, and weights alone do not give them "
            f"after {count} updates: pass count=1, as if the first update had copied these weights"
        )
    held = _in_slot_dtype(given(weights, live), average, live)
    slots: dict[str, dict[str, Tensor]] = dict.fromkeys(moved, held)
    if average.known_slots() - set(rule.slots):
        low = {name: as_distributed(torch.zeros_like(local(t)), t) for name, t in held.items()}
        slots |= {slot + COMPENSATION: low for slot in moved}
    return {"rule": str(rule), "tick": tick_data(tick), "slots": slots}


def given(
    weights: Mapping[str, Tensor], live: ModelTensors, policy: str = "average"
) -> dict[str, Tensor]:
    """The tensors of a policy by name: those given, and of buffers that are not given the model's."""
    known = {name for item in live.tracked for name in item.names}
    if extra := [name for name in weights if name not in known]:
        wanted = dict.fromkeys(item.name for item in live.averaged)
        lines = difference(wanted, wanted | dict.fromkeys(extra))
        raise ValueError(report("begin: the weights are not the model's tensors", lines))
    found, missing = {}, []
    for item in (each for each in live.tracked if each.policy == policy):
        names = [name for name in item.names if name in weights]
        if names:
            tensor = weights[names[0]].detach()
            if item.mesh is not None and not is_distributed(tensor):
                tensor = spread(tensor, item.mesh)
            found[item.name] = tensor
        elif item.kind == "buffer":
            found[item.name] = item.held().detach()
        else:
            missing.append(item.name)
    if missing:
        lines = difference(dict.fromkeys([*found, *missing]), dict.fromkeys(found))
        raise ValueError(report("begin: weights are missing", lines))
    return found


@ordinary
def alike(
    state: Mapping[str, Any],
    live: ModelTensors,
    averages: Mapping[str, Average],
    updating: Updating,
) -> None:
    """Gives an averager, not yet used, tensors in the forms of a state that it then loads.

    The model may have had another dtype when those of the state were made.
    """

    def empty(items: Sequence[Tracked], held: Mapping[str, Tensor]) -> list[Tensor]:
        there = all(item.name in held for item in items)  # if not, the load says so
        return [torch.empty_like(local(held[i.name])) for i in items] if there else []

    for name, average in averages.items():
        for slot, held in state["averages"][name]["slots"].items():
            if made := empty(live.averaged, held):
                average.adopt(slot, made)
    updating.copies.tensors = empty(live.copied, state["copies"])


def _in_slot_dtype(
    held: Mapping[str, Tensor], average: Average, live: ModelTensors
) -> dict[str, Tensor]:
    """Tensors in the dtypes of the slots; a load refuses other shapes."""
    dtypes = {name: spec.dtype for name, spec in average.specs(live).items()}
    return {n: as_distributed(local(t).to(dtypes[n]), t) for n, t in held.items()}


def ruled(average: Average, rule: Rule) -> Average:
    """The average as it would be under another rule; it shares the slots.

    Raises `ValueError` if the slots are not those that the rule needs.
    """
    other = copy.copy(average)
    other.rule, other.ours = rule, is_ours(rule)
    other.tick = tick_under(rule, average.tick)
    held, needed = set(average.slots), other.needed_slots(other.tick)
    if not needed <= held <= other.known_slots():
        raise ValueError(
            f"change_rule: the average of {average.rule} has the slots {sorted(held)}, and {rule} needs "
            f"{sorted(needed)}. Make an averager with that rule, and call begin(average()) on it"
        )
    if average.shared() and len(rule.slots) > 1:
        raise ValueError(
            f"change_rule: module() shares the memory of this average, and {rule} needs "
            f"{', '.join(rule.slots)}; delete that module first"
        )
    return other


@no_grad
@ordinary
def moved(
    live: ModelTensors,
    averages: Iterable[Average],
    updating: Updating,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> list[Change]:
    """The changes that bring slots to another dtype or device; None leaves them where they are."""
    changes: list[Change] = []
    where: dict[str, object] = {} if device is None else {"_device": device}
    wanted: dict[str, object] = {} if dtype is None else {"_dtype": dtype}
    for average in averages:
        slots = {slot: _moved(live, held, dtype, device) for slot, held in average.slots.items()}
        if average.shared():
            refuse_unlike("to", live, next(iter(slots.values())))
        changes.append((average, {"slots": slots, "_grouped": {}, **wanted, **where}))
    changes.append((updating.copies, updating.copies.moved(device)))
    changes.append((updating, {"_generation": -1, **where}))
    return changes


def _moved(
    live: ModelTensors, slots: list[Tensor], dtype: torch.dtype | None, device: torch.device | None
) -> list[Tensor]:
    dtypes = [slot_dtype(i.local().dtype, dtype) for i in live.averaged]
    return [
        slot.to(device or slot.device, wide if dtype else slot.dtype)
        for slot, wide in zip(slots, dtypes, strict=True)
    ]
