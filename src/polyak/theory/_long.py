"""Profiles of long averages in stretches of many steps, where one number a step would be too many.

A rule that rescales by the elapsed time has the same profile at every cadence, summed over
stretches. So it is run on a coarse clock, and the steps of a stretch are taken to share its
coefficient evenly. With thousands of stretches to a half-life the measures are right to 1e-7.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from polyak.rules import Rule
from polyak.theory._measures import mean_age
from polyak.theory._profiles import Profile, coefficients, profile, stretches

SHORT = 2**18
"""The most steps for which a profile has one number for each step."""

_SHORTEST, _LONGEST = 1000, 2**60
_UNCHANGED = 1e-9  # of the mean age: then the spread, too, is within 1e-6 of its limit
_COARSE = 2**12  # stretches to find the length of an average
_FINE = (2**17, 2**20)  # and to measure it; the more where it is short against its start


class Horizon(NamedTuple):
    """After how many steps to look at an average, and in stretches of how many: 1 is every step.

    If more than 1, or if `horizon` chose it, the last step is an update.
    """

    steps: int
    unit: int = 1


def horizon(rule: Rule, *, every: int = 1) -> Horizon | None:
    """Enough steps for the start to be forgotten; None where no number up to 2^60 is found.

    Then the window grows with the run; or the rule needs more than 2^18 steps and does not rescale
    by the elapsed time, as a `Window` of a million, so that it cannot be run on a coarse clock.

    >>> from polyak.specs import parse
    >>> horizon(parse("exponential(0.99)"))
    Horizon(steps=4000, unit=1)
    >>> horizon(parse("exponential(half_life=1e9)"))
    Horizon(steps=137438953472, unit=1048576)
    """
    if steps := _settled(rule, every):
        return Horizon(steps)
    steps = 2 * every
    while steps < 2 * SHORT:
        steps *= 2
    while steps <= _LONGEST and not _forgotten(rule, steps, every):
        steps *= 4
    units = [max(steps // n, every) for n in _FINE] if steps <= _LONGEST else []
    ends = steps - every + 1
    return next((Horizon(ends, u) for u in units if _rescales(rule, ends, u, every)), None)


def _settled(rule: Rule, every: int) -> int | None:
    """Steps after which twice as many leave the mean age unchanged; None if it takes more than `SHORT`.

    A mean age of 0 does not count: it is the live weights, which may be a burn-in (`Tail`).
    """
    updates = -(-_SHORTEST // every)
    age = _age_after(rule, updates, every)
    while updates * every < SHORT:
        later = _age_after(rule, 2 * updates, every)
        if age > 0 and math.isclose(age, later, rel_tol=_UNCHANGED):
            late = every * mean_age(_late(rule, 2 * updates, every))
            return last_step(updates, every) if math.isclose(age, late, rel_tol=1e-6) else None
        updates, age = 2 * updates, later
    return None


def last_step(updates: int, every: int) -> int:
    """The step of the last of this many updates."""
    return (updates - 1) * every + 1


def _age_after(rule: Rule, updates: int, every: int) -> float:
    return mean_age(profile(rule, last_step(updates, every), every=every))


def copies(rule: Rule, *, every: int = 1) -> bool:
    """Whether a rule that never settles is a plain copy of the live weights, however late."""
    return mean_age(_late(rule, 2, every)) == 0


def _late(rule: Rule, updates: int, every: int) -> Profile:
    """The coefficients of this many updates, `every` steps apart, after a stretch of 2^50 of them."""
    return coefficients(rule, [1, every * 2**50, *[every] * updates])


def profile_at(rule: Rule, where: Horizon, every: int) -> tuple[Profile, float]:
    """The profile in stretches of `unit` steps, and the coefficient of the first update."""
    if where.unit > 1:
        return stretches(rule, where.steps, unit=where.unit, every=every)
    c = profile(rule, where.steps, every=every)
    return c, float(c[0])


def mean_age_at(c: Profile, unit: int, every: int) -> float:
    """The mean age in steps: the updates of a stretch, `every` steps apart, share it evenly."""
    return mean_age(c) if unit == 1 else unit * (mean_age(c) + 0.5) - every / 2


def _forgotten(rule: Rule, steps: int, every: int) -> bool:
    """Whether half as many steps, and very many, give the same mean age, on one coarse clock."""
    unit = max(steps // _COARSE, every)
    ends = [n - every + 1 for n in (steps, steps // 2)]
    ages = [mean_age(stretches(rule, n, unit=unit, every=every)[0]) for n in ends]
    if not (ages[1] > 0 and math.isclose(*ages, rel_tol=1e-6)):
        return False
    return math.isclose(ages[0], mean_age(_late(rule, _COARSE, unit)), rel_tol=1e-6)


def _rescales(rule: Rule, steps: int, unit: int, every: int) -> bool:
    """Whether clocks of two units find the same mean age: the rule rescales by the elapsed time.

    With a stretch for every update, there is nothing to rescale.
    """
    if unit == every:
        return True
    ages = [
        mean_age_at(stretches(rule, steps, unit=each, every=every)[0], each, every)
        for each in (unit, 2 * unit)
    ]
    return math.isclose(*ages, rel_tol=1e-6)
