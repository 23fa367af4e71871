"""The slots of one average, which any rule moves and reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from polyak import _tensors as tensors
from polyak._contract import (
    checked_fraction,
    checked_readout,
    checked_update,
    is_ours,
    require_copy,
)
from polyak._dtypes import Kind, kind, slot_dtype
from polyak._engine import open_swaps
from polyak._engine.apart import Apart
from polyak._engine.infinities import Infinities
from polyak._engine.live import ModelTensors
from polyak._engine.moving import Move
from polyak._engine.rounding import Rounding, seed
from polyak._engine.tracking import is_statistic, named
from polyak._lazy import TensorSpec, spec_of
from polyak._modes import no_grad, ordinary
from polyak._tensors import Groups
from polyak.rules import LIVE, START, Rule, Tick

COMPENSATION = ".compensation"


class Average:
    """One average: its rule, its clock, and for each slot its tensors in the order of the weights.

    A slot is allocated at its first move, which is a copy, so a window takes memory as it fills.
    If `damaged` is not empty, the slots no longer hold an average, and it says why. While `swapped`, they may
    hold live weights: the model has the average, in a block.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        rounding: Rounding = "nearest",
        name: str = "",
    ) -> None:
        self.rule, self.ours = rule, is_ours(rule)
        self.tick: Tick = START
        self.slots: dict[str, list[Tensor]] = {}
        self.damaged = ""
        self.swapped = False
        self.twin: Callable[[], object] | None = None
        """Returns the module that has the slots, if it is still there."""
        self.moving = False
        """Whether an update is under way."""
        self.torn: dict[str, str] = {}
        """Slots of which an update has moved a part, and why it stopped."""
        self._dtype, self._device = dtype, device
        self.rounding = rounding
        self._compensated = rounding == "compensated"
        self._name = name
        self._born: dict[str, int] = {}
        """Slots that updates have allocated, and at which update."""
        self._infinities: dict[str, Infinities] = {}
        self._grouped: dict[str, Groups] = {}
        self._generation = -1
        self.apart = Apart()

    def advance(self, live: ModelTensors, elapsed: float) -> list[Move]:
        """Advances the clock; returns the slots that the rule now moves, in groups, and how far."""
        self.moving = True  # until the slots have moved too, a signal handler must not read them
        fractions: Mapping[str, float]
        if self.ours:
            self.tick = self.rule.tick(self.tick, elapsed)
            fractions = self.rule.fractions(self.tick)
        else:
            self.tick, fractions = checked_update(self.rule, self.tick, elapsed, self.slots)
        return list(map(self.move, repeat(live), fractions, fractions.values()))

    def back_to(self, tick: Tick) -> None:
        """Turns the clock back, and drops the slots that were allocated since."""
        for slot in [slot for slot, n in self._born.items() if n > tick.n]:
            for each in self._with_residues({slot}):
                self.slots.pop(each, None)
                self._grouped.pop(each, None)
            del self._born[slot]
            self.torn.pop(slot, None)
        self.tick = tick

    def tear(self, tick: Tick, error: BaseException) -> None:
        """Marks the slots that moved at a tick: they are not an average until they are copied."""
        reason = f"An update stopped halfway ({type(error).__name__}: {error})"
        moved = {slot for slot, fraction in self.rule.fractions(tick).items() if fraction != 0}
        self.torn |= dict.fromkeys(moved, reason)

    def mend(self) -> None:
        """Removes the mark from the slots that the last tick has copied."""
        copied = {slot for slot, f in self.rule.fractions(self.tick).items() if f == 1}
        self.torn = {slot: reason for slot, reason in self.torn.items() if slot not in copied}

    def move(self, live: ModelTensors, slot: str, fraction: float) -> Move:
        """A slot's move with this average's rounding. The first one is a copy and allocates the slot."""
        # NaN fails this comparison; numbers of other libraries are converted.
        if not (type(fraction) is float and 0 <= fraction <= 1):
            fraction = checked_fraction(self.rule, self.tick, slot, fraction)
        if slot not in self.slots:
            self._allocate(live, slot, fraction)
        residues = self.groups(live, slot + COMPENSATION) if self._compensated else None
        seeds = None
        if self.rounding == "stochastic":
            seeds = [seed(self.tick.n, self._name, slot, each) for each in live.streams]
        infinities = self._infinities.get(slot) or self._infinities.setdefault(slot, Infinities())
        return Move(self.groups(live, slot), fraction, infinities, residues, seeds)

    def require_own(self, live: ModelTensors, call: str) -> None:
        """Raises `RuntimeError` if a module in a block, or the model, has the slots."""
        if open_swaps.OPEN and self.shared():
            slots = [(f"module({self._name!r})", each) for each in self.lone_slot() or ()]
            open_swaps.refuse_parts(call, slots)
        self.require_apart(live, call)

    def require_apart(self, live: ModelTensors, call: str) -> None:
        """Raises `RuntimeError` if the model has slots; looks at tensors that are new since the last call."""
        if self._generation == live.generation:
            return
        name, shared, written = self.apart.look(live.averaged, self.all_slots())
        if written:
            self.damaged = f"{name} of the model was one of its slots, and may have changed"
        if shared:
            load = ", and load a saved state" if self.damaged else ""
            raise RuntimeError(
                f"{call}: {name} of the model is a slot of the average (load_state_dict(assign=True) of an "
                f"averager's own tensors?): give the model a .clone() of it{load}"
            )
        self._grouped, self._generation = {}, live.generation

    def all_slots(self) -> list[Tensor]:
        """The tensors of all slots."""
        return [each for held in self.slots.values() for each in held]

    def groups(self, live: ModelTensors, slot: str) -> Groups:
        """The tensors of a slot in the groups of the live weights."""
        if self._generation != live.generation:
            self.require_apart(live, "update")
        if slot not in self._grouped:
            self._grouped[slot] = live.group(self.slots[slot])
        return self._grouped[slot]

    def read(
        self,
        live: ModelTensors,
        wanted: Sequence[int] | None = None,
        where: tuple[slice, ...] = (),
    ) -> list[Tensor]:
        """The average as fresh tensors, of all averaged weights or of those `wanted`, in order.

        If `where` is given, only that slice of each. Running statistics are read out without terms
        that extrapolate, because an extrapolated variance can be negative.
        """
        like = next(iter(self.slots.values()))
        chosen = range(len(like)) if wanted is None else wanted
        out = [torch.empty_like(like[i][where]) for i in chosen]
        convex = [is_statistic(live.averaged[i].name) for i in chosen]
        coefficients = {each: self.readout(convex=each) for each in set(convex)}
        weights = {}
        if any(LIVE in each for each in coefficients.values()):
            open_swaps.refuse_swapped(f"{self.rule} reads the live weights", live.averaged)
            weights = {i: live.averaged[i].local() for i in chosen}
        # Only the wanted tensors are grouped here: a read of one must not walk through all of them.
        groups: dict[tuple[bool, *tuple[Kind, ...]], list[tuple[int, int]]] = {}
        for at, i in enumerate(chosen):
            kinds = (kind(out[at]), kind(weights[i])) if weights else (kind(out[at]),)
            groups.setdefault((convex[at], *kinds), []).append((at, i))
        for (of_statistics, *_), group in groups.items():
            terms = [
                (
                    [(weights if slot == LIVE else self.slots[slot])[i][where] for _, i in group],
                    coefficient,
                )
                for slot, coefficient in coefficients[of_statistics].items()
            ]
            tensors.combine_([out[at] for at, _ in group], terms)
        return out

    def readout(self, *, convex: bool = False) -> dict[str, float]:
        """The coefficients of the average, or those of running statistics, checked."""
        readout = self.rule.convex_readout if convex else self.rule.readout
        return checked_readout(self.rule, self.tick, readout(self.tick), self.slots, convex=convex)

    def shared(self) -> bool:
        """Whether a module has the slots, so that they must hold the average at all times."""
        return self.twin is not None and self.twin() is not None

    def extrapolates(self) -> bool:
        """Whether running statistics are read out with other coefficients than the weights."""
        tick = self.tick if self.tick.n else self.rule.tick(START, 1.0)
        return self.rule.readout(tick) != self.rule.convex_readout(tick)

    def require_usable(self, call: str) -> None:
        """Raises `RuntimeError` if there is no average yet, or if it can no longer be used."""
        self.refuse_damaged(call)
        if self.tick.n == 0:
            raise RuntimeError(
                f"{call}: there is no average before the first update; call update() after each "
                "optimizer step, or begin() to have an average at once"
            )

    def refuse_damaged(self, call: str) -> None:
        """Raises `RuntimeError` if a block or an update has damaged the average, or is moving it."""
        if self.moving:
            raise RuntimeError(
                f"{call}: an update is running, and only some of the average's tensors have moved"
            )
        for reason in filter(None, (self.damaged, *self.torn.values())):
            raise RuntimeError(f"{call}: load a saved state first. {reason}")

    def lone_slot(self) -> list[Tensor] | None:
        """The slot that equals the average, if there is one."""
        (slot, coefficient), *others = self.readout().items()
        return self.slots[slot] if not others and coefficient == 1 and slot != LIVE else None

    def specs(self, live: ModelTensors) -> dict[str, TensorSpec]:
        """name -> shape and dtype of the slots: those there are, or those there will be."""
        held = next(iter(self.slots.values()), None)
        if held is not None:
            names = (item.name for item in live.averaged)
            return {n: spec_of(t) for n, t in zip(names, held, strict=True)}
        return {
            item.name: TensorSpec(tuple(t.shape), slot_dtype(t.dtype, self._dtype))
            for item in live.averaged
            for t in [item.local()]
        }

    def state(self, live: ModelTensors) -> dict[str, Any]:
        """Rule, clock and slots as data; the tensors are the slots, or share their memory."""
        self.apart.note(self.all_slots())
        slots = {slot: named(live.averaged, held) for slot, held in self.slots.items()}
        return {"rule": str(self.rule), "tick": tick_data(self.tick), "slots": slots}

    def known_slots(self) -> set[str]:
        """The names of all slots that this average can have."""
        return self._with_residues(set(self.rule.slots))

    def needed_slots(self, tick: Tick) -> set[str]:
        """The names of the slots that the average needs at a tick."""
        return self._with_residues(set(self.rule.readout(tick)) - {LIVE} if tick.n else set())

    @no_grad
    def taken(
        self, live: ModelTensors, tick: Tick, slots: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, object]:
        """The attributes of this average with a clock, and copies of slots, that were checked."""
        filled = {}
        dtypes = [spec.dtype for spec in self.specs(live).values()]
        for slot, held in slots.items():
            filled[slot] = self._empty(live, dtypes)
            tensors.lerp_(filled[slot], [held[item.name] for item in live.averaged], 1.0)
        fresh = {"damaged": "", "moving": False, "torn": {}, "_grouped": {}, "_born": {}}
        return {"tick": tick, "slots": filled, **fresh}

    def kept(self, before: Mapping[str, list[Tensor]]) -> dict[str, object]:
        """The attributes of this average with its slots in the memory of those that it had `before`."""
        slots = {slot: tensors.kept(before.get(slot), held) for slot, held in self.slots.items()}
        return {"slots": slots, "_grouped": {}}

    def adopt(self, slot: str, stored: Sequence[Tensor]) -> None:
        """Uses tensors that belong to another object (a module) as the tensors of a slot."""
        self._grouped.pop(slot, None)
        self.slots[slot] = list(stored)

    def _with_residues(self, slots: set[str]) -> set[str]:
        return slots | {slot + COMPENSATION for slot in slots} if self._compensated else slots

    def _allocate(self, live: ModelTensors, slot: str, fraction: float) -> None:
        require_copy(self.rule, self.tick, slot, fraction)
        dtypes = [spec.dtype for spec in self.specs(live).values()]
        self._born[slot] = self.tick.n
        self.slots[slot] = self._empty(live, dtypes)
        if self._compensated:
            self.slots[slot + COMPENSATION] = self._empty(live, dtypes)

    @ordinary
    def _empty(self, live: ModelTensors, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Fresh tensors for one slot, not filled; ordinary ones, even in inference mode."""
        return [
            torch.empty_like(item.local(), dtype=dtype, device=self._device, requires_grad=False)
            for item, dtype in zip(live.averaged, dtypes, strict=True)
        ]


def tick_data(tick: Tick | None) -> list[Any] | None:
    """A clock as data: `[n, t, elapsed, inner]`."""
    return None if tick is None else [tick.n, tick.t, tick.elapsed, tick_data(tick.inner)]
