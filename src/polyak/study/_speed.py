"""When each arm is as good as the live weights at the end, in one study and over several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from polyak.rules import LIVE
from polyak.study import _figures as charts
from polyak.study._comparisons import Array, performance_profile, profile_score, time_to_target
from polyak.study._curves import lines
from polyak.study._effects import Effects, late
from polyak.study._page import Figure
from polyak.study._statistics import known, stratified
from polyak.study._text import Table, between, number

LIMITS = tuple(float(v) for v in np.linspace(1, 4, 31))
TARGET = "The target is the live weights' median validation value at the last step."


def times_to_target(effects: Effects, arm: str, schedule: str) -> list[float]:
    """By seed, the first evaluated step at which an arm is as good as the live weights' median at the end."""
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


def figures(effects: Effects) -> tuple[Figure, ...]:
    """The performance profile of the arms of a study."""
    caption = (
        "Share of the runs (a seed under a schedule) in which an arm reaches the target within a multiple of the fastest "
        f"arm's steps. {TARGET}{late(effects.study, effects.arms)}"
    )
    return _profile([_times(effects, effects.study.arm_names)], caption)


def scores(effects: Effects) -> dict[str, float]:
    """arm -> the area under its performance profile up to 4 times the fastest arm's steps."""
    by_seed = _by_seed(_times(effects, effects.study.arm_names))
    return {arm: float(np.mean(scores)) for arm, scores in by_seed.items()}


def over_studies(studies: Sequence[Effects]) -> tuple[Figure, ...]:
    """The performance profile of the arms that all studies have; each study counts the same."""
    caption = (
        "Share of the runs (a seed under a schedule) in which an arm reaches the target within a multiple of the steps of "
        f"the fastest arm here; the mean over the studies. {TARGET}"
    )
    return _profile(_common_times(studies), caption)


def scores_over_studies(studies: Sequence[Effects]) -> Table:
    """The scores of the arms that all studies have, in the mean and in each, the best first."""
    by_seed = [_by_seed(times) for times in _common_times(studies)]
    found = {
        arm: [stratified([e[arm] for e in by_seed]), *(stratified([each[arm]]) for each in by_seed)]
        for arm in by_seed[0]
    }
    rows = tuple(
        (arm, *(between(score, lambda value: number(value, 2)) for score in found[arm]))
        for arm in sorted(found, key=lambda arm: -found[arm][0].estimate)
    )
    note = (
        "The area under the performance profile up to 4 times the fastest arm's steps [95 % interval], in each study's main "
        "metric: 1 for the arm that is the fastest in every run, 0 for one that never reaches the target in time. Only arms that "
        "all studies have count. The mean gives each study the same weight; its interval resamples the seeds within each study."
    )
    header = ("arm", "mean", *(f"study {i}" for i, _ in enumerate(studies, 1)))
    return Table("speed_scores", "Speed scores", header, rows, note)


def _common_times(studies: Sequence[Effects]) -> list[dict[str, Array]]:
    names = [study.study.arm_names for study in studies]
    arms = [arm for arm in names[0] if all(arm in each for each in names)]
    return [_times(study, arms) for study in studies]


def _times(effects: Effects, arms: Sequence[str]) -> dict[str, Array]:
    """arm -> its times, (schedules, seeds)."""
    schedules = effects.study.schedules
    return {arm: np.array([times_to_target(effects, arm, s) for s in schedules]) for arm in arms}


def _by_seed(times: Mapping[str, Array]) -> dict[str, list[float]]:
    """arm -> its score by seed, over the schedules."""
    best = np.min(list(times.values()), axis=0)
    with np.errstate(invalid="ignore"):
        ratios = {arm: np.where(np.isfinite(own), own / best, np.inf) for arm, own in times.items()}
    return {arm: [profile_score(column) for column in own.T] for arm, own in ratios.items()}


def _profile(studies: Sequence[Mapping[str, Array]], caption: str) -> tuple[Figure, ...]:
    """The mean of the studies' performance profiles; nothing where no arm reaches the target."""
    if not any(np.isfinite(own).any() for times in studies for own in times.values()):
        return ()
    each = [
        performance_profile({a: own.ravel() for a, own in times.items()}, LIMITS)
        for times in studies
    ]
    shares = {arm: np.mean([one[arm] for one in each], axis=0) for arm in studies[0]}
    ranked = sorted(shares, key=lambda arm: -float(shares[arm].mean()))
    shown = [LIVE, *[arm for arm in ranked if arm != LIVE][: charts.MOST_SERIES - 1]]
    rows: charts.Rows = [
        {"x": round(limit, 1), "curve": arm, "middle": float(value)}
        for arm in shown
        for limit, value in zip(LIMITS, shares[arm], strict=True)
    ]
    title = "share of runs that reach the target"
    return (lines("speed", rows, title, caption, "times the fastest arm's steps"),)
