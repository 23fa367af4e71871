"""Rules and schedules of a user, as a module of theirs defines them."""

from __future__ import annotations

from dataclasses import dataclass

from polyak.decays import Schedule
from polyak.rules import AVERAGE, LIVE, Rule, Tick


@dataclass(frozen=True)
class HalfWay(Rule):
    """A mean of the newest weights and an average of two slots."""

    share: float
    inner: Rule | None = None

    @property
    def slots(self) -> tuple[str, ...]:
        return (AVERAGE, "slow")

    def fractions(self, tick: Tick) -> dict[str, float]:
        first = tick.n == 1
        return {AVERAGE: 1.0 if first else self.share, "slow": 1.0 if first else self.share / 2}

    def readout(self, tick: Tick) -> dict[str, float]:  # noqa: ARG002
        return {AVERAGE: 0.5, "slow": 0.25, LIVE: 0.25}


@dataclass(frozen=True)
class Stairs(Schedule):
    """A decay that halves its distance from 1 every `length` of time."""

    length: float = 4.0

    def __call__(self, t: float) -> float:
        left: float = 0.5 ** (t // self.length)
        return 1 - left
