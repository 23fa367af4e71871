"""Figures of any study: effects, half-lives, schedules, and time to a target."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from polyak.rules import LIVE
from polyak.study import _figures as charts
from polyak.study._comparisons import performance_profile, profile_score, time_to_target
from polyak.study._curves import lines
from polyak.study._effects import Effects, half_lives
from polyak.study._page import Figure
from polyak.study._result import Result
from polyak.study._statistics import Interval, known
from polyak.study._study import Arm
from polyak.study._text import Table, between, file_name, significant

LIMITS = tuple(float(v) for v in np.linspace(1, 4, 31))


def forests(effects: Effects) -> tuple[Figure, ...]:
    """The gains of all arms under each schedule."""
    return tuple(_forest(effects, schedule) for schedule in effects.study.schedules)


def by_half_life(effects: Effects) -> tuple[Figure, ...]:
    """The test value over the half-life in % of the run, for the largest family of rules."""
    shares = _family(effects.result)
    if len(shares) < 2:
        return ()
    made = (_by_half_life(effects, schedule, shares) for schedule in effects.study.schedules)
    return tuple(figure for figure in made if figure)


def by_schedule(effects: Effects) -> tuple[Figure, ...]:
    """The gain of the best arm under each schedule; nothing for a single schedule."""
    chosen = {s: arm for s in effects.study.schedules if (arm := effects.best(s))}
    if len(chosen) < 2:
        return ()
    gains = {f"{s}: {arm}": _scaled(effects, effects.gain(arm, s)) for s, arm in chosen.items()}
    table = _intervals(
        "by_schedule", "Gain of the best arm under each schedule", "schedule: arm", gains
    )
    chart = charts.forest(gains, _axis(effects), "schedule: best arm")
    largest = max(gains, key=lambda name: gains[name].estimate)
    words = (
        f"The gain is largest under {largest}: {between(gains[largest], _short)}{_unit(effects)}."
        f"{charts.cut_off(gains, _short)}"
    )
    caption = "Gain of the arm that validation chose under each schedule, with its 95 % interval. Right of 0 it is better."
    return (Figure("by_schedule", chart, caption, words, table),)


def speed(effects: Effects) -> tuple[Figure, ...]:
    """Performance profiles of the time to the live weights' last validation value, over seeds and schedules."""
    times = _times(effects)
    if not any(math.isfinite(t) for each in times.values() for t in each):
        return ()
    shares = performance_profile(times, LIMITS)
    ranked = sorted(times, key=lambda arm: -float(shares[arm].mean()))
    shown = [LIVE, *[arm for arm in ranked if arm != LIVE][: charts.MOST_SERIES - 1]]
    rows: charts.Rows = [
        {"x": round(limit, 1), "curve": arm, "middle": float(value)}
        for arm in shown
        for limit, value in zip(LIMITS, shares[arm], strict=True)
    ]
    caption = (
        "Share of the runs (a seed under a schedule) in which an arm reaches the target within so many times the fastest "
        "arm's steps. The target is the live weights' median validation value at the last step."
    )
    figure = lines(
        "speed",
        rows,
        "share of runs that reach the target",
        caption,
        "times the fastest arm's steps",
    )
    return (figure,)


def scores(effects: Effects) -> dict[str, float]:
    """arm -> the area under its performance profile up to 4 times the fastest arm's steps."""
    times = _times(effects)
    best = np.min(list(times.values()), axis=0)
    return {
        arm: profile_score([t / b if math.isfinite(t) else math.inf for t, b in zip(own, best, strict=True)])
        for arm, own in times.items()
    }  # fmt: skip


def _times(effects: Effects) -> dict[str, list[float]]:
    return {
        arm: [t for s in effects.study.schedules for t in times_to_target(effects, arm, s)]
        for arm in effects.study.arm_names
    }


def times_to_target(effects: Effects, arm: str, schedule: str) -> list[float]:
    """By seed, the first evaluated step at which an arm is as good as the live weights at last, in median."""
    seeds = effects.result.seeds
    last = [seed.value(LIVE, effects.metric, schedule, part="validation") for seed in seeds]
    numbers = known(last)
    target = float(np.median(numbers)) if numbers else math.nan
    return [
        time_to_target(
            seed.curve(arm, effects.metric, schedule),
            seed.steps(arm, schedule),
            target,
            effects.lower,
        )
        for seed in seeds
    ]


def _forest(effects: Effects, schedule: str) -> Figure:
    gains = {
        effect.arm: _scaled(effects, effect.gain)
        for effect in effects.of(schedule)
        if effect.gain.seeds
    }
    better = [name for name, gain in gains.items() if gain.low > 0]
    worse = [name for name, gain in gains.items() if gain.high < 0]
    name = f"gains_{file_name(schedule)}"
    table = _intervals(name, f"Gain over the live weights: {schedule}", "arm", gains)
    caption = (
        "Mean paired gain over the live weights at the last step, on the test part, with its 95 % interval. Right of 0 "
        "the arm is better. A hollow point: the interval holds 0."
    )
    words = f"Better: {len(better)} of {len(gains)}; worse: {len(worse)}.{charts.cut_off(gains, _short)}"
    chart = charts.forest(gains, _axis(effects), f"arm: {schedule}")
    return Figure(name, chart, caption, words, table)


def _by_half_life(effects: Effects, schedule: str, shares: Mapping[str, float]) -> Figure | None:
    points = {100 * share: effects.mean(arm, schedule) for arm, share in shares.items()}
    points = {share: value for share, value in points.items() if value.seeds}
    if not points:
        return None
    live = effects.mean(LIVE, schedule)
    name, title = f"half_life_{file_name(schedule)}", f"{effects.metric} on test: {schedule}"
    rows = [(f"{share:.3g} %", between(value)) for share, value in sorted(points.items())]
    table = Table(
        name,
        f"{title}, by half-life",
        ("half-life, % of the run", "mean [95 % interval]"),
        (*rows, ("live weights", between(live))),
    )
    best = (min if effects.lower else max)(points, key=lambda share: points[share].estimate)
    caption = (
        "Mean over seeds with its 95 % interval. Dashed line and band: the live weights. No point was chosen here by "
        "validation, so the best one looks a little better than it is."
    )
    words = f"The best of these is {best:.3g} % of the run: {between(points[best])}; live weights {between(live)}."
    chart = charts.ladder(points, live, "half-life, % of the run", title)
    return Figure(name, chart, caption, words, table)


def _family(result: Result) -> dict[str, float]:
    """The arms of the largest family with their half-lives: one kind of rule, the same in all else."""
    families: dict[tuple[object, ...], dict[str, float]] = {}
    for name, share in half_lives(result).items():
        arm = result.study.arms[name]
        if isinstance(arm, Arm) and share > 0:
            key = type(arm.rule), arm.every, arm.start, arm.recalibrate
            families.setdefault(key, {})[name] = share
    return max(families.values(), key=len, default={})


def _intervals(name: str, title: str, first: str, values: Mapping[str, Interval]) -> Table:
    rows = tuple((label, between(value, _short)) for label, value in values.items())
    return Table(name, title, (first, "mean [95 % interval]"), rows)


def _short(value: float) -> str:
    return significant(value, 3)


def _scaled(effects: Effects, gain: Interval) -> Interval:
    """A gain in % where it is a share."""
    return gain.map(lambda value: 100 * value) if effects.is_share else gain


def _axis(effects: Effects) -> str:
    return f"gain in {effects.metric}{', %' if effects.is_share else ''}"


def _unit(effects: Effects) -> str:
    return " %" if effects.is_share else ""
