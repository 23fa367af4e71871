"""Means of a part of the run: all of it, its last updates, its tail, or more of what is newer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from polyak._checks import is_number, require, require_count
from polyak.rules._rule import AVERAGE, START, Rule, Tick


@dataclass(frozen=True)
class Uniform(Rule):
    """The mean of all updates: `average <- average + (live - average) / n`.

    >>> Uniform().fractions(Tick(n=4, t=4.0, elapsed=1.0))
    {'average': 0.25}

    Noise gain 1/n, mean age (n - 1) / 2. SWA is `Uniform` updated once an epoch from 75 % of the
    budget; `Tail(Uniform(), start)` leaves out a burn-in.
    Source: Polyak and Juditsky 1992; SWA (arXiv 1803.05407).
    """

    def fractions(self, tick: Tick) -> dict[str, float]:
        return {AVERAGE: 1 / tick.n}


@dataclass(frozen=True)
class Window(Rule):
    """The mean of the last `size` updates (a simple moving average): `size` slots, one a live copy.

    fraction: 1 for slot (n - 1) mod size, the others stay; readout: the mean of the filled slots.
    `size` counts updates, so `Window(20)` updated once an epoch is LAWA of 20 epochs.

    >>> Window(3).slots, Window(3).readout(Tick(n=2, t=2.0, elapsed=1.0))
    (('window.0', 'window.1', 'window.2'), {'window.0': 0.5, 'window.1': 0.5})

    Raises `ValueError` unless `size` is an integer >= 1. Memory: `size` copies of the weights.
    Source: LAWA (arXiv 2209.14981).
    """

    size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("Window.size", self.size, "the number of updates to average")

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(f"window.{i}" for i in range(self.size))

    def fractions(self, tick: Tick) -> dict[str, float]:
        return {f"window.{(tick.n - 1) % self.size}": 1.0}

    def readout(self, tick: Tick) -> dict[str, float]:
        filled = min(tick.n, self.size)
        return {f"window.{i}": 1 / filled for i in range(filled)}


@dataclass(frozen=True, repr=False)
class Power(Rule):
    """Power-function average: a step at time s weighs (s/t)^gamma; the window grows with the run.

    fraction: `1 - (1 - elapsed / t) ** (gamma + 1)`. The weights are exactly
    (s^(gamma+1) - (s - elapsed)^(gamma+1)) / t^(gamma+1), so each cadence gives the same profile.

    Instead of gamma give `relative_std`, the standard deviation of the profile as a share of the
    run: s = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), 0 < s <= 0.300283.

    >>> Power(relative_std=0.1), round(Power(relative_std=0.1).gamma, 4)
    (Power(relative_std=0.1), 6.9372)

    Raises `ValueError` unless exactly one of gamma and relative_std is given; for gamma <= -1 or a
    relative_std out of range.
    Source: EDM2 (arXiv 2312.02696, section 3.1, algorithm 2).
    """

    INSTEAD: ClassVar = ("relative_std",)

    gamma: float = None  # type: ignore[assignment]  # computed where it is not given
    relative_std: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (s := self.relative_std) is not None:
            wanted = "0 < s <= 0.300283, the largest relative std of a power function"
            require(is_number(s) and 0 < s <= 0.300283, "Power.relative_std", s, wanted)
        self._compute_first(_largest_gamma)
        holds = is_number(self.gamma) and self.gamma > -1
        require(holds, "Power.gamma", self.gamma, "a finite number > -1")

    @classmethod
    def from_relative_std(cls, s: float) -> Power:
        """`Power(relative_std=s)`."""
        return cls(relative_std=s)

    def fractions(self, tick: Tick) -> dict[str, float]:
        if tick.elapsed >= tick.t:  # all the time so far
            return {AVERAGE: 1.0}
        return {AVERAGE: -math.expm1((self.gamma + 1) * math.log1p(-tick.elapsed / tick.t))}


@dataclass(frozen=True)
class Tail(Rule):
    """An inner rule that begins after time `start`; until then the average is the live weights.

    The inner rule has its own clock: the first update later than `start` is its first. Use it for
    `update_after_step`, a burn-in or suffix averaging.

    >>> tail, tick = Tail(Uniform(), start=2), START
    >>> for step in range(5):
    ...     tick = tail.tick(tick, 1.0)
    ...     print(tick.t, tail.fractions(tick)["average"])
    1.0 1.0
    2.0 1.0
    3.0 1.0
    4.0 0.5
    5.0 0.3333333333333333

    `start` is in units of time. Raises `ValueError` for a negative start.
    Source: Rakhlin et al. 2012 (arXiv 1109.5647), suffix averaging.
    """

    rule: Rule
    start: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.rule, Rule), "Tail.rule", self.rule, "a rule, such as Uniform()")
        holds = is_number(self.start) and self.start >= 0
        require(holds, "Tail.start", self.start, "a finite number >= 0, in units of time")

    @property
    def slots(self) -> tuple[str, ...]:
        return self.rule.slots

    def tick(self, before: Tick, elapsed: float) -> Tick:
        begun = before.inner if before.t > self.start else None
        inner = self.rule.tick(begun or START, elapsed)
        return Tick(before.n + 1, before.t + elapsed, elapsed, inner)

    def fractions(self, tick: Tick) -> dict[str, float]:
        return self.rule.fractions(tick.inner or START)

    def readout(self, tick: Tick) -> dict[str, float]:
        return self.rule.readout(tick.inner or START)

    def convex_readout(self, tick: Tick) -> dict[str, float]:
        return self.rule.convex_readout(tick.inner or START)


def _largest_gamma(s: float) -> float:
    """The largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2), by Viete's formula."""
    if s < 1e-9:  # to all digits; the cube of 1 / s may overflow
        return 1 / s - 3
    a, b, c = 7.0, 16 - s**-2, 12 - s**-2
    q = (a * a - 3 * b) / 9
    r = (2 * a**3 - 9 * a * b + 27 * c) / 54
    angle = math.acos(max(-1.0, min(1.0, r / q**1.5)))
    return -2 * math.sqrt(q) * math.cos((angle + 2 * math.pi) / 3) - a / 3
