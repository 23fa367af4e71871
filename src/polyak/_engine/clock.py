"""The clock of an averager: calls and time since the last update, and the tick of each average."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from polyak._engine.slots import Average
from polyak.rules import Tick

TICK = attrgetter("tick")
_COUNT = attrgetter("tick.n")
START = 0, 0.0


class Moment(NamedTuple):
    """The clock between two calls: calls and time since the last update, each average's tick."""

    calls: int
    elapsed: float
    ticks: tuple[Tick, ...]


class UpdateClock:
    """Where an averager is between its updates."""

    def __init__(self, averages: Sequence[Average]) -> None:
        self.since = START
        """Calls and time since the last update; one object, so that a signal finds both or neither."""
        self._averages = averages

    def begun(self) -> bool:
        """Whether every average has had its first update, for which no call is too early."""
        return all(map(_COUNT, self._averages))

    def now(self) -> Moment:
        """The moment to go back to."""
        return Moment(*self.since, tuple(map(TICK, self._averages)))

    def back_to(self, moment: Moment) -> None:
        """Turns the clock back, and drops the slots that were allocated since."""
        self.since = moment.calls, moment.elapsed
        for average, tick in zip(self._averages, moment.ticks, strict=True):
            average.back_to(tick)

    def require_time_for(self, elapsed: float) -> None:
        """Raises `ValueError` if no float can hold the time after `elapsed`."""
        now = max(average.tick.t for average in self._averages) + self.since[1]
        if now + elapsed == float("inf"):
            raise ValueError(
                f"elapsed is {elapsed!r} at time {now!r}, and a float cannot hold their sum: use a "
                "larger unit of time, such as epochs instead of samples"
            )
