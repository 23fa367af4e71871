"""Rules: what an average is. Each average is two lines of linear algebra; only the scalars differ.

    update :  slot    <- lerp(slot, live, fraction)      for each slot that moves
    readout:  average  = sum of coefficient * slot       coefficients sum to 1; "live" may be a term

A rule gives the scalars. Its clock is a `Tick`, and each update makes the next one:

    tick = rule.tick(tick, elapsed)      n updates so far, the time t after the last, its elapsed time
    rule.fractions(tick)                 {slot: fraction}; slots without a fraction stay
    rule.readout(tick)                   {slot or "live": coefficient}

A fraction of 1 is a copy. The first move of a slot is a copy, so a slot needs no initial value.
A rule sees floats, never a tensor. The averager applies it to the weights of a model, `theory`
applies it to unit impulses, so training and theory cannot disagree.

>>> rule = Exponential(0.75)
>>> first = rule.tick(START, 1.0)
>>> rule.fractions(first), rule.fractions(rule.tick(first, 1.0)), rule.readout(first)
({'average': 1.0}, {'average': 0.25}, {'average': 1.0})

A new rule is one frozen dataclass here and one line in `RULES` at the end. A rule of your own is a
frozen dataclass that derives from `Rule`; its first updates are checked, and each of its fractions. Files
hold it by its text, so its fields are numbers, rules and schedules; else its class sets `SAVABLE = False`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, cast

from polyak._checks import (
    is_number,
    require,
    require_count,
    require_decay,
    require_flag,
    require_positive,
)
from polyak._spelling import Spec
from polyak.decays import Schedule, inverse_power, rate_of

__all__ = [
    "AVERAGE", "LIVE", "RULES", "START", "ArticleEMA", "Bema", "Exponential", "Power", "Rule",
    "Tail", "Tick", "Uniform", "Window", "convex",
]  # fmt: skip

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


@dataclass(frozen=True)
class Bema(Rule):
    """Bias-corrected EMA: `average + alpha (live - anchor)`; the anchor is the first live weights.

    The first update takes the anchor. With s the time since then: fraction (rho + gamma s)^-kappa,
    alpha = (rho + gamma s)^-eta. The term in alpha takes out the lag of the average. The fraction
    does not depend on the elapsed time: the paper updates every 400 steps, with s in steps.
    Running statistics are the slot `average` alone.

    TRL's `BEMACallback(update_freq, lag, multiplier, update_after)` takes its anchor at step
    `update_after`, and its clock is the trainer's step even then. So the same average is
    `Bema(gamma=multiplier, rho=lag + multiplier * update_after)`, with its first update at step
    `update_after` (before training where that is 0) and one every `update_freq` steps after it.

    >>> rule = Bema()
    >>> tick = rule.tick(rule.tick(START, 1.0), 400.0)
    >>> {slot: round(c, 4) for slot, c in rule.readout(tick).items()}
    {'average': 1.0, 'live': 0.3002, 'anchor': -0.3002}
    >>> rule.convex_readout(tick)
    {'average': 1.0}

    Raises `ValueError` unless rho >= 1, gamma > 0 and the powers are >= 0.
    Source: Block and Zhang, BEMA (arXiv 2508.00180), the form of the paper and of TRL.
    """

    kappa: float = 0.5
    eta: float = 0.2
    gamma: float = 1.0
    rho: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kappa", "eta"):
            power = getattr(self, name)
            require(is_number(power) and power >= 0, f"Bema.{name}", power, "a finite number >= 0")
        require_positive("Bema.gamma", self.gamma)
        holds = is_number(self.rho) and self.rho >= 1
        require(holds, "Bema.rho", self.rho, "a number >= 1: below it, a fraction exceeds 1")

    @property
    def slots(self) -> tuple[str, ...]:
        return (AVERAGE, "anchor")

    def tick(self, before: Tick, elapsed: float) -> Tick:
        since = START if before.inner is None else super().tick(before.inner, elapsed)
        return super().tick(before, elapsed)._replace(inner=since)

    def fractions(self, tick: Tick) -> dict[str, float]:
        if tick.n == 1:
            return {AVERAGE: 1.0, "anchor": 1.0}
        return {AVERAGE: self._decayed(tick, self.kappa)}

    def readout(self, tick: Tick) -> dict[str, float]:
        alpha = self._decayed(tick, self.eta)
        return {AVERAGE: 1.0, LIVE: alpha, "anchor": -alpha}

    def convex_readout(self, tick: Tick) -> dict[str, float]:
        return {AVERAGE: 1.0}

    def _decayed(self, tick: Tick, power: float) -> float:
        since = (tick.inner or START).t
        decayed: float = (self.rho + self.gamma * since) ** -power
        return decayed


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


@dataclass(frozen=True)
class ArticleEMA(Rule):
    """The founding article's class `EMA` (and ema-pytorch's) as a rule; time counts its calls.

    It copies up to call update_after_step + 1. Then `average <- beta_t average + (1 - beta_t) live`,
    beta_t = 1 - (1 + e / inv_gamma)^-power clamped to [min_value, beta], e = t - update_after_step - 1.
    beta_t is the decay of one averaging call: update_every does not rescale it. The article's class
    also copies at its first averaging call; ema-pytorch does not (`first_copy=False`).

    >>> rule = ArticleEMA(beta=0.999, update_after_step=100)
    >>> [round(rule.fractions(Tick(n, n, 1))["average"], 4) for n in (101, 102, 103, 10**6)]
    [1.0, 1.0, 0.4807, 0.001]

    Raises `ValueError` for beta or min_value outside [0, 1], min_value > beta, an
    update_after_step that is not an integer >= 0, a first_copy that is not a bool.
    Source: the founding article, section 2.3; ema-pytorch 0.8.3 (MIT).
    """

    beta: float = 0.9999
    update_after_step: int = 100
    inv_gamma: float = 1.0
    power: float = 2 / 3
    min_value: float = 0.0
    first_copy: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay("EMA beta", self.beta)
        require_decay("EMA min_value", self.min_value)
        bounds = (self.min_value, self.beta)
        require(bounds[0] <= bounds[1], "EMA (min_value, beta)", bounds, "min_value <= beta")
        require_positive("EMA inv_gamma", self.inv_gamma)
        require_positive("EMA power", self.power)
        require_count("EMA update_after_step", self.update_after_step, least=0)
        require_flag("EMA first_copy", self.first_copy, "whether the first averaging call copies")

    def decay(self, call: float) -> float:
        """beta_t at a call (from 1), and 0 up to call update_after_step + 1."""
        since = call - self.update_after_step - 1
        if since <= 0:
            return 0.0
        ramp = inverse_power(since, self.inv_gamma, self.power)
        return min(max(ramp, self.min_value), self.beta)

    def fractions(self, tick: Tick) -> dict[str, float]:
        newest_copy = tick.t - tick.elapsed if self.first_copy else tick.t
        copies = tick.n == 1 or newest_copy <= self.update_after_step + 1
        return {AVERAGE: 1.0 if copies else 1 - self.decay(tick.t)}


def convex(coefficients: dict[str, float]) -> dict[str, float]:
    """Coefficients without those below 0: `max(c, 0) / sum of max(c, 0)`; as they are without such.

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


def _largest_gamma(s: float) -> float:
    """The largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2), by Viete's formula."""
    a, b, c = 7.0, 16 - s**-2, 12 - s**-2
    q = (a * a - 3 * b) / 9
    r = (2 * a**3 - 9 * a * b + 27 * c) / 54
    angle = math.acos(max(-1.0, min(1.0, r / q**1.5)))
    return -2 * math.sqrt(q) * math.cos((angle + 2 * math.pi) / 3) - a / 3


RULES: tuple[type[Rule], ...] = (
    Exponential, Power, Uniform, Window, Bema, Tail, ArticleEMA,
)  # fmt: skip
