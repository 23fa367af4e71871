"""The rule of one family that equals another average in one measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from polyak.rules import Exponential, Power, Rule, Window
from polyak.specs import as_rule
from polyak.theory._long import SHORT, Horizon, horizon
from polyak.theory._measures import mean_age, noise_gain
from polyak.theory._profiles import Profile, checked_steps, coefficients, profile

# A family is searched along the logarithm of a span. Along it the logarithms of these measures are
# nearly straight lines, so that interpolation lands at once.
_FAMILIES: dict[type[Rule], Callable[[float], Rule]] = {
    Exponential: lambda x: Exponential(span=math.exp(x)),
    Window: lambda x: Window(round(math.exp(x))),
    Power: lambda x: Power(math.expm1(x)),
}
# Both are measured on steps or on stretches of steps alike, but for a factor that all rules share.
_MEASURES: dict[str, Callable[[Profile], float]] = {
    "mean_age": lambda c: mean_age(c) + 0.5,
    "noise_gain": noise_gain,
}
_EQUAL = 1e-12


def match(
    family: type[Rule], *, like: Rule | str, by: str = "mean_age", steps: int | None = None
) -> Rule:
    """Find the member of a family that equals another average in one measure after `steps` steps.

    Families: `Exponential` (its span), `Window` (its size, the nearest integer), `Power` (its
    gamma >= 0). Measures: "mean_age" (the same lag) and "noise_gain" (the same calm). Without
    `steps`: after enough steps for both to have forgotten their start. Both are measured on profiles.

    >>> match(Window, like=Exponential(0.99))
    Window(size=199)
    >>> round(match(Exponential, like=Window(100), by="noise_gain").decay, 9)
    0.98019802
    >>> round(match(Power, like="tail(uniform(), start=500)", steps=1000).gamma, 3)
    2.0

    Takes about ten profiles: with `steps` of a million, half a minute. Raises `ValueError` for
    another family or measure, where no member matches, and, without `steps`, where a window grows
    with the run.
    """
    like = as_rule(like)
    _require_known(family, by)
    if steps is None:
        where = _far_enough(family, like)
    else:
        where = Horizon(checked_steps(steps, every=1)[0])
    member, times = _FAMILIES[family], [float(where.unit)] * (where.steps // where.unit)
    measure = _MEASURES[by]
    wanted = measure(coefficients(like, times))

    @cache
    def gap(rule: Rule) -> float:
        return math.log(measure(coefficients(rule, times)) / wanted)

    def gap_at(x: float) -> float:
        whole = family is not Window or where.unit == 1
        return gap(member(x)) if whole else _between(gap, x, where.unit)

    longest = math.log(where.steps if family is Window else 1000 * where.steps)
    ends = _bracket(gap_at, longest) if wanted > 0 else None
    if ends is None:
        hint = "take another family or measure"
        after = f"after {where.steps} steps"
        raise ValueError(f"no {family.__name__} has the {by} of {like} {after}: {hint}")
    found = min(_root(gap_at, *ends), key=lambda x: abs(gap_at(x)))
    return member(found)


def _require_known(family: type[Rule], by: str) -> None:
    if family not in _FAMILIES:
        names = ", ".join(each.__name__ for each in _FAMILIES)
        got = family.__name__ if isinstance(family, type) else repr(family)
        raise ValueError(f"family is {got}, wanted one of the rule classes {names}")
    if by not in _MEASURES:
        raise ValueError(f"by is {by!r}, wanted one of {', '.join(map(repr, _MEASURES))}")


def _far_enough(family: type[Rule], like: Rule) -> Horizon:
    """Enough steps for both averages to forget their start: e^-34 of it or less is left."""
    where = None if family is Power else horizon(like)
    if where is None:
        grows = "a power average" if family is Power else like
        raise ValueError(
            f"{grows} changes with the number of steps: its window grows with the run, or needs more"
            f" than {SHORT:,} updates; pass steps=, the number of steps after which to compare"
        )
    if where.unit > 1:
        return where
    return Horizon(max(where.steps, math.ceil(40 * mean_age(profile(like, where.steps)))))


def _between(gap: Callable[[Rule], float], x: float, unit: int) -> float:
    """The gap of a window of any size, between those of whole numbers of stretches."""
    size = max(math.exp(x) / unit, 1.0)
    low = int(size)
    share = math.log(size / low) / math.log((low + 1) / low)
    return (1 - share) * gap(Window(low)) + share * gap(Window(low + 1))


def _bracket(gap: Callable[[float], float], longest: float) -> tuple[float, float] | None:
    """The first two ends, from 0 up, between which the gap changes its sign; None if it never does.

    From 0 up, because a very long EMA is all start, and noisy again.
    """
    low, high = 0.0, min(abs(gap(0.0)) + 0.1, longest)
    while gap(low) * gap(high) > 0:
        if high == longest:
            return None
        low, high = high, min(high + abs(gap(high)) + 0.1, longest)
    return low, high


def _root(gap: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """The ends of a bracket of the root, closed to 1e-12; or one place twice, where the gap is 1e-12.

    Regula falsi. The end that stays counts for half (Illinois), so that neither stays for good.
    """
    gaps = {low: gap(low), high: gap(high)}
    for x, value in gaps.items():
        if abs(value) < _EQUAL:
            return x, x
    gap_low, gap_high = gaps.values()
    while high - low > _EQUAL:
        x = (low * gap_high - high * gap_low) / (gap_high - gap_low)
        value = gap(x)
        if abs(value) < _EQUAL:
            return x, x
        if (value > 0) == (gap_high > 0):
            high, gap_high, gap_low = x, value, gap_low / 2
        else:
            low, gap_low, gap_high = x, value, gap_high / 2
    return low, high
