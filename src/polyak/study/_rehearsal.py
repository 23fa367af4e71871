"""Ask every claim for its quantity before the training begins, to find names that do not exist."""

from __future__ import annotations

from typing import Any

from polyak.rules import LIVE
from polyak.study._claims import Claim, Published
from polyak.study._errors import placed
from polyak.study._result import Result, Seed, require_place
from polyak.study._study import Study
from polyak.study._weighting import due


class UnknownNameError(ValueError):
    """A claim reads an arm, a metric or a schedule that the study does not have."""


class _Rehearsed(Seed):
    """A seed whose values are all 1, but whose names are checked."""

    def value(
        self,
        arm: str,
        metric: Any = None,
        schedule: Any = None,
        when: Any = "last",
        part: Any = "test",
    ) -> float:
        _check(self.result.study, arm, metric, schedule, when, part)
        return 1.0

    def curve(self, arm: str, metric: Any = None, schedule: Any = None) -> list[float]:
        _check(self.result.study, arm, metric, schedule)
        return [1.0] * self.result.study.evaluations

    def steps(self, arm: str = LIVE, schedule: Any = None) -> list[int]:
        study = self.result.study
        _check(study, arm, None, schedule)
        return [due(study, evaluation) for evaluation in range(1, study.evaluations + 1)]


def _check(
    study: Study, arm: str, metric: Any, schedule: Any, when: Any = "last", part: Any = "test"
) -> None:
    try:
        study.require_arm(arm)
        study.require_metric(metric)
        study.require_schedule(schedule)
        require_place(when, part)
    except ValueError as error:
        raise UnknownNameError(str(error)) from None


def rehearse(study: Study) -> None:
    """Raise `ValueError` if the quantity of a claim or a published figure reads what does not exist, or is not a number.

    Other errors are left to the report: a quantity may not be defined for values that are all 1.
    """
    seed = _Rehearsed(Result(study, []), 0)
    judged: list[Claim | Published] = [*study.claims, *study.published]
    for each in judged:
        named = (
            f"claim {each.sentence!r}"
            if isinstance(each, Claim)
            else f"published figure {each.what!r}"
        )
        try:
            value = each.quantity(seed)
        except UnknownNameError as error:
            raise ValueError(f"the {named}: {error}") from None
        except (IndexError, NameError) as error:
            raise ValueError(f"the {named} raised {placed(error)}") from error
        except Exception:
            continue
        if not hasattr(value, "__float__"):
            got = type(value).__name__
            raise ValueError(f"the {named}: its quantity is of type {got}, wanted a number")
