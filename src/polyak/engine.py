"""The engine: one average's slots, moved and read as its rule says. It knows no rule by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak import tensors
from polyak.live import Groups, LiveWeights
from polyak.rules import LIVE, START, Rule, Tick
from polyak.tracking import Tracked, difference, report

Move = tuple[Groups, float]


def move_(live: Groups, moves: list[Move]) -> None:
    """`slot <- lerp(slot, live, fraction)` for every move, in one pass over the live weights."""
    fractions = [fraction for _, fraction in moves]
    for g, weights in enumerate(live):
        tensors.lerp_all_([groups[g] for groups, _ in moves], weights, fractions)


class Average:
    """One average: its rule, its clock, and slot by slot its tensors in the live weights' order.

    A slot is allocated at its first move, which is a copy; a window fills as it goes.
    """

    def __init__(
        self, rule: Rule, *, dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        self.rule = rule
        self.tick: Tick = START
        self.slots: dict[str, list[Tensor]] = {}
        self._dtype = dtype
        self._device = device
        self._grouped: dict[str, Groups] = {}
        self._generation = -1

    def advance(self, live: LiveWeights, elapsed: float) -> list[Move]:
        """The clock ticks; the slots that the rule now moves, in groups, and how far."""
        self.tick = self.rule.tick(self.tick, elapsed)
        fractions = self.rule.fractions(self.tick)
        return [(self.groups(live, slot), fraction) for slot, fraction in fractions.items()]

    def groups(self, live: LiveWeights, slot: str) -> Groups:
        """The tensors of a slot in the groups of the live weights; allocated at first use."""
        if self._generation != live.generation:
            self._grouped, self._generation = {}, live.generation
        if slot not in self._grouped:
            if slot not in self.slots:
                self.slots[slot] = self.empty(live)
            self._grouped[slot] = live.group(self.slots[slot])
        return self._grouped[slot]

    def read(self, live: LiveWeights) -> list[Tensor]:
        """The average as fresh tensors, in the live weights' order."""
        out = [torch.empty_like(stored) for stored in next(iter(self.slots.values()))]
        coefficients = self.rule.readout(self.tick)
        live_groups = live.groups()
        for g, group in enumerate(live.group(out)):
            terms = [
                (live_groups[g] if slot == LIVE else self.groups(live, slot)[g], coefficient)
                for slot, coefficient in coefficients.items()
            ]
            tensors.combine_(group, terms)
        return out

    def lone_slot(self) -> list[Tensor] | None:
        """The slot that is the average as it stands, if there is one."""
        (slot, coefficient), *others = self.rule.readout(self.tick).items()
        return self.slots[slot] if not others and coefficient == 1 and slot != LIVE else None

    def empty(self, live: LiveWeights) -> list[Tensor]:
        """Fresh tensors for one slot, not filled."""
        return [self._empty_like(item.live()) for item in live.averaged]

    def form(self, item: Tracked) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and dtype of a tensor's slots."""
        live = item.live()
        return tuple(live.shape), tensors.slot_dtype(live.dtype, self._dtype)

    def state(self, live: LiveWeights) -> dict[str, Any]:
        """Rule, clock and slots as data; the tensors are the slots themselves."""
        names = [item.name for item in live.averaged]
        slots = {k: dict(zip(names, held, strict=True)) for k, held in self.slots.items()}
        return {"rule": str(self.rule), "tick": _tick_data(self.tick), "slots": slots}

    def check_state(self, live: LiveWeights, state: Mapping[str, Any], where: str) -> None:
        """Raises `ValueError` unless a state has this average's slots, names, shapes and dtypes."""
        unknown = sorted(set(state["slots"]) - set(self.rule.slots))
        if unknown or (state["tick"][0] > 0 and not state["slots"]):
            raise ValueError(f"{where}: slots are {list(state['slots'])}, wanted {self.rule.slots}")
        for slot, held in state["slots"].items():
            wanted = {item.name: self.form(item) for item in live.averaged}
            got = {name: (tuple(t.shape), t.dtype) for name, t in held.items()}
            if lines := difference(wanted, got):
                raise ValueError(report(f"{where}, slot {slot}: other tensors", lines))

    @torch.no_grad()
    def take_state(self, live: LiveWeights, state: Mapping[str, Any]) -> None:
        """Takes over a checked state: its clock, and copies of its slots."""
        self.tick = _tick(state["tick"])
        self.slots, self._grouped = {}, {}
        for slot, held in state["slots"].items():
            self.slots[slot] = self.empty(live)
            sources = [held[item.name] for item in live.averaged]
            for stored, source in zip(self.slots[slot], sources, strict=True):
                stored.copy_(source)

    def adopt(self, slot: str, stored: Sequence[Tensor]) -> None:
        """Makes tensors that belong to someone else (a module) the tensors of a slot."""
        self.slots[slot] = list(stored)
        self._grouped.pop(slot, None)

    def _empty_like(self, live: Tensor) -> Tensor:
        dtype = tensors.slot_dtype(live.dtype, self._dtype)
        return torch.empty_like(live, dtype=dtype, device=self._device, requires_grad=False)


def _tick_data(tick: Tick | None) -> list[Any] | None:
    return None if tick is None else [tick.n, tick.t, tick.elapsed, _tick_data(tick.inner)]


def _tick(data: Sequence[Any] | None) -> Tick:
    n, t, elapsed, inner = data or (0, 0.0, 0.0, None)
    return Tick(n, t, elapsed, None if inner is None else _tick(inner))
