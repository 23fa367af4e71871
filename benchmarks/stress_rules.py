"""Rules for the stress command, and what each must average, by formulas that share no code with polyak.

A new rule is one line of `RULES`. A rule of a user's own that is wrong says at which update it may no
longer go unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from polyak import Bema, Exponential, Power, Rule, Tail, Uniform, Window, decays, theory
from polyak.rules import START, ArticleEMA, Tick

Vector = npt.NDArray[np.float64]


class Fault(Exception):  # noqa: N818
    """A law that does not hold: its name, and what was seen."""

    def __init__(self, law: str, seen: str) -> None:
        super().__init__(f"{law}: {seen}")
        self.law = law


@dataclass(frozen=True)
class Blend(Rule):
    """A user's rule: the mean of two exponential averages."""

    fast: float = 0.5
    slow: float = 0.9

    @property
    def slots(self) -> tuple[str, ...]:
        return ("fast", "slow")

    def fractions(self, tick: Tick) -> dict[str, float]:
        if tick.n == 1:
            return {"fast": 1.0, "slow": 1.0}
        return {"fast": 1 - self.fast, "slow": 1 - self.slow}

    def readout(self, tick: Tick) -> dict[str, float]:  # noqa: ARG002
        return {"fast": 0.5, "slow": 0.5}


@dataclass(frozen=True)
class Wrong(Rule):
    """A user's rule that gives this fraction from update `since` on, and this coefficient."""

    SAVABLE: ClassVar = False

    fraction: float = 0.5
    coefficient: float = 1.0
    since: int = 2

    def fractions(self, tick: Tick) -> dict[str, float]:
        return {"average": 1.0 if tick.n < self.since else self.fraction}

    def readout(self, tick: Tick) -> dict[str, float]:  # noqa: ARG002
        return {"average": self.coefficient}


@dataclass(frozen=True)
class RuleCase:
    """A rule, and the update by which a wrong one must have been refused (0: it is right)."""

    rule: Rule
    wrong: int = 0

    @property
    def own(self) -> bool:
        """Whether it is a user's rule, which has no spec that parses back."""
        rule = self.rule
        while isinstance(rule, Tail):
            rule = rule.rule
        return isinstance(rule, (Blend, Wrong))


PLAIN = False
"""Whether numbers are Python's own alone, to look behind a fault that every other program shows."""


def number(random: Random, value: float) -> Any:
    """The same number, as one of the types in which users have theirs."""
    makers: list[Callable[[float], Any]] = [float, np.float64, np.float32, torch.tensor]
    if value == int(value):
        makers += [int, np.int64, np.int32]
    makers += [lambda v: v] * 12
    made = random.choice(makers)(value)
    return value if PLAIN else made


def count(random: Random, value: int) -> Any:
    """The same integer, as one of the types in which users have theirs."""
    made = random.choice([int, int, int, int, np.int64, np.int32])(value)
    return value if PLAIN else made


def _tail(random: Random) -> Rule:
    return Tail(draw(random, nested=True).rule, number(random, random.choice([0, 1, 2, 3.5, 5])))


RULES: tuple[Callable[[Random], RuleCase], ...] = (
    lambda r: RuleCase(Exponential(number(r, r.choice([0.0, 0.5, 0.75, 0.875, 0.998046875])))),
    lambda r: RuleCase(Exponential(number(r, r.choice([0.5, 0.875])), debias=True)),
    lambda r: RuleCase(Exponential.from_half_life(number(r, r.choice([1, 2.5, 1000])))),
    lambda _: RuleCase(Exponential(decays.Ratio(0.75))),
    lambda _: RuleCase(Exponential(decays.InversePower(2.0, 0.75, 0.125, 0.875))),
    lambda _: RuleCase(Exponential(decays.Cosine(0.5, steps=12))),
    lambda _: RuleCase(Exponential(decays.HalfLifeRamp(8.0, ratio=0.25))),
    lambda r: RuleCase(Power(number(r, r.choice([-0.25, 0, 1, 7])))),
    lambda r: RuleCase(Power.from_relative_std(r.choice([0.05, 0.1, 0.25]))),
    lambda _: RuleCase(Uniform()),
    lambda r: RuleCase(Window(count(r, r.choice([1, 2, 3, 5])))),
    lambda _: RuleCase(Bema()),
    lambda r: RuleCase(Bema(kappa=0.75, eta=number(r, r.choice([0, 0.25])), gamma=2.0, rho=1.0)),
    lambda r: RuleCase(_tail(r)),
    lambda r: RuleCase(ArticleEMA(0.875, r.choice([0, 2, 4]), first_copy=r.random() < 0.5)),
    lambda _: RuleCase(Blend()),
)  # fmt: skip

WRONG: tuple[RuleCase, ...] = (
    RuleCase(Wrong(fraction=1.5), 2),
    RuleCase(Wrong(fraction=-0.25), 2),
    RuleCase(Wrong(fraction=math.nan), 2),
    RuleCase(Wrong(fraction=math.inf), 2),
    RuleCase(Wrong(fraction=0.5, since=1), 1),
    RuleCase(Wrong(coefficient=0.5), 2),
    RuleCase(Wrong(coefficient=1.25), 2),
    RuleCase(Wrong(coefficient=math.nan), 2),
)


def draw(random: Random, *, nested: bool = False) -> RuleCase:
    """A rule, now and then one that must be refused."""
    if not nested and random.random() < 0.02:
        return random.choice(WRONG)
    return random.choice(RULES)(random)


def ticks(rule: Rule, times: Sequence[float]) -> Tick:
    """The rule's clock after updates that span these times."""
    tick = START
    for time in times:
        tick = rule.tick(tick, time)
    return tick


@lru_cache(maxsize=4096)
def coefficients(rule: Rule, times: tuple[float, ...]) -> tuple[Vector, float]:
    """The coefficient of every update's weights, by `polyak.theory`; and of the weights at the readout.

    Raises `Fault` unless the formulas below say the same.
    """
    live = rule.readout(ticks(rule, times)).get("live", 0.0)
    sampled = np.array(theory.coefficients(rule, times))
    if (plain := plain_profile(rule, times)) is not None:
        difference = float(np.abs(plain - sampled).max())
        if not difference < 1e-9:
            raise Fault(
                "theory", f"the profile of {rule} at times {times} is off by {difference:.2g}"
            )
    sampled[-1] -= live
    return sampled, live


def without_extrapolation(rule: Rule, times: tuple[float, ...]) -> Vector:
    """The coefficients with which running statistics are averaged: those of the slots that average."""
    inner, since = _inner(rule, times)
    if not isinstance(inner, Bema):
        return sum_of(coefficients(rule, times))
    result = np.zeros(len(times))
    result[since:] = _bema_average(inner, times[since:])
    return result


def sum_of(both: tuple[Vector, float]) -> Vector:
    """Coefficients with the weights at the readout counted as those of the last update."""
    result = both[0].copy()
    result[-1] += both[1]
    return result


def _inner(rule: Rule, times: tuple[float, ...]) -> tuple[Rule, int]:
    """The rule inside all tails, and the update with which it began."""
    if not isinstance(rule, Tail):
        return rule, 0
    ends = np.cumsum(times)
    late = np.flatnonzero(ends > float(rule.start))
    begun = int(late[0]) if len(late) else len(times) - 1
    inner, since = _inner(rule.rule, times[begun:])
    return inner, begun + since


def plain_profile(rule: Rule, times: tuple[float, ...]) -> Vector | None:
    """The coefficients of a rule of the library by the formula of its page; None for a user's rule."""
    inner, since = _inner(rule, times)
    formula = FORMULAS.get(type(inner))
    if formula is None:
        return None
    result = np.zeros(len(times))
    result[since:] = formula(inner, times[since:])
    return result


def _folded(fractions: Sequence[float]) -> Vector:
    """What is left of each copy after the moves that followed it."""
    weights = np.zeros(len(fractions))
    for i, fraction in enumerate(fractions):
        weights *= 1 - fraction
        weights[i] += fraction
    return weights


def _exponential(rule: Exponential, times: tuple[float, ...]) -> Vector:
    ends = np.cumsum(times)
    if isinstance(rule.decay, decays.Schedule):
        moves = [1 - rule.decay(t) ** dt for t, dt in zip(ends, times, strict=True)]
        return _folded([1.0, *moves[1:]])
    decay = float(rule.decay)
    if rule.debias and decay > 0:
        spans = np.array([1 - decay**dt for dt in times])
        weights: Vector = spans * decay ** (ends[-1] - ends) / (1 - decay ** ends[-1])
        return weights
    return _folded([1.0, *(1 - decay**dt for dt in times[1:])])


def _power(rule: Power, times: tuple[float, ...]) -> Vector:
    ends, g = np.cumsum(times), float(rule.gamma) + 1
    result: Vector = np.diff(np.concatenate([[0.0], (ends / ends[-1]) ** g]))
    return result


def _window(rule: Window, times: tuple[float, ...]) -> Vector:
    result = np.zeros(len(times))
    result[-int(rule.size) :] = 1 / min(len(times), int(rule.size))
    return result


def _since(times: tuple[float, ...]) -> Vector:
    """The time from the first update, which takes the anchor, to each."""
    ends: Vector = np.cumsum(times) - times[0]
    return ends


def _bema_average(rule: Bema, times: tuple[float, ...]) -> Vector:
    moves = (rule.rho + rule.gamma * _since(times)) ** -float(rule.kappa)
    return _folded([1.0, *moves[1:]])


def _bema(rule: Bema, times: tuple[float, ...]) -> Vector:
    result = _bema_average(rule, times)
    alpha = (rule.rho + rule.gamma * _since(times)[-1]) ** -float(rule.eta)
    result[-1] += alpha
    result[0] -= alpha
    return result


def _article(rule: ArticleEMA, times: tuple[float, ...]) -> Vector:
    fractions, before = [], 0.0
    for i, call in enumerate(np.cumsum(times)):
        since = call - rule.update_after_step - 1
        decay = 0.0
        if since > 0:
            ramp = 1 - (1 + since / rule.inv_gamma) ** -rule.power
            decay = min(max(ramp, rule.min_value), rule.beta)
        first = rule.first_copy and before <= rule.update_after_step + 1
        fractions.append(1.0 if i == 0 or first else 1 - decay)
        before = call
    return _folded(fractions)


FORMULAS: dict[type[Rule], Callable[[Any, tuple[float, ...]], Vector]] = {
    Exponential: _exponential,
    Power: _power,
    Uniform: lambda _, times: np.full(len(times), 1 / len(times)),
    Window: _window,
    Bema: _bema,
    ArticleEMA: _article,
}
