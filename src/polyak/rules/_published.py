"""Rules that one paper or one program defines: BEMA, and the founding article's class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from polyak._checks import (
    is_number,
    require,
    require_count,
    require_decay,
    require_flag,
    require_not_negative,
    require_positive,
)
from polyak.decays import inverse_power
from polyak.rules._rule import AVERAGE, LIVE, START, Rule, Tick


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

    CHECKS: ClassVar = {
        "kappa": require_not_negative,
        "eta": require_not_negative,
        "gamma": require_positive,
    }

    kappa: float = 0.5
    eta: float = 0.2
    gamma: float = 1.0
    rho: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
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
