"""Figures of any study: effects, half-lives and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from polyak.rules import LIVE
from polyak.study import _figures as charts
from polyak.study._effects import Effects, half_lives
from polyak.study._page import Figure
from polyak.study._result import Result
from polyak.study._statistics import Interval
from polyak.study._study import Arm
from polyak.study._text import Table, between, file_name, significant


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
    gains = {f"{s}: {arm}": effects.gain(arm, s) for s, arm in chosen.items()}
    table = _intervals(
        effects, "by_schedule", "Gain of the best arm under each schedule", "schedule: arm", gains
    )
    scaled, title = _scaled(effects, gains), "schedule: best arm"
    # One schedule may have nearly all the gain, which is the point of the chart.
    chart = charts.forest(scaled, _axis(effects), title, furthest=math.inf)
    largest = max(gains, key=lambda name: gains[name].estimate)
    words = f"The gain is largest under {largest}: {between(gains[largest], _form(effects))}."
    caption = "Gain of the arm that validation chose under each schedule, with its 95 % interval. Right of 0 it is better."
    return (Figure("by_schedule", chart, caption, words, table),)


def _forest(effects: Effects, schedule: str) -> Figure:
    gains = {effect.arm: effect.gain for effect in effects.of(schedule) if effect.gain.seeds}
    right = sum(gain.low > 0 for gain in gains.values())
    left = sum(gain.high < 0 for gain in gains.values())
    name = f"gains_{file_name(schedule)}"
    table = _intervals(effects, name, f"Gain over the live weights: {schedule}", "arm", gains)
    caption = (
        "Mean paired gain over the live weights at the last step, on the test part, with its 95 % interval. Right of 0 "
        "the arm is better. A hollow point: the interval holds 0."
    )
    words = (
        f"Of {len(gains)} intervals, {right} lie right of 0 and {left} left of it."
        f"{charts.cut_off(gains, _form(effects))}"
    )
    chart = charts.forest(_scaled(effects, gains), _axis(effects), f"gain of each arm: {schedule}")
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


def _intervals(
    effects: Effects, name: str, title: str, first: str, gains: Mapping[str, Interval]
) -> Table:
    rows = tuple((label, between(gain, _form(effects))) for label, gain in gains.items())
    return Table(name, title, (first, "mean [95 % interval]"), rows)


def _form(effects: Effects) -> Callable[[float], str]:
    """A gain as text: as exactly as a chart shows it, also if all gains are small."""
    return lambda v: f"{significant(100 * v, 3)} %" if effects.is_share else significant(v, 3)


def _scaled(effects: Effects, gains: Mapping[str, Interval]) -> dict[str, Interval]:
    """Gains in % where they are shares."""
    unit = 100 if effects.is_share else 1
    return {name: gain.map(lambda value: unit * value) for name, gain in gains.items()}


def _axis(effects: Effects) -> str:
    return f"gain in {effects.metric}{', %' if effects.is_share else ''}"
