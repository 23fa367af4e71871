"""The contract of a rule, which turns a clock into fractions and coefficients; and the EMA."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, cast

from polyak._checks import is_number, require, require_decay, require_flag, require_positive
from polyak._spelling import Spec
from polyak.decays import Schedule, rate_of

LIVE = "live"
AVERAGE = "average"


class Tick(NamedTuple):
    """The clock at an update: its number, the time after it, the time since the update before.

    Time is in the unit of `elapsed`: steps, samples, tokens. `inner` is a second clock that a rule
    keeps: that of a wrapped rule, or of the time since an anchor was taken.
    """

    n: int
    t: float
    elapsed: float
    inner: Tick | None = None


START = Tick(0, 0.0, 0.0)


class Rule(Spec, ABC):
    """The base of all rules: a frozen dataclass that turns a clock into fractions and coefficients."""

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of the stored tensors per weight; by default one, `average`."""
        return (AVERAGE,)

    def tick(self, before: Tick, elapsed: float) -> Tick:
        """The clock at the next update, `elapsed` > 0 units of time after the one `before`."""
        return Tick(before.n + 1, before.t + elapsed, elapsed)

    @abstractmethod
    def fractions(self, tick: Tick) -> dict[str, float]:
        """How far each slot moves to the live weights at an update; slots without a fraction stay."""

    def readout(self, tick: Tick) -> dict[str, float]:
        """The coefficients of slots (and of `live`) in the average after an update; they sum to 1."""
        return {AVERAGE: 1.0}

    def convex_readout(self, tick: Tick) -> dict[str, float]:
        """The coefficients for running statistics: none below 0, sum 1.

        A readout with a coefficient below 0 extrapolates, and an extrapolated variance can be
        negative. So running statistics (of BatchNorm) are read out with these coefficients: by
        default those of `readout`, without the ones below 0 and divided by their sum.
        """
        return convex(self.readout(tick))


@dataclass(frozen=True, repr=False)
class Exponential(Rule):
    """Exponential moving average: `average <- decay average + (1 - decay) live`.

    fraction: `1 - decay ** elapsed`, and 1 at the first update. With `debias`, Adam's correction of
    a zero start is a fraction too: `(1 - decay ** elapsed) / (1 - decay ** t)`. With a schedule
    (`polyak.decays`) the decay is `schedule(t)`.

    Instead of the decay give `half_life`, the time in which the weight of a step halves,
    `decay = 2 ** (-1 / half_life)`; or `span`, the length of the plain mean with the same mean age
    and noise gain, `decay = 1 - 2 / (span + 1)`. The rule keeps what was typed, so that a half-life
    of 1e15 steps is exact, although its decay rounds to 1.

    Mean age decay / (1 - decay), noise gain (1 - decay) / (1 + decay). Decay 0 keeps the newest weights,
    decay 1 the first ones, or with `debias` its limit, the mean of all.

    >>> Exponential(0.999), Exponential(half_life=1000)
    (Exponential(decay=0.999), Exponential(half_life=1000))
    >>> round(Exponential(half_life=1000).decay, 6), Exponential(span=19).decay
    (0.999307, 0.9)

    Raises `ValueError` unless exactly one of decay, half_life and span is given; for a decay
    outside [0, 1], a half_life that is not above 0, a span below 1, a debias that is not a bool,
    debias with a schedule.
    Source: Ruppert 1988, Polyak and Juditsky 1992; debias: Adam (arXiv 1412.6980, section 3).
    """

    INSTEAD: ClassVar = ("half_life", "span")

    decay: float | Schedule = None  # type: ignore[assignment]  # computed where it is not given
    half_life: float | None = field(default=None, kw_only=True)
    span: float | None = field(default=None, kw_only=True)
    debias: bool = False
    _rate: float | None = field(init=False, repr=False, compare=False)
    _once: float | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag("Exponential.debias", self.debias, "whether to correct for a start at zero")
        if self.half_life is not None:
            require_positive("Exponential.half_life", self.half_life)
        if self.span is not None:
            holds = is_number(self.span) and self.span >= 1
            require(holds, "Exponential.span", self.span, "a finite number >= 1")
        self._compute_first(lambda steps: 0.5 ** (1 / steps), lambda n: 1 - 2 / (n + 1))
        if not isinstance(self.decay, Schedule):
            require_decay("Exponential.decay", self.decay)
        elif self.debias:
            wanted = "a constant decay: a schedule is its own warm-up, so leave out debias"
            require(False, "Exponential.decay with debias=True", str(self.decay), wanted)
        self._set("_rate", self._constant_rate())
        typed = isinstance(self.decay, int | float) and not (self.debias or self._instead())
        self._set("_once", 1.0 - cast(float, self.decay) if typed else None)

    @classmethod
    def from_half_life(cls, steps: float, *, debias: bool = False) -> Exponential:
        """`Exponential(half_life=steps)`."""
        return cls(half_life=steps, debias=debias)

    @classmethod
    def from_span(cls, n: float, *, debias: bool = False) -> Exponential:
        """`Exponential(span=n)`."""
        return cls(span=n, debias=debias)

    def fractions(self, tick: Tick) -> dict[str, float]:
        if tick.n == 1:
            return {AVERAGE: 1.0}
        if tick.elapsed == 1 and self._once is not None:
            return {AVERAGE: self._once}  # what other libraries use, to the last bit
        rate = cast(Schedule, self.decay).rate(tick.t) if self._rate is None else self._rate
        lost = -math.expm1(-rate * tick.elapsed)
        return {AVERAGE: _debiased(lost, rate, tick) if self.debias else lost}

    def _constant_rate(self) -> float | None:
        """`-ln decay`, from what was typed; None with a schedule."""
        if self.half_life is not None:
            return math.log(2) / self.half_life
        if self.span is not None:
            return rate_of(2 / (self.span + 1))
        return None if isinstance(self.decay, Schedule) else rate_of(1 - self.decay)


def convex(coefficients: dict[str, float]) -> dict[str, float]:
    """Leave out coefficients below 0: `max(c, 0) / sum of max(c, 0)`; unchanged if there are none.

    >>> convex({"fast": 2.0, "slow": -1.0}), convex({"a": 0.25, "b": 0.75})
    ({'fast': 1.0}, {'a': 0.25, 'b': 0.75})
    """
    kept = {slot: c for slot, c in coefficients.items() if c >= 0}
    if len(kept) == len(coefficients):
        return coefficients
    total = sum(kept.values())
    return {slot: c / total for slot, c in kept.items()}


def _debiased(lost: float, rate: float, tick: Tick) -> float:
    """`(1 - decay ** elapsed) / (1 - decay ** t)`, the first given as `lost`.

    Both are computed from the rate: of a decay next to 1 the difference from 1 would be 0 / 0.
    """
    received = -math.expm1(-rate * tick.t)
    # Times of 1e-300 vanish altogether: the limit is the share of the time.
    return lost / received if received > 0 else tick.elapsed / tick.t
