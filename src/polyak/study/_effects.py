"""How much better than the live weights each arm is, by schedule, from the records of a study.

An arm is chosen by validation values and reported by test values, each at its own best learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from polyak import theory
from polyak.rules import LIVE, Rule
from polyak.study import _comparisons as comparisons
from polyak.study._result import Result, When, badness
from polyak.study._schedules import Plateau
from polyak.study._statistics import Interval, Statistic, bootstrap, known
from polyak.study._study import Arm, Ensemble, Study
from polyak.study._text import listed, percent, significant
from polyak.study._weighting import profile_of, rule_of

SAME = 1e-9


@dataclass(frozen=True)
class Effect:
    """An arm against the live weights over the seeds that have both.

    `gain` is positive if the arm is better: a share where all values are above 0, else in the metric's
    unit. `p` is Holm's p-value among the arms of the schedule. `needed` is the number of seeds that a
    5 % effect would need; None where the gain is not a share.
    """

    arm: str
    gain: Interval
    improvement: Interval
    size: Interval
    p: float
    needed: int | None


class Effects:
    """The effects of all arms of a result, under each schedule, of one metric."""

    def __init__(self, result: Result, metric: str | None = None) -> None:
        self.result = result
        self.study = result.study
        self.metric = result.study.require_metric(metric)
        self.lower = result.study.metrics[self.metric].lower_is_better
        self.arms = tuple(result.study.arms)
        self.is_share = all(
            value > 0
            for schedule in self.study.schedules
            for arm in self.study.arm_names
            for value in known(self.values(arm, schedule))
        )

    def values(self, arm: str, schedule: str, when: When = "last") -> list[float]:
        """The test values of an arm by seed; NaN where a seed has none."""
        return [seed.value(arm, self.metric, schedule, when) for seed in self.result.seeds]

    def mean(
        self, arm: str, schedule: str, when: When = "last", statistic: Statistic = "mean"
    ) -> Interval:
        """The mean, or another statistic, of the test values over the seeds that have one."""
        return bootstrap(known(self.values(arm, schedule, when)), statistic)

    def pairs(
        self, arm: str, schedule: str, when: When = "last"
    ) -> tuple[list[float], list[float]]:
        """The values of an arm and of the live weights, of the seeds that have both."""
        return comparisons.paired(
            self.values(arm, schedule, when), self.values(LIVE, schedule, when)
        )

    def gain(self, arm: str, schedule: str, when: When = "last") -> Interval:
        """How much better an arm is than the live weights; positive is better."""
        return bootstrap(self._gains(arm, schedule, when)).map(self._as_gain)

    def of(self, schedule: str) -> list[Effect]:
        """The effects of all arms under a schedule at the last step, with Holm's p-values."""
        found = [self._effect(arm, schedule) for arm in self.arms]
        corrected = comparisons.holm({effect.arm: effect.p for effect in found})
        return [replace(effect, p=corrected[effect.arm]) for effect in found]

    def best(self, schedule: str) -> str | None:
        """The arm with the best mean validation value at the last step; None if no arm has one."""
        return next(iter(self.ranked(schedule)), None)

    def ranked(self, schedule: str) -> list[str]:
        """The arms with validation values, the best first, and last those that lost seeds."""
        found = {arm: self._badness(arm, schedule) for arm in self.arms}
        measured = [arm for arm in self.arms if found[arm][1] < math.inf]
        return sorted(measured, key=found.__getitem__)

    def focus(self, schedule: str) -> str | None:
        """The arm that a plateau follows, else the best one on validation; None if no arm has a value."""
        given = self.study.schedules[schedule]
        if isinstance(given, Plateau) and given.arm != LIVE:
            return given.arm
        return self.best(schedule)

    def form(self, value: float) -> str:
        """A gain as text."""
        return percent(value) if self.is_share else significant(value, 3)

    def _effect(self, arm: str, schedule: str) -> Effect:
        ours, theirs = self.pairs(arm, schedule)
        gains = self._gains(arm, schedule, "last")
        deviation = float(np.std(gains, ddof=1)) if len(gains) > 1 else math.nan
        spread = self.is_share and math.isfinite(deviation)
        return Effect(
            arm,
            bootstrap(gains).map(self._as_gain),
            comparisons.improvement(ours, theirs, self.lower),
            comparisons.effect_size(gains),
            comparisons.sign_flip(gains),
            comparisons.seeds_needed(deviation) if spread else None,
        )

    def _gains(self, arm: str, schedule: str, when: When) -> Sequence[float]:
        """Log ratios or differences by seed, positive where the arm is better."""
        return comparisons.gains(*self.pairs(arm, schedule, when), self.lower, self.is_share)

    def _as_gain(self, value: float) -> float:
        """A mean of log ratios as a share of the live weights' value."""
        return comparisons.as_share(value, self.lower) if self.is_share else value

    def _badness(self, arm: str, schedule: str) -> tuple[int, float]:
        values = [
            seed.value(arm, self.metric, schedule, part="validation") for seed in self.result.seeds
        ]
        return badness(values, self.lower)


def run_steps(result: Result) -> int:
    """The steps of a run, in median: runs that stop early have fewer than the study allows."""
    return int(np.median([record["steps"][-1] for record in result.records]))


def half_lives(result: Result) -> dict[str, float]:
    """arm -> the half-life of its average at the end of a run, as a share of the run."""
    steps = run_steps(result)
    profiles = {n: profile_of(rule, steps, every) for n, (rule, every) in _rules(result).items()}
    return {n: theory.half_life(c) / steps for n, c in profiles.items() if c is not None}


@lru_cache(maxsize=256)
def nominal_age(rule: Rule, every: int) -> float:
    """The mean age in steps at which an average settles in a run without an end; infinite if it grows."""
    about = theory.explain(rule, every=every)
    return math.inf if about.growing else about.mean_age


def late(study: Study, arms: Iterable[str]) -> str:
    """A sentence that names the arms that start within a run; nothing where all start with it."""
    named = [n for n in arms if isinstance(arm := study.arms.get(n), Arm) and arm.start]
    return f" Before its start an average is the live weights: {listed(named)}." if named else ""


def identical(result: Result) -> list[str]:
    """Sentences that name the averages that are one and the same, by their rules or by their values."""
    by_rule = _same_rules(result)
    sentences = [
        f"{listed(group)} are one average: their rules give every step the same weight."
        for group in by_rule
    ]
    known = [set(group) for group in by_rule]
    for group in _same_values(result):
        if not any(set(group) <= each for each in known):
            sentences.append(f"{listed(group)} have equal values in every run.")
    return sentences


def _same_rules(result: Result) -> list[list[str]]:
    """Groups of arms whose profiles agree at the end of a run, the live weights among them."""
    steps = run_steps(result)
    last = np.zeros(steps)
    last[-1] = 1.0
    profiles = {LIVE: last}
    for name, (rule, every) in _rules(result).items():
        if (found := profile_of(rule, steps, every)) is not None:
            profiles[name] = found
    return _grouped(list(profiles), partial(_same_profile, result, profiles))


def _same_profile(result: Result, profiles: dict[str, comparisons.Array], a: str, b: str) -> bool:
    arms = result.study.arms
    anew = [getattr(arms.get(name), "recalibrate", False) for name in (a, b)]
    return anew[0] == anew[1] and bool(np.abs(profiles[a] - profiles[b]).max() < SAME)


def _same_values(result: Result) -> list[list[str]]:
    def same(a: str, b: str) -> bool:
        return bool(result.records) and all(
            r["curves"][a] == r["curves"][b] and r["test"][a]["last"] == r["test"][b]["last"]
            for r in result.records
        )

    return _grouped(list(result.study.arm_names), same)


def _grouped(names: list[str], same: Callable[[str, str], bool]) -> list[list[str]]:
    """Groups of two names or more, each the same as the first of its group."""
    groups: list[list[str]] = []
    for name in names:
        for group in groups:
            if same(group[0], name):
                group.append(name)
                break
        else:
            groups.append([name])
    return [group for group in groups if len(group) > 1]


def _rules(result: Result) -> dict[str, tuple[Rule, int]]:
    """arm -> its rule in a run of the study, and its steps per update; ensembles have no rule."""
    arms: dict[str, Arm | Ensemble] = dict(result.study.arms)
    return {
        name: (rule_of(arm, result.study.steps), arm.every)
        for name, arm in arms.items()
        if isinstance(arm, Arm)
    }
