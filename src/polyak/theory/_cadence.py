"""How seldom an average may be updated before that changes what it averages."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from polyak._checks import as_number, is_number, require
from polyak.rules import Rule
from polyak.specs import as_rule
from polyak.theory._long import Horizon, copies, horizon, mean_age_at, profile_at
from polyak.theory._measures import mean_age
from polyak.theory._profiles import Profile, checked_steps, coefficients, profile

_GROWING = 10_000
_LEAST = 1e-3  # the least error that a long average is asked for: it takes 68 / error updates


def cadence(rule: Rule | str, *, error: float = 0.01, steps: int | None = None) -> int:
    """Find the largest `every` that displaces the average's profile by at most `error`.

    The displacement is the mean distance, in steps, by which weight moves along the run: the
    Wasserstein distance `sum_i |C_every[i] - C_1[i]|` of the cumulative profiles, as a share of the
    mean age. It is about every / (2 mean age), read out just after an update. `Exponential` and
    `Power` rescale by the elapsed time, so the half-life stays; `Window`, `Bema` and `ArticleEMA`
    count updates. (A rule that extrapolates, `Bema`, has coefficients below 0. There
    `sum |c| age`, which never cancels, is used for the mean age.)

    >>> cadence("exponential(0.999)"), cadence("exponential(0.9999)")
    (21, 201)
    >>> cadence("exponential(0.999)", error=0.05)
    102

    White noise averages out less well by the same factor: an average of few updates has few terms.
    Weights of neighbouring steps differ little, so that is seldom seen (arXiv 2411.18704 finds no
    difference at every=16). `Window` counts updates, so any larger cadence changes it: the answer
    is 1. `steps` is when the average is read; by default once the start is forgotten, or 10 000
    where the window grows with the run.

    Raises `ValueError` unless 0 < error < 1 and 1 <= steps <= 10^8; and without `steps` for an error
    below 0.001 of an average that needs more than 2^18 steps, and for a rule that only copies for 10 000.
    """
    rule, error = as_rule(rule), as_number(error)
    holds = is_number(error) and 0 < error < 1
    require(holds, "error", error, "a share of the mean age in (0, 1)")
    where = horizon(rule) if steps is None else None
    if where is None:
        most = checked_steps(_GROWING if steps is None else steps, every=1)[0]
        if steps is None and not copies(rule) and not profile(rule, most)[:-1].any():
            raise ValueError(
                f"{rule} still copies the live weights after {most} steps, and begins to average later: pass "
                "steps=, the number of steps after which the average is read"
            )
        return _largest(lambda every: displacement(rule, most, every=every) <= error, 1, most)
    if where.unit > 1:
        return _of_long(rule, where, error)
    fine = profile(rule, where.steps)

    def within(every: int) -> bool:
        # The start is forgotten, so the last steps of one profile are the profile of fewer steps.
        steps = _updated(where.steps, every)
        return _displaced(fine[-steps:], profile(rule, steps, every=every), every) <= error

    return _largest(within, 1, where.steps)


def displacement(rule: Rule | str, steps: int, *, every: int) -> float:
    """Compute how far updating every `every` steps moves the profile, as a share of the mean age.

    `sum_i |C_every[i] - C_1[i]| / sum_i |c_1[i]| age_i`, C the cumulative profile c: the divisor is
    the mean age where no coefficient is below 0. Read out just after the last update within `steps`.

    >>> round(displacement("exponential(0.99)", 2000, every=2), 4)
    0.005
    >>> displacement("exponential(0.99)", 2000, every=1)
    0.0

    Infinite where the mean age is 0, for any `every` but 1. Raises `ValueError` unless
    `every` and `steps` are integers from 1 to 10^8.
    """
    steps, every = checked_steps(steps, every)
    steps = _updated(steps, every)
    return _displaced(profile(rule, steps), profile(rule, steps, every=every), every)


def _updated(steps: int, every: int) -> int:
    """The step of the last update within `steps`."""
    return steps - (steps - 1) % every


def _displaced(fine: Profile, coarse: Profile, every: int) -> float:
    """The distance between two profiles, as a share of the mean age of the fine one."""
    moved = float(np.abs(np.cumsum(coarse - fine)).sum())
    age = float(np.abs(fine) @ np.arange(len(fine) - 1, -1, -1))
    if age == 0:
        return 0.0 if every == 1 else float("inf")
    return moved / age


def _of_long(rule: Rule, where: Horizon, error: float) -> int:
    """The cadence of a long average: all weight moves to newer steps, so the mean ages say how far."""
    require(
        error >= _LEAST, "error", error, f"{_LEAST} or more of so long an average; or pass steps"
    )
    ages = [
        mean_age_at(profile_at(rule, Horizon(where.steps, unit), 1)[0], unit, 1)
        for unit in (where.unit, 2 * where.unit)
    ]
    # The error of a stretch is of second order in its length: two lengths cancel it.
    age = (4 * ages[0] - ages[1]) / 3

    def within(every: int) -> bool:
        updates = where.steps // every
        return 1 - every * mean_age(coefficients(rule, [every] * updates)) / age <= error

    return _largest(within, math.ceil(age * error), where.steps)


def _largest(within: Callable[[int], bool], low: int, most: int) -> int:
    """The largest number up to `most` within a limit; `low` is within it."""
    high = 2 * low
    while high <= most and within(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle <= most and within(middle) else (low, middle)
    return low
