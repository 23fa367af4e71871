"""The records of a study, and the values that claims and reports read from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from polyak._checks import require
from polyak.rules import LIVE
from polyak.study._record_format import Record
from polyak.study._statistics import known
from polyak.study._study import Study

When = Literal["last", "selected"]
PartName = Literal["validation", "test"]


@dataclass(frozen=True)
class Result:
    """A study with the records of its runs; `failures` are the runs that raised an error."""

    study: Study
    records: Sequence[Record]
    failures: Sequence[Record] = ()
    _tuned: dict[tuple[str, str, When], float] = field(default_factory=dict, repr=False)

    @cached_property
    def seeds(self) -> list[Seed]:
        """A view on every seed that has a record, in order."""
        return [Seed(self, number) for number in sorted({r["seed"] for r in self.records})]

    @cached_property
    def _by_run(self) -> dict[tuple[int, str, float], Record]:
        return {(r["seed"], r["schedule"], r["learning_rate"]): r for r in self.records}

    def tuned(self, arm: str, schedule: str | None = None, when: When = "last") -> float:
        """The learning rate at which an arm has the best mean validation value over the seeds.

        The value is the main metric's, at the last step or at the selected one. A learning rate at
        which a run failed or has no number is chosen only if there is no other.

        Raises `ValueError` for an unknown arm or schedule.
        """
        schedule = self._checked(arm, schedule)
        key = (arm, schedule, when)
        if key not in self._tuned:
            rates = self.study.learning_rates
            self._tuned[key] = min(rates, key=lambda rate: self._badness(*key, rate))
        return self._tuned[key]

    def record(self, seed: int, schedule: str, learning_rate: float) -> Record | None:
        """The record of one run; None if it failed or was not run."""
        return self._by_run.get((seed, schedule, learning_rate))

    def _badness(self, arm: str, schedule: str, when: When, rate: float) -> tuple[int, float]:
        """The badness of the validation values at a learning rate."""
        values = [
            value_in(self.record(seed.number, schedule, rate), self.study, arm, when=when)
            for seed in self.seeds
        ]
        return badness(values, self.study.metrics[self.study.main].lower_is_better)

    def _checked(self, arm: str, schedule: str | None) -> str:
        self.study.require_arm(arm)
        return self.study.require_schedule(schedule)


@dataclass(frozen=True)
class Seed:
    """One seed of a result. Every value is read at the learning rate that is best for its arm."""

    result: Result
    number: int

    def value(
        self,
        arm: str,
        metric: str | None = None,
        schedule: str | None = None,
        when: When = "last",
        part: PartName = "test",
    ) -> float:
        """The metric of an arm, NaN if there is none.

        `when` is "last", the last step, or "selected", the evaluated step with the arm's best
        validation value of the main metric. `part` is "test" or "validation".

        Raises `ValueError` for an unknown arm, metric or schedule, and for another `when` or `part`.
        """
        require_place(when, part)
        record = self.record(arm, schedule, when)
        return value_in(record, self.result.study, arm, metric, when, part)

    def curve(
        self, arm: str, metric: str | None = None, schedule: str | None = None
    ) -> list[float]:
        """The validation values of an arm at each step of `steps`; NaN where there is none."""
        metric = self.result.study.require_metric(metric)
        record = self.record(arm, schedule)
        return [] if record is None else [_number(v) for v in record["curves"][arm][metric]]

    def steps(self, arm: str = LIVE, schedule: str | None = None) -> list[int]:
        """The evaluated steps of the run in which an arm is read."""
        record = self.record(arm, schedule)
        return [] if record is None else list(record["steps"])

    def record(
        self, arm: str = LIVE, schedule: str | None = None, when: When = "last"
    ) -> Record | None:
        """The record of the run in which an arm is read; None if it failed."""
        rate = self.result.tuned(arm, schedule, when)
        return self.result.record(self.number, self.result.study.require_schedule(schedule), rate)


def badness(values: Sequence[float], lower_is_better: bool) -> tuple[int, float]:
    """(seeds without a number, mean with its sign for lower is better): what lost seeds is not chosen for the others."""
    numbers = known(values)
    sign = 1 if lower_is_better else -1
    mean = sign * math.fsum(numbers) / len(numbers) if numbers else math.inf
    return len(values) - len(numbers), mean


def require_place(when: str, part: str) -> None:
    """Raise `ValueError` for a `when` or `part` that no record has."""
    require(when in ("last", "selected"), "when", when, "'last' or 'selected'")
    require(part in ("test", "validation"), "part", part, "'test' or 'validation'")


def value_in(
    record: Record | None,
    study: Study,
    arm: str,
    metric: str | None = None,
    when: When = "last",
    part: PartName = "validation",
) -> float:
    """The metric of an arm in one record; NaN without a record or a number."""
    metric = study.require_metric(metric)
    if record is None:
        return math.nan
    selected = record["test"][arm][when]
    if part == "test":
        return _number(selected[metric])
    step = record["steps"][-1] if when == "last" else selected["step"]
    if step is None:
        return math.nan
    return _number(record["curves"][arm][metric][record["steps"].index(step)])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class PairedQuantity:
    """A quantity of a seed: two arms' values of one metric, made one number by `function`."""

    arm: str
    against: str
    metric: str | None
    schedule: str | None
    when: When
    function: Callable[[float, float, bool], float]
    form: str
    """How a claim about it prints it."""
    note: str = ""
    """When a seed has no number, in words."""

    def __call__(self, seed: Seed) -> float:
        """The number for a seed; NaN where an arm has none."""
        ours, theirs = (
            seed.value(arm, self.metric, self.schedule, self.when)
            for arm in (self.arm, self.against)
        )
        study = seed.result.study
        lower = study.metrics[study.require_metric(self.metric)].lower_is_better
        return self.function(ours, theirs, lower)


def gain(
    arm: str,
    against: str = LIVE,
    metric: str | None = None,
    schedule: str | None = None,
    when: When = "last",
) -> PairedQuantity:
    """Compare by the relative improvement, positive if the arm is better: `1 - arm / against` for a loss.

    It is a share of a value that is not negative: a seed with a negative value gives no number. For values
    such as a log-likelihood or R2 use `difference`.
    """
    note = "there is no gain if a value is negative: then claim a difference(...)"
    return PairedQuantity(arm, against, metric, schedule, when, _gain, "share", note)


def log_ratio(
    arm: str,
    against: str = LIVE,
    metric: str | None = None,
    schedule: str | None = None,
    when: When = "last",
) -> PairedQuantity:
    """Compare by `log(arm / against)`: its mean over seeds is the log of a geometric mean of ratios.

    A seed without two values above 0 gives no number.
    """
    return PairedQuantity(arm, against, metric, schedule, when, _log_ratio, "percent")


def difference(
    arm: str,
    against: str = LIVE,
    metric: str | None = None,
    schedule: str | None = None,
    when: When = "last",
) -> PairedQuantity:
    """Compare by `arm - against`, in the unit of the metric."""
    return PairedQuantity(arm, against, metric, schedule, when, _difference, "number")


def _gain(ours: float, theirs: float, lower_is_better: bool) -> float:
    change = (ours - theirs) / theirs if ours >= 0 < theirs else math.nan
    return -change if lower_is_better else change


def _log_ratio(ours: float, theirs: float, _: bool) -> float:
    return math.log(ours / theirs) if ours > 0 < theirs else math.nan


def _difference(ours: float, theirs: float, _: bool) -> float:
    return ours - theirs
