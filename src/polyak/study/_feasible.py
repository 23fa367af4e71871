"""Find averages and schedules that need more steps than a run has, before the training begins."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np

from polyak.rules import LIVE, Window
from polyak.rules._clocks import ticked
from polyak.study._schedules import Plateau
from polyak.study._study import Arm, Ensemble, Study
from polyak.study._text import percent
from polyak.study._weighting import misplaced, profile_of, rule_of

SAME = 1e-9
LARGE = 0.1


def require_feasible(study: Study) -> None:
    """Raise `ValueError` for an arm that has no value, or is the live weights, at the end of a run.

    It warns of arms and schedules that want more updates or evaluations than a run has.
    """
    remarks = [r for name, arm in study.arms.items() for r in _of_arm(study, f"arm {name!r}", arm)]
    for name, schedule in study.schedules.items():
        remarks += _of_schedule(study, f"schedule {name!r}", schedule)
    for remark in remarks:
        warnings.warn(remark, stacklevel=3)


def _of_arm(study: Study, name: str, arm: Arm | Ensemble) -> Iterator[str]:
    updates = study.steps // arm.every
    if not updates:
        got = f"{name} is never updated: every={arm.every}, and a run has {study.steps} steps"
        raise ValueError(f"{got}; wanted a smaller every, or more steps")
    if isinstance(arm, Arm):
        yield from _of_average(study, name, arm, updates * arm.every)
        yield from _of_swept(study, name, arm) if arm.swept else ()
        updates -= round(arm.start * study.steps) // arm.every
    sized = arm.rule if isinstance(arm, Arm) else arm
    if isinstance(sized, Window | Ensemble) and sized.size > updates:
        got = f"wants {sized.size} snapshots and gets {updates} in a run"
        yield f"{name} {got}; give a smaller size, or more steps"


def _of_average(study: Study, name: str, arm: Arm, last: int) -> Iterator[str]:
    """Look at the weights that an average gives to the steps of a run; its last update is at step `last`."""
    profile = profile_of(rule_of(arm, study.steps), study.steps, arm.every)
    assert profile is not None
    if np.abs(profile[:-1]).max(initial=0.0) < SAME and not arm.recalibrate:
        how = f"its start is {arm.start:g} of {study.steps} steps, and it is updated every {arm.every}"
        remedy = "wanted an earlier start, a longer average, or more steps"
        raise ValueError(f"{name} is the live weights at the end of a run: {how}; {remedy}")
    most = int(profile.argmax())
    if most + 1 < last and profile[most] > 0.5:
        share = f"{percent(profile[most], 0)} of it is still the weights of step {most + 1}"
        yield f"{name} is too slow for a run of {study.steps} steps, at whose end {share}; give a shorter half-life, or more steps"


def _of_swept(study: Study, name: str, arm: Arm) -> Iterator[str]:
    rule = rule_of(arm, study.steps)
    if LIVE in rule.readout(ticked(rule, [float(arm.every)] * (study.steps // arm.every))):
        raise ValueError(
            f"{name} is swept, and its rule has a term in the live weights; wanted swept=False"
        )
    if (share := misplaced(study, arm)) > LARGE:
        yield f"{name} is swept, and {percent(share, 0)} of its weight lies on other steps than its rule's; give more evaluations, or swept=False"


def _of_schedule(study: Study, name: str, schedule: object) -> Iterator[str]:
    if not isinstance(schedule, Plateau):
        return
    has = f"and a run has {study.evaluations} evaluations; give a smaller one, or more evaluations"
    if schedule.patience + 2 > study.evaluations:
        yield f"{name} never lowers the learning rate: patience={schedule.patience}, {has}"
    if schedule.stop and schedule.stop >= study.evaluations:
        yield f"{name} never stops a run: stop={schedule.stop}, {has}"
