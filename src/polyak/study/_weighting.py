"""When arms are evaluated, and the weight that an arm gives to each step of a run."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from polyak.rules import LIVE, Rule, Tail
from polyak.rules._clocks import ticked
from polyak.study._schedules import Plateau
from polyak.study._study import Arm, Study
from polyak.theory import Profile, coefficients


def due(study: Study, evaluation: int) -> int:
    """The step after which evaluation number 1, 2, ... is due. They are evenly spaced, also after a stop."""
    return round(study.steps * evaluation / study.evaluations)


def evaluated(study: Study, every: int) -> set[int]:
    """The numbers of updates, one every `every` steps, that there are at the evaluations."""
    plateaus = (s for s in study.schedules.values() if isinstance(s, Plateau))
    last = study.evaluations + max((plateau.after for plateau in plateaus), default=0)
    return {due(study, evaluation) // every for evaluation in range(1, last + 1)}


def rule_of(arm: Arm, steps: int) -> Rule:
    """The rule of an arm in a run of this many steps."""
    return Tail(arm.rule, start=round(arm.start * steps)) if arm.start else arm.rule


def profile_of(rule: Rule, steps: int, every: int) -> Profile | None:
    """The profile of an arm, updated at steps `every`, 2 `every`, ...; None before its first update."""
    if steps < every:
        return None
    times = [float(every)] * (steps // every)
    profile = np.zeros(steps)
    profile[every - 1 :: every] = coefficients(rule, times)
    if stale := steps % every:  # a term in the live weights is that of the step itself
        live = rule.readout(ticked(rule, times)).get(LIVE, 0.0)
        profile[[-1, -1 - stale]] += live, -live
    return profile


@lru_cache(maxsize=4096)
def shared(rule: Rule, every: int, bounds: tuple[int, ...], convex: bool = False) -> list[float]:
    """The coefficient of each update of a stretch; the stretches end at the updates `bounds`, which begin with 0."""
    exact = coefficients(rule, [float(every)] * bounds[-1], convex=convex)
    means: list[float] = (np.add.reduceat(exact, bounds[:-1]) / np.diff(bounds)).tolist()
    return means


def misplaced(study: Study, arm: Arm) -> float:
    """The share of a swept arm's weight that lies on other updates than the rule's, at the end of a run."""
    rule, count = rule_of(arm, study.steps), study.steps // arm.every
    bounds = sorted({0, 1, *(n for n in evaluated(study, arm.every) if n <= count)})
    swept = np.repeat(shared(rule, arm.every, tuple(bounds)), np.diff(bounds))
    return float(np.abs(swept - coefficients(rule, [float(arm.every)] * count)).sum() / 2)
