"""Decay schedules: the weight of the old average as a function of time.

A schedule is a number that changes: `schedule(t)` is the decay per unit of time at time `t`, the
time *after* the update (1 at the first update of a loop that counts steps). An update that spans
`elapsed` units of time uses `schedule(t) ** elapsed`: a coarser cadence keeps the half-life.

>>> ramp = Ratio(max_decay=0.999)
>>> [round(ramp(t), 3) for t in (1, 2, 10, 100_000)]
[0.1, 0.182, 0.526, 0.999]

Any rule that takes a decay takes a schedule: `Exponential(Ratio(max_decay=0.999))`.
This module, `rules` and `specs` are arithmetic on floats: no torch, no numpy.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields

from polyak._checks import is_number, require, require_decay, require_positive


class Spec:
    """A frozen dataclass whose `str` is its spec: `name(first, option=value)`, defaults left out.

    >>> str(InversePower(power=0.75))
    'inverse_power(power=0.75)'
    """

    @classmethod
    def spec_name(cls) -> str:
        """The class's name in a spec: `InversePower` -> `inverse_power`."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    def __str__(self) -> str:
        parts = []
        for field in fields(self):  # type: ignore[arg-type]  # every Spec is a dataclass
            value = getattr(self, field.name)
            if field.default is MISSING:
                parts.append(str(value))
            elif value != field.default:
                parts.append(f"{field.name}={value}")
        return f"{self.spec_name()}({', '.join(parts)})"


class Schedule(Spec, ABC):
    """What every schedule is: a frozen dataclass, called with a time, that answers with a decay."""

    @abstractmethod
    def __call__(self, t: float) -> float:
        """The decay per unit of time, in [0, 1], at time `t` > 0 (1 at the first update)."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The same decay at all times: `decay(t) = decay`.

    >>> Constant(0.99)(1), Constant(0.99)(1e6)
    (0.99, 0.99)

    Raises `ValueError` for a decay outside [0, 1).
    """

    decay: float

    def __post_init__(self) -> None:
        require_decay("Constant.decay", self.decay)

    def __call__(self, t: float) -> float:
        return self.decay


def inverse_power(since: float, inv_gamma: float, power: float) -> float:
    """`1 - (1 + since / inv_gamma) ** -power`: the ramp of `InversePower` before it is clamped."""
    below_one: float = (1 + since / inv_gamma) ** -power
    return 1 - below_one


@dataclass(frozen=True)
class InversePower(Schedule):
    """`decay(t) = 1 - (1 + (t - 1) / inv_gamma) ** -power`, clamped to [min_decay, max_decay].

    `inv_gamma` is in units of time. With inv_gamma 1: power 2/3 reaches .999 at t = 31.6 K and .9999
    at 1 M; power 3/4 at 10 K and 215.4 K; power 1 is the uniform mean exactly. With power 1 it is
    polynomial averaging (`Polynomial`) of exponent inv_gamma - 1.

    >>> schedule = InversePower(power=2 / 3)
    >>> schedule(1), round(schedule(31_623), 6), round(schedule(1e6 + 1), 6)
    (0.0, 0.999, 0.9999)

    Source: K. Crowson, k-diffusion, `EMAWarmup`; the founding article's class.
    """

    inv_gamma: float = 1.0
    power: float = 2 / 3
    min_decay: float = 0.0
    max_decay: float = 1.0

    def __post_init__(self) -> None:
        require_positive("InversePower.inv_gamma", self.inv_gamma)
        require_positive("InversePower.power", self.power)
        require_decay("InversePower.min_decay", self.min_decay, one=True)
        require_decay("InversePower.max_decay", self.max_decay, one=True)
        bounds = (self.min_decay, self.max_decay)
        require(bounds[0] <= bounds[1], "InversePower (min_decay, max_decay)", bounds, "min <= max")

    def __call__(self, t: float) -> float:
        decay = inverse_power(max(t - 1, 0.0), self.inv_gamma, self.power)
        return min(max(decay, self.min_decay), self.max_decay)


@dataclass(frozen=True)
class Ratio(Schedule):
    """`decay(t) = min(max_decay, (1 + n) / (10 + n))` with n = t - 1.

    While it ramps it weighs a step at time s by about s^8: the mean age is a tenth of the time
    trained so far, and the ramp ends at n = (10 max_decay - 1) / (1 - max_decay).

    >>> Ratio(0.999)(1), Ratio(0.999)(2), Ratio(0.999)(1e6)
    (0.1, 0.18181818181818182, 0.999)

    Source: TensorFlow, `ExponentialMovingAverage(num_updates=...)`; also torch_ema, diffusers.
    """

    max_decay: float

    def __post_init__(self) -> None:
        require_decay("Ratio.max_decay", self.max_decay)

    def __call__(self, t: float) -> float:
        n = max(t - 1, 0.0)
        return min(self.max_decay, (1 + n) / (10 + n))


@dataclass(frozen=True)
class Cosine(Schedule):
    """`decay(t) = end - (end - start) * (cos(pi k / steps) + 1) / 2` with k = t - 1, at most `steps`.

    It rises from `start` to `end`; at `end` = 1 the average no longer moves.

    >>> ramp = Cosine(0.996, steps=100)
    >>> ramp(1), round(ramp(51), 4), ramp(101), ramp(1000)
    (0.996, 0.998, 1.0, 1.0)

    Source: BYOL (arXiv 2006.07733, section 3.3), DINO (arXiv 2104.14294).
    """

    start: float
    steps: float
    end: float = 1.0

    def __post_init__(self) -> None:
        require_decay("Cosine.start", self.start)
        require_positive("Cosine.steps", self.steps)
        require_decay("Cosine.end", self.end, one=True)

    def __call__(self, t: float) -> float:
        k = min(max(t - 1, 0.0), self.steps)
        return self.end - (self.end - self.start) * (math.cos(math.pi * k / self.steps) + 1) / 2


@dataclass(frozen=True)
class HalfLifeRamp(Schedule):
    """`decay(t) = 0.5 ** (1 / min(half_life, ratio * t))`: a half-life that grows with the run.

    While it ramps it is a power average of exponent ln 2 / ratio - 1 (6.7 at ratio .09).

    >>> ramp = HalfLifeRamp(half_life=1000, ratio=0.1)
    >>> ramp(10), ramp(1e9) == 0.5 ** (1 / 1000)
    (0.5, True)

    Source: EDM (arXiv 2206.00364, ratio .05) and EDM2 (arXiv 2312.02696, ratio .09), where time
    counts images. Units of `half_life`: those of time.
    """

    half_life: float
    ratio: float = 0.09

    def __post_init__(self) -> None:
        require_positive("HalfLifeRamp.half_life", self.half_life)
        require_positive("HalfLifeRamp.ratio", self.ratio)

    def __call__(self, t: float) -> float:
        half_life = min(self.half_life, self.ratio * t)
        # A half-life of next to nothing is rounded to 0: then nothing is kept.
        decay: float = 0.5 ** (1 / half_life) if half_life > 0 else 0.0
        return decay


@dataclass(frozen=True)
class AnytimeTail(Schedule):
    """An average of about the last `fraction` of all steps, at every time, with one copy.

    `decay(t) = c (t-1) / (1 + c (t-1)) * (1 - sqrt((1-c) / (t (t-1))) / c)`, c = fraction; until
    t (t-1) >= (1-c) / c^2 it is the uniform mean, (t-1) / t. On white noise of variance s^2 the
    average's variance is s^2 / (c t) at every t, that of a mean of the last c t steps.

    >>> AnytimeTail(0.5)(1), round(AnytimeTail(0.5)(100), 4)
    (0.0, 0.9663)

    Source: Le Roux, Anytime Tail Averaging (arXiv 1902.05083), the growing exponential average.
    """

    fraction: float

    def __post_init__(self) -> None:
        holds = is_number(self.fraction) and 0 < self.fraction < 1
        require(holds, "AnytimeTail.fraction", self.fraction, "a number in (0, 1)")

    def __call__(self, t: float) -> float:
        c, before = self.fraction, max(t - 1, 0.0)
        if t * before * c * c < 1 - c:
            return before / t
        return c * before / (1 + c * before) * (1 - math.sqrt((1 - c) / (t * before)) / c)


@dataclass(frozen=True)
class Polynomial(Schedule):
    """`decay(t) = 1 - (exponent + 1) / (t + exponent)`: polynomial-decay averaging.

    It weighs a step at time s by about s^exponent; exponent 0 is the uniform mean.

    >>> [round(Polynomial(3)(t), 3) for t in (1, 2, 10)]
    [0.0, 0.2, 0.692]

    Source: Shamir and Zhang 2013 (arXiv 1212.1824, section 4), where the exponent is eta.
    """

    exponent: float = 3.0

    def __post_init__(self) -> None:
        holds = is_number(self.exponent) and self.exponent >= 0
        require(holds, "Polynomial.exponent", self.exponent, "a finite number >= 0")

    def __call__(self, t: float) -> float:
        return max(1 - (self.exponent + 1) / (t + self.exponent), 0.0)


SCHEDULES: tuple[type[Schedule], ...] = (
    Constant, InversePower, Ratio, Cosine, HalfLifeRamp, AnytimeTail, Polynomial,
)  # fmt: skip
