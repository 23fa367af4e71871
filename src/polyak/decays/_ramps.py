"""Schedules that rise while a run is short."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from polyak._checks import require, require_decay, require_positive
from polyak.decays._schedule import Schedule, rate_of


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
