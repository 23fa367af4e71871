"""Updating: when slots move, and whether a call counts.

The plain case, without guards and offload, is the hot path: `call`, `_move` and `_update` do nothing
else for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from polyak import _tensors as tensors
from polyak._checks import require_count
from polyak._engine.exchange import failure
from polyak._engine.guard import Verdict, finite, stepped
from polyak._engine.live import ModelTensors
from polyak._engine.moving import Motion, Move, undisturbed
from polyak._engine.offload import Courier, courier_for
from polyak._engine.slots import Average, named
from polyak._tensors import Groups
from polyak.rules import Tick

Nonfinite = Literal["allow", "skip", "error"]
_TICK = attrgetter("tick")
_COUNT = attrgetter("tick.n")
_START = 0, 0.0


class _Moment(NamedTuple):
    """The clock between two calls: calls and time since the last update, each average's tick."""

    calls: int
    elapsed: float
    ticks: tuple[Tick, ...]


class _Pending(NamedTuple):
    """A masked update whose verdicts the host does not know yet, and the moments to go back to."""

    stepped: Verdict | None
    finite: Verdict | None
    before: _Moment
    called: _Moment


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
        if nonfinite not in get_args(Nonfinite):
            raise ValueError(f'nonfinite is {nonfinite!r}, wanted "allow", "skip" or "error"')
        self.every = require_count("every", every, "calls per update")
        self.skipped = 0
        self.copies: list[Tensor] = []
        self._live = live
        self._averages = averages
        self._nonfinite = nonfinite
        self._device = device
        self._since = _START
        """Calls and time since the last update; one object, so that a signal finds both or neither."""
        self._pending: _Pending | None = None
        self._courier: Courier | None = None
        self._generation = -1
        self.replaced: Callable[[], object] | None = None
        """Called before an update of tensors that were found anew; raises to refuse them."""

    def call(self, elapsed: float, found_inf: Sequence[Tensor] = ()) -> None:
        """One call, `elapsed` after the last; `found_inf` is what a scaler left in the optimizers."""
        if self._pending is not None:
            self._hear()
        groups = self._live.groups()
        calls, time = self._since[0] + 1, self._since[1] + elapsed
        if found_inf or self._nonfinite != "allow":
            self._guarded_call(groups, calls, time, found_inf)
        elif calls < self.every and self._begun():
            self._since = calls, time
        else:
            self._update(groups, time)

    def _begun(self) -> bool:
        """Whether every average has had its first update, for which no call is too early."""
        return all(map(_COUNT, self._averages))

    def require_time_for(self, elapsed: float) -> None:
        """Raises `ValueError` if no float can hold the time after `elapsed`."""
        now = max(average.tick.t for average in self._averages) + self._since[1]
        if now + elapsed == float("inf"):
            raise ValueError(
                f"elapsed is {elapsed!r} at time {now!r}, and no float holds their sum: wanted a "
                "larger unit of time, such as epochs for samples"
            )

    def _guarded_call(
        self, groups: Groups, calls: int, time: float, found_inf: Sequence[Tensor]
    ) -> None:
        """A call that must not count if no optimizer stepped, or if weights are not finite."""
        before = self._moment()
        took = stepped(found_inf) if found_inf else None
        if took is not None and not _deferred(took) and not took:
            return
        called = before._replace(calls=calls, elapsed=time)
        due = calls >= self.every or not self._begun()
        clean = finite(groups) if due and self._nonfinite != "allow" else None
        if clean is not None and not _deferred(clean) and not clean:
            self._live.copied_now()  # an update that is left out refuses another model too
            self._refuse(called)
            return
        verdicts = [flag if flag is None else Verdict(flag) for flag in (took, clean)]
        self._pending = _Pending(verdicts[0], verdicts[1], before, called)
        if due:
            self._update(groups, time, _both(took, clean))
        else:
            self._since = calls, time

    def settle(self) -> None:
        """Waits for slots that still move, and for the verdict of the call before."""
        if self._courier is not None:
            self._courier.join()
        self._hear()
        if self._live.suspect:
            for average in self._averages:
                average.spoilt = average.spoilt or self._live.suspect
            self._live.suspect = ""

    def _hear(self) -> None:
        """Reads the verdicts of the call before, if there are any, and turns the clock back."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.stepped is not None and not pending.stepped.ask():
            self._back_to(pending.before)
        elif pending.finite is not None and not pending.finite.ask():
            self._refuse(pending.called)

    def state(self) -> dict[str, Any]:
        """Calls and time since the last update, and the copied tensors, as data."""
        copied = self._live.copied if self.copies else []
        return {
            "calls": self._since[0],
            "elapsed": self._since[1],
            "skipped": self.skipped,
            "copies": named(copied, self.copies),
        }

    def taken(
        self, calls: int, elapsed: float, skipped: int, copies: Mapping[str, Tensor]
    ) -> dict[str, object]:
        """The attributes of this object with copies of what `state` returned, which was checked."""
        like = self.copies or [item.local() for item in self._live.copied]
        filled = self._empty_copies(like) if copies else []
        if copies:
            tensors.lerp_(filled, [copies[item.name] for item in self._live.copied], 1.0)
        new: dict[str, object] = {"_since": (calls, elapsed), "skipped": skipped}
        return {**new, "copies": filled, "_pending": None}

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

        An exception that comes before slots have moved undoes it, and one that comes later lets it
        go on to its end. Where that fails too, it marks the averages; they can be read again once
        their slots are copied or loaded.
        """
        since, ticks, copies = self._since, tuple(map(_TICK, self._averages)), self.copies
        moves: list[Move] = []
        copied: list[Tensor] = []
        motion = None
        try:
            for average in self._averages:
                moves += average.advance(self._live, time)
            if self._live.copied:
                copied = self._copied_now()
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
                    self._copy(copied, ok)
            self._end()
        except BaseException as error:
            self._stopped(
                error, _Moment(*since, ticks), copies, motion, partial(self._copy, copied, ok)
            )
            if isinstance(error, RuntimeError):
                self._live.check("update")  # it names the tensor that has changed, if one has
            raise

    def _end(self) -> None:
        """What follows when all has moved."""
        self._since = _START
        for average in self._averages:
            average.moving = False
            if average.torn:
                average.mend()

    def _stopped(
        self,
        error: BaseException,
        before: _Moment,
        copies: list[Tensor],
        motion: Motion | None,
        copy: Callable[[], None],
    ) -> None:
        """After an exception: goes on to the end, or else back to the moment before."""

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
                self._back_to(before)
                self.copies, self._pending = copies, None
                for average in self._averages:
                    average.moving = False

    def _copied_now(self) -> list[Tensor]:
        """The tensors to copy, with copies of their shapes; raises what `copied_now` raises."""
        copied = self._live.copied_now()
        self.copies = self.copies or self._empty_copies(copied)
        pairs = list(zip(self.copies, copied, strict=True))
        if any(a.dtype != b.dtype for a, b in pairs):  # a copy in another dtype would be rounded
            self.copies = [a.to(b.dtype) for a, b in pairs]
        return copied

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
                    self._copy(copies, None)
            except BaseException as error:
                for average, tick in zip(self._averages, ticks, strict=True):
                    average.tear(tick, error)
                raise

        courier.send([*groups, copied, [] if ok is None else [ok]], arrived)

    def _copy(self, live: list[Tensor], ok: Tensor | None) -> None:
        if not live:
            return
        if ok is not None:
            pairs = zip(self.copies, live, strict=True)
            live = [torch.where(ok.to(b.device), b, a.to(b.device, b.dtype)) for a, b in pairs]
        tensors.lerp_(self.copies, live, 1.0)

    @torch.inference_mode(False)
    def _empty_copies(self, like: Sequence[Tensor]) -> list[Tensor]:
        return [torch.empty_like(t, device=self._device) for t in like]

    def _moment(self) -> _Moment:
        return _Moment(*self._since, tuple(map(_TICK, self._averages)))

    def _back_to(self, moment: _Moment) -> None:
        self._since = moment.calls, moment.elapsed
        for average, tick in zip(self._averages, moment.ticks, strict=True):
            average.back_to(tick)

    def _refuse(self, called: _Moment) -> None:
        """Leaves out an update of weights that are not finite; its time counts in the next one."""
        self._back_to(called._replace(calls=0))
        if self._nonfinite == "error":
            raise FloatingPointError(
                f"update: {self._culprits()} not finite; the average is unchanged. Correct the "
                'weights or the training, or leave such updates out with nonfinite="skip"'
            )
        self.skipped += 1

    def _culprits(self) -> str:
        named = (item for item in self._live.averaged if not item.local().isfinite().all())
        names = [item.name for item in named]
        return (
            f"{', '.join(names[:8])} {'are' if len(names) > 1 else 'is'}"
            if names
            else "weights were"
        )


def _deferred(flag: Tensor) -> bool:
    """Whether the host would have to wait for a flag."""
    return flag.device.type != "cpu"


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The flags that the host does not know yet, as one; None if there is nothing to mask."""
    open_flags = [flag for flag in (a, b) if flag is not None and _deferred(flag)]
    return (
        None
        if not open_flags
        else open_flags[0].logical_and(open_flags[-1].to(open_flags[0].device))
    )
