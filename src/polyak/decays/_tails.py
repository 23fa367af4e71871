"""Schedules that never stop rising: an average of a constant share of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from polyak._checks import is_number, require, require_not_negative
from polyak.decays._schedule import Schedule, rate_of


@dataclass(frozen=True)
class AnytimeTail(Schedule):
    """An average of about the last `fraction` of all steps, at every time, with one copy.

    `decay(t) = c (t-1) / (1 + c (t-1)) * (1 - sqrt((1-c) / (t (t-1))) / c)`, c = fraction. Until
    t (t-1) >= (1-c) / c^2 it is the uniform mean, (t-1) / t. On white noise of variance s^2, the
    variance of the average is s^2 / (c t) at every t, as for a mean of the last c t steps.

    >>> AnytimeTail(0.5)(1), round(AnytimeTail(0.5)(100), 4)
    (0.0, 0.9663)

    Raises `ValueError` for a fraction outside (0, 1).
    Source: Le Roux, Anytime Tail Averaging (arXiv 1902.05083), the growing exponential average.
    """

    fraction: float

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = is_number(self.fraction) and 0 < self.fraction < 1
        require(holds, "AnytimeTail.fraction", self.fraction, "a number in (0, 1)")

    def __call__(self, t: float) -> float:
        c, before = self.fraction, max(t - 1, 0.0)
        if t * before * c * c < 1 - c:
            return before / t
        return c * before / (1 + c * before) * (1 - math.sqrt((1 - c) / (t * before)) / c)

    def rate(self, t: float) -> float:
        c, before = self.fraction, max(t - 1, 0.0)
        if t * before * c * c < 1 - c:
            return rate_of(min(1 / t, 1.0))
        return rate_of((1 + math.sqrt((1 - c) * before / t)) / (1 + c * before))


@dataclass(frozen=True)
class Polynomial(Schedule):
    """`decay(t) = 1 - (exponent + 1) / (t + exponent)`: polynomial-decay averaging.

    It weighs a step at time s by about s^exponent. Exponent 0 is the uniform mean.

    >>> [round(Polynomial(3)(t), 3) for t in (1, 2, 10)]
    [0.0, 0.2, 0.692]

    Raises `ValueError` for an exponent below 0.
    Source: Shamir and Zhang 2013 (arXiv 1212.1824, section 4), where the exponent is eta.
    """

    CHECKS: ClassVar = {"exponent": require_not_negative}

    exponent: float = 3.0

    def __call__(self, t: float) -> float:
        return max(1 - (self.exponent + 1) / (t + self.exponent), 0.0)

    def rate(self, t: float) -> float:
        return rate_of((self.exponent + 1) / (t + self.exponent))
