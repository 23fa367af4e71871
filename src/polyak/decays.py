"""Decay schedules: the weight of the old average as a function of time.

A schedule is a number that changes. `schedule(t)` is the decay per unit of time at time `t`, the
time *after* the update: 1 at the first update of a loop that counts steps. An update that spans
`elapsed` units of time uses `schedule(t) ** elapsed`, so a coarser cadence keeps the half-life.

>>> ramp = Ratio(max_decay=0.999)
>>> [round(ramp(t), 3) for t in (1, 2, 10, 100_000)]
[0.1, 0.182, 0.526, 0.999]

Each rule that takes a decay takes a schedule: `Exponential(Ratio(max_decay=0.999))`.
A new schedule is a frozen dataclass here and one line in `SCHEDULES` at the end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from polyak._checks import is_number, require, require_decay, require_not_negative, require_positive
from polyak._spelling import Spec

__all__ = [
    "SCHEDULES", "AnytimeTail", "Constant", "Cosine", "HalfLifeRamp", "InversePower",
    "Polynomial", "Ratio", "Schedule", "Told", "inverse_power", "rate_of",
]  # fmt: skip


class Schedule(Spec, ABC):
    """The base of all schedules: a frozen dataclass that is called with a time and gives a decay.

    At decay 0 an update copies. At decay 1 the average stays as it is.
    """

    @abstractmethod
    def __call__(self, t: float) -> float:
        """The decay per unit of time, in [0, 1], at time `t` > 0 (1 at the first update)."""

    def rate(self, t: float) -> float:
        """`-ln decay(t)`: an update over `elapsed` moves by `1 - exp(-rate elapsed)`.

        A decay next to 1 has lost the digits of its distance from 1: at decay 1 - 1e-15, one digit
        is left. Schedules that come so near to 1 compute the rate without the decay.
        """
        if (decay := self(t)) == 0:
            return math.inf
        # A decay below 0 or NaN gives a fraction of NaN, which is refused with the rule's name.
        return -math.log(decay) if decay > 0 else math.nan


def rate_of(lost: float) -> float:
    """Compute the rate of a decay of `1 - lost`: `-ln(1 - lost)`, to all digits."""
    return -math.log1p(-lost) if lost < 1 else math.inf


@dataclass(frozen=True)
class Constant(Schedule):
    """The same decay at all times: `decay(t) = decay`.

    >>> Constant(0.99)(1), Constant(0.99)(1e6)
    (0.99, 0.99)

    Raises `ValueError` for a decay outside [0, 1].
    """

    CHECKS: ClassVar = {"decay": require_decay}

    decay: float

    def __call__(self, t: float) -> float:
        return self.decay


def inverse_power(since: float, inv_gamma: float, power: float) -> float:
    """Compute `1 - (1 + since / inv_gamma) ** -power`: the ramp of `InversePower` before it is clamped."""
    below_one: float = (1 + since / inv_gamma) ** -power
    return 1 - below_one


@dataclass(frozen=True)
class InversePower(Schedule):
    """`decay(t) = 1 - (1 + (t - 1) / inv_gamma) ** -power`, clamped to [min_decay, max_decay].

    `inv_gamma` is in units of time. With inv_gamma 1, power 2/3 reaches .999 at t = 31.6 K and
    .9999 at 1 M; power 3/4 reaches them at 10 K and 215.4 K. Power 1 is then the uniform mean. With
    power 1 and another inv_gamma it is `Polynomial` of exponent inv_gamma - 1.

    >>> schedule = InversePower(power=2 / 3)
    >>> schedule(1), round(schedule(31_623), 6), round(schedule(1e6 + 1), 6)
    (0.0, 0.999, 0.9999)

    Raises `ValueError` unless inv_gamma > 0, power > 0 and 0 <= min_decay <= max_decay <= 1.
    Source: K. Crowson, k-diffusion, `EMAWarmup`; the founding article's class.
    """

    CHECKS: ClassVar = {"inv_gamma": require_positive, "power": require_positive}

    inv_gamma: float = 1.0
    power: float = 2 / 3
    min_decay: float = 0.0
    max_decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay("InversePower.min_decay", self.min_decay)
        require_decay("InversePower.max_decay", self.max_decay)
        bounds = (self.min_decay, self.max_decay)
        require(bounds[0] <= bounds[1], "InversePower (min_decay, max_decay)", bounds, "min <= max")

    def __call__(self, t: float) -> float:
        decay = inverse_power(max(t - 1, 0.0), self.inv_gamma, self.power)
        return min(max(decay, self.min_decay), self.max_decay)

    def rate(self, t: float) -> float:
        lost = (1 + max(t - 1, 0.0) / self.inv_gamma) ** -self.power
        return rate_of(min(max(lost, 1 - self.max_decay), 1 - self.min_decay))


@dataclass(frozen=True)
class Ratio(Schedule):
    """`decay(t) = min(max_decay, (1 + n) / (10 + n))` with n = t - 1.

    While it ramps, it weighs a step at time s by about s^8, so the mean age is a tenth of the time
    trained so far. The ramp ends at n = (10 max_decay - 1) / (1 - max_decay).

    >>> Ratio(0.999)(1), Ratio(0.999)(2), Ratio(0.999)(1e6)
    (0.1, 0.18181818181818182, 0.999)

    Raises `ValueError` for a max_decay outside [0, 1].
    Source: TensorFlow, `ExponentialMovingAverage(num_updates=...)`; also torch_ema, diffusers.
    """

    CHECKS: ClassVar = {"max_decay": require_decay}

    max_decay: float

    def __call__(self, t: float) -> float:
        n = max(t - 1, 0.0)
        return min(self.max_decay, (1 + n) / (10 + n))

    def rate(self, t: float) -> float:
        return rate_of(max(1 - self.max_decay, 9 / (10 + max(t - 1, 0.0))))


@dataclass(frozen=True)
class Cosine(Schedule):
    """`decay(t) = end - (end - start) * (cos(pi k / steps) + 1) / 2` with k = t - 1, at most `steps`.

    >>> ramp = Cosine(0.996, steps=100)
    >>> ramp(1), round(ramp(51), 4), ramp(101), ramp(1000)
    (0.996, 0.998, 1.0, 1.0)

    At `end` = 1 the average stays as it is. Raises `ValueError` unless steps > 0 and start and end
    are in [0, 1].
    Source: BYOL (arXiv 2006.07733, section 3.3), DINO (arXiv 2104.14294).
    """

    CHECKS: ClassVar = {"start": require_decay, "steps": require_positive, "end": require_decay}

    start: float
    steps: float
    end: float = 1.0

    def __call__(self, t: float) -> float:
        k = min(max(t - 1, 0.0), self.steps)
        return self.end - (self.end - self.start) * (math.cos(math.pi * k / self.steps) + 1) / 2

    def rate(self, t: float) -> float:
        # (cos x + 1) / 2 = sin^2((pi - x) / 2), which keeps its digits where it is next to 0.
        left = 1 - min(max(t - 1, 0.0), self.steps) / self.steps
        share = math.sin(math.pi * left / 2) ** 2
        return rate_of(1 - self.end + (self.end - self.start) * share)


@dataclass(frozen=True)
class HalfLifeRamp(Schedule):
    """`decay(t) = 0.5 ** (1 / min(half_life, ratio * t))`: a half-life that grows with the run.

    While it ramps, it is a power average of exponent ln 2 / ratio - 1 (6.7 at ratio .09).

    >>> ramp = HalfLifeRamp(half_life=1000, ratio=0.1)
    >>> ramp(10), ramp(1e9) == 0.5 ** (1 / 1000)
    (0.5, True)

    `half_life` is in units of time. Raises `ValueError` unless both are above 0.
    Source: EDM (arXiv 2206.00364, ratio .05), EDM2 (arXiv 2312.02696, ratio .09); t counts images.
    """

    CHECKS: ClassVar = {"half_life": require_positive, "ratio": require_positive}

    half_life: float
    ratio: float = 0.09

    def __call__(self, t: float) -> float:
        half_life = min(self.half_life, self.ratio * t)
        decay: float = 0.5 ** (1 / half_life) if half_life > 0 else 0.0  # tiny ones round to 0
        return decay

    def rate(self, t: float) -> float:
        half_life = min(self.half_life, self.ratio * t)
        return math.log(2) / half_life if half_life > 0 else math.inf


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


@dataclass(frozen=True)
class Told(Schedule):
    """A decay that your training sets: `decay(t) = d` after `tell(d)`, `start` before the first.

    Use it if your training computes the decay. Files do not store the decay: set it again after a
    resume. Theory uses its present value.

    >>> momentum = Told(0.996)
    >>> momentum(1)
    0.996
    >>> momentum.tell(0.999)
    >>> momentum(2), print(momentum)
    told(0.996)
    (0.999, None)

    Raises `ValueError` for a decay outside [0, 1].
    """

    start: float
    _last: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tell(self.start)

    def tell(self, decay: float) -> None:
        """Sets the decay of the updates that follow."""
        self._set("_last", require_decay("Told decay", decay))

    def __call__(self, t: float) -> float:
        return self._last


SCHEDULES: tuple[type[Schedule], ...] = (
    Constant, InversePower, Ratio, Cosine, HalfLifeRamp, AnytimeTail, Polynomial, Told,
)  # fmt: skip
