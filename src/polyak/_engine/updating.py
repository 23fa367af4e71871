"""Move slots towards the live weights when it is time, all of them or none.

A signal handler may raise between any two lines of an update. `Motion` then continues where it
stopped: an average would be lost if some of its tensors had moved and others had not.

The plain case, without guards and offload, is the hot path: `call`, `_update` and `Motion.run` do
nothing else for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from polyak import _tensors as tensors
from polyak._checks import require_count
from polyak._engine import open_swaps, signals
from polyak._engine.clock import START, TICK, Moment, UpdateClock
from polyak._engine.copies import Copies
from polyak._engine.exchange import failure
from polyak._engine.guard import Guard, Nonfinite
from polyak._engine.live import ModelTensors
from polyak._engine.moving import Move
from polyak._engine.offload import Courier, courier_for
from polyak._engine.slots import Average
from polyak._parts import Stages
from polyak._tensors import Groups, Journal, Kept

_FRACTION, _SLOTS = attrgetter("fraction"), attrgetter("slots")


class Motion:
    """`slot <- lerp(slot, live, fraction)` for every move, in one pass over the live weights.

    `ok` is a 0-dim bool tensor; if it is False, nothing changes. It is never synchronised to the
    host. `stages` are those of the model (`ModelTensors.stages`).
    """

    __slots__ = ("_journal", "_kept", "_live", "_moves", "_ok", "_stages")

    def __init__(
        self,
        live: Groups,
        moves: Sequence[Move],
        ok: Tensor | None = None,
        stages: Stages | None = None,
    ) -> None:
        self._live, self._ok, self._stages = live, ok, stages
        self._moves = list(filter(_FRACTION, moves))  # a lerp by 0 would make NaN of an infinity
        self._kept: Kept | None = None
        self._journal = Journal()

    @property
    def begun(self) -> bool:
        """Whether a slot may have been written to."""
        return self._journal.begun

    def run(self) -> None:
        """Moves the slots."""
        if self._kept is None:  # what slots share with weights before any of them moves
            kept: Kept = []
            for move in self._moves:
                if move.fraction == 1:
                    move.infinities.forget()
                elif move.infinities.none_in is not move.slots:
                    kept += move.infinities.shared(move.slots, self._live, move.residues)
            self._kept = kept
        plain = []
        for move in self._moves:
            if self._ok is None and move.residues is None and move.seeds is None:
                plain.append(move)
            else:
                move.alone_(self._live, self._ok, self._journal)
        fractions = list(map(_FRACTION, plain))
        groups = zip(self._live, *map(_SLOTS, plain), strict=True) if plain else ()
        for g, (weights, *slots) in enumerate(groups):
            tensors.lerp_all_(slots, weights, fractions, self._stages, g, self._journal)
        if self._kept:
            tensors.keep_(self._kept)

    def finish(self) -> None:
        """Continues after an exception interrupted `run`."""
        self._journal.again()
        self.run()


@signals.critical
def undisturbed(action: Callable[[], object]) -> None:
    """Runs an action while signal handlers wait; then it lets them run."""
    try:
        signals.hold()
        action()
    finally:
        open_swaps.hear_signals()


class Updating:
    """Counts calls, moves the slots at calls 1, `every` + 1, ..., and leaves out what must not count."""

    def __init__(
        self,
        live: ModelTensors,
        averages: Sequence[Average],
        *,
        every: int,
        nonfinite: Nonfinite,
        device: torch.device | None,
    ) -> None:
        self.every = require_count("every", every, "calls per update")
        self.clock = UpdateClock(averages)
        self.guard = Guard(live, self.clock, nonfinite)
        self.copies = Copies(live, device)
        self._live, self._averages, self._device = live, averages, device
        self._courier: Courier | None = None
        self._generation = -1
        self.replaced: Callable[[], object] | None = None
        """Called before an update of tensors that were found anew; raises to refuse them."""

    def call(self, elapsed: float, found_inf: Sequence[Tensor] = ()) -> None:
        """One call, `elapsed` after the last; `found_inf` is what a scaler left in the optimizers."""
        clock, guard = self.clock, self.guard
        if guard.pending is not None:
            guard.hear()
        groups = self._live.trained()
        calls, time = clock.since[0] + 1, clock.since[1] + elapsed
        due = calls >= self.every or not clock.begun()
        counts, ok = True, None
        if found_inf or guard.nonfinite != "allow":
            counts, ok = guard.counts(groups, (calls, time), found_inf, due=due)
        if due and counts:
            self._update(groups, time, ok)
        elif counts:
            clock.since = calls, time

    def settle(self) -> None:
        """Waits for slots that still move, and for the verdict of the call before."""
        if self._courier is not None:
            self._courier.join()
        self.guard.hear()
        if self._live.suspect:
            for average in self._averages:
                average.damaged = average.damaged or self._live.suspect
            self._live.suspect = ""

    def state(self) -> dict[str, Any]:
        """Calls and time since the last update, and the copied tensors, as data."""
        calls, elapsed = self.clock.since
        skipped, copies = self.guard.skipped, self.copies.state()
        return {"calls": calls, "elapsed": elapsed, "skipped": skipped, "copies": copies}

    def taken(
        self, calls: int, elapsed: float, skipped: int, copies: Mapping[str, Tensor]
    ) -> list[tuple[object, dict[str, object]]]:
        """The attributes to set on each object. They hold copies of the result of `state`, which was checked."""
        guard: dict[str, object] = {"skipped": skipped, "pending": None}
        since: dict[str, object] = {"since": (calls, elapsed)}
        return [(self.clock, since), (self.guard, guard), (self.copies, self.copies.taken(copies))]

    def before_step(self) -> None:
        """Makes an optimizer's step wait, on the device, for a copy of the weights that is under way.

        The forward pass writes to buffers before this is called, so with buffers the next copy is
        waited for at once.
        """
        if self._courier is not None:
            self._courier.before_write()
            stored = self._live.stored()
            self._courier.held = all(item.kind == "parameter" for item in stored)

    def detached(self) -> None:
        """Waits for a copy under way, because no optimizer calls `before_step` any more."""
        self.replaced = None
        if self._courier is not None:
            self._courier.before_write()
            self._courier.held = False

    def _update(self, groups: Groups, time: float, ok: Tensor | None = None) -> None:
        """One update of every average and of the copies, `time` after the last.

        If an exception comes before slots have moved, the update is undone; if it comes later, the
        update is completed. If that fails too, it marks the averages; they can be read again once
        their slots are copied or loaded.
        """
        since, ticks = self.clock.since, tuple(map(TICK, self._averages))
        copies = self.copies.tensors
        moves: list[Move] = []
        copied: list[Tensor] = []
        motion = None
        try:
            for average in self._averages:
                moves += average.advance(self._live, time)
            if self._live.copied:
                copied = self.copies.sources()
            if self._generation != self._live.generation:
                if self.replaced is not None:
                    self.replaced()
                self._find_courier([*groups, copied])
            if self._courier is not None:
                self._send(self._courier, groups, copied, moves, ok)
            else:
                motion = Motion(groups, moves, ok, self._live.stages)
                motion.run()
                if copied:
                    self.copies.take_(copied, ok)
            self._end()
        except BaseException as error:
            copy = partial(self.copies.take_, copied, ok)
            self._stopped(error, Moment(*since, ticks), copies, motion, copy)
            if isinstance(error, RuntimeError):
                self._live.check("update")  # it names the tensor that has changed, if one has
            raise

    def _end(self) -> None:
        """After all slots have moved."""
        self.clock.since = START
        for average in self._averages:
            average.moving = False
            if average.torn:
                average.mend()

    def _stopped(
        self,
        error: BaseException,
        before: Moment,
        copies: list[Tensor],
        motion: Motion | None,
        copy: Callable[[], None],
    ) -> None:
        """After an exception: completes the update, or else returns to the moment before."""

        def finish() -> None:
            assert motion is not None
            motion.finish()
            copy()
            self._end()

        try:
            if motion is not None:
                undisturbed(lambda: failure(finish))
        finally:
            if any(average.moving for average in self._averages):
                if motion is not None and motion.begun:
                    for average in self._averages:
                        average.tear(average.tick, error)
                self.clock.back_to(before)
                self.copies.tensors, self.guard.pending = copies, None
                for average in self._averages:
                    average.moving = False

    def _find_courier(self, tensors: Groups) -> None:
        """Makes a courier for the devices of the tensors; needed again after any of them was moved."""
        self._generation = self._live.generation
        if self._courier is not None:
            self._courier.join()
        self._courier = courier_for(tensors, self._device)

    def _send(
        self,
        courier: Courier,
        groups: Groups,
        copied: list[Tensor],
        moves: list[Move],
        ok: Tensor | None,
    ) -> None:
        """Sends weights, copied tensors and the verdict to the host together, and updates there."""
        ticks = [average.tick for average in self._averages]

        def arrived(staged: Groups) -> None:
            *weights, copies, verdict = staged
            try:
                if not verdict or bool(verdict[0]):
                    Motion(weights, moves, stages=self._live.stages).run()
                    self.copies.take_(copies)
            except BaseException as error:
                for average, tick in zip(self._averages, ticks, strict=True):
                    average.tear(tick, error)
                raise

        courier.send([*groups, copied, [] if ok is None else [ok]], arrived)
