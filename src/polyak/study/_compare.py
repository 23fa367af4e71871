"""Compare: two folders of studies, arm by arm, within the seeds that both have, or as independent runs.

It reads what the records say about their study, so it needs no recipe, and the studies may differ in any
condition, such as the model, the data or the length of the runs: what differs is listed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from polyak.rules import Uniform
from polyak.study import _comparisons as comparisons
from polyak.study import _figures as charts
from polyak.study import _independent as independent
from polyak.study import _methods as methods
from polyak.study import _page as pages
from polyak.study._page import Block, Bullets, Figure, Figures, Grid, Page, Section, Text
from polyak.study._record_format import differences
from polyak.study._result import Record, Result
from polyak.study._schedules import constant
from polyak.study._statistics import Interval, bootstrap, known
from polyak.study._study import Arm, Metric, Study
from polyak.study._text import Table, between, file_name, percent, significant

FIELDS = ("study", "seed", "schedule", "learning_rate", "conditions", "curves", "test", "steps")


@dataclass(frozen=True)
class Pairing:
    """One arm under one schedule in two studies, over the seeds that both have, or over all of each.

    `gain` is positive if the second study is better: a share if all values are above 0, else in the
    metric's unit. `p` is Holm's p-value among all pairings.
    """

    schedule: str
    arm: str
    first: Interval
    second: Interval
    gain: Interval
    is_share: bool
    improvement: Interval
    p: float


@dataclass(frozen=True)
class Comparison:
    """Two studies side by side: the pairings, and the conditions in which they differ.

    `seeds` are those that both have. If there is none, the runs are compared as independent ones.
    """

    first: Path
    second: Path
    metric: str
    seeds: tuple[int, ...]
    pairings: tuple[Pairing, ...]
    differences: tuple[str, ...]

    def table(self) -> Table:
        """A row for each schedule and arm."""
        rows = tuple(
            (
                p.schedule, p.arm, between(p.first), between(p.second), _gain(p),
                between(p.improvement, lambda v: percent(v, 0)), significant(p.p, 2),
            )
            for p in self.pairings
        )  # fmt: skip
        header = (
            "schedule", "arm", f"{self.metric}, first", f"{self.metric}, second", "gain of the second",
            "probability of improvement", "p (Holm)",
        )  # fmt: skip
        note = _NOTE + (_PAIRED if self.seeds else _INDEPENDENT)
        return Table("compared", "The second study against the first", header, rows, note)


_NOTE = (
    "Test values at the last step, mean over seeds [95 % interval], each arm at the learning rate that is best for it on "
    "validation in its study. Gain: positive if the second study is better; a ratio of geometric means where it is in %. "
)
_PAIRED = (
    "Only seeds that both studies have count, and gains are paired within a seed. Probability of improvement: share of seeds in "
    "which the second is better, ties by half. p: random signs of the gains, corrected over the rows."
)
_INDEPENDENT = (
    "The studies have no common seed, so their runs count as independent ones: the gain has Welch's interval, the probability "
    "of improvement is Mann and Whitney's over all pairs of runs, with a conservative interval, and p is of their test, "
    "corrected over the rows."
)


def compare(first: Path, second: Path) -> Comparison:
    """Compare the records of two folders, in the main metric of the first.

    Raises `FileNotFoundError` for a folder without results.jsonl; `ValueError` for a line that is not
    a record of a study, and for studies without a common metric or arm under a schedule.
    """
    one, two = recorded(first), recorded(second)
    metric = one.study.main
    seeds = tuple(sorted({s.number for s in one.seeds} & {s.number for s in two.seeds}))
    names = [
        (schedule, arm)
        for schedule in one.study.schedules
        for arm in one.study.arm_names
        if schedule in two.study.schedules and arm in two.study.arm_names
    ]
    for common, what in ((metric in two.study.metrics, f"the metric {metric!r}"), (names, "an arm under a schedule")):  # fmt: skip
        if not common:
            raise ValueError(f"{first} and {second} do not both have {what}: nothing to compare")
    compared = partial(_paired, seeds=seeds) if seeds else _independent
    found = [compared(one, two, *name, metric) for name in names]
    corrected = comparisons.holm({f"{i}": p.p for i, p in enumerate(found)})
    pairings = tuple(Pairing(**{**vars(p), "p": corrected[f"{i}"]}) for i, p in enumerate(found))
    differ = tuple(differences(_conditions(one), _conditions(two)))
    return Comparison(first, second, metric, seeds, pairings, differ)


def recorded(folder: Path) -> Result:
    """The records of a folder with a study that has the names that they use; it cannot run."""
    path = folder / "results.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no results.jsonl; run the study first")
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [_record(path, number, line) for number, line in enumerate(lines, start=1)]
    if not records:
        raise ValueError(f"{path} has no records; run the study first")
    conditions = records[0]["conditions"]
    study = Study(
        name=records[0]["study"],
        model=_cannot_run, data=_cannot_run, loss=_cannot_run,
        arms={name: Arm(Uniform()) for name in conditions["arms"]},
        metrics={name: Metric(_cannot_run, lower) for name, lower in conditions["metrics"].items()},
        schedules={record["schedule"]: constant for record in records},
        learning_rates=tuple(sorted({record["learning_rate"] for record in records})),
        steps=conditions["steps"], batch_size=conditions["batch_size"],
        evaluations=conditions["evaluations"],
    )  # fmt: skip
    return Result(study, records)


def _cannot_run(*_: Any) -> NoReturn:
    raise TypeError("this study was made from its records, and cannot run")


def _record(path: Path, number: int, line: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(record, dict) or any(field not in record for field in FIELDS):
        wanted = "a record of `polyak study run`"
        raise ValueError(f"{path}, line {number}: wanted {wanted} with {', '.join(FIELDS)}")
    return record


def _conditions(result: Result) -> Mapping[str, Any]:
    return {
        **result.records[0]["conditions"],
        "schedule": sorted({f"{r['schedule']}: {r['conditions']['schedule']}" for r in result.records}),
        "learning_rates": list(result.study.learning_rates),
    }  # fmt: skip


def _paired(
    one: Result, two: Result, schedule: str, arm: str, metric: str, seeds: tuple[int, ...]
) -> Pairing:
    values = (
        [s.value(arm, metric, schedule) for s in result.seeds if s.number in seeds]
        for result in (two, one)
    )
    ours, theirs = comparisons.paired(*values)
    lower = one.study.metrics[metric].lower_is_better
    is_share = bool(ours) and min(*ours, *theirs) > 0
    gains = comparisons.gains(ours, theirs, lower, is_share)
    return Pairing(
        schedule, arm, bootstrap(theirs), bootstrap(ours), _as_gain(bootstrap(gains), lower, is_share),
        is_share, comparisons.improvement(ours, theirs, lower),
        comparisons.sign_flip(gains),
    )  # fmt: skip


def _independent(one: Result, two: Result, schedule: str, arm: str, metric: str) -> Pairing:
    ours, theirs = (
        known(seed.value(arm, metric, schedule) for seed in result.seeds) for result in (two, one)
    )
    lower = one.study.metrics[metric].lower_is_better
    is_share = bool(ours and theirs) and min(*ours, *theirs) > 0
    scaled = (
        comparisons.gains(values, [float(is_share)] * len(values), lower, is_share)
        for values in (ours, theirs)
    )
    return Pairing(
        schedule, arm, bootstrap(theirs), bootstrap(ours),
        _as_gain(independent.difference(*scaled), lower, is_share),
        is_share, independent.superiority(ours, theirs, lower), independent.rank_sum(ours, theirs),
    )  # fmt: skip


def _as_gain(gain: Interval, lower: bool, is_share: bool) -> Interval:
    return gain.map(lambda value: comparisons.as_share(value, lower)) if is_share else gain


def _gain(pairing: Pairing) -> str:
    return between(pairing.gain, percent if pairing.is_share else lambda v: significant(v, 3))


def write(comparison: Comparison, folder: Path, command: str) -> Path:
    """Write the comparison's page with its table and charts into a folder; return the page's path."""
    return pages.write(_page(comparison, command), folder)


def _page(comparison: Comparison, command: str) -> Page:
    clear = [p for p in comparison.pairings if p.gain.low > 0 or p.gain.high < 0]
    better = sum(p.gain.low > 0 for p in clear)
    summary = (
        f"Of {len(comparison.pairings)} averages under their schedules, the second study is better in {better} and worse in "
        f"{len(clear) - better}; for the others the 95 % interval holds 0.",
        f"Both studies have {len(comparison.seeds)} seeds: {', '.join(map(str, comparison.seeds))}."
        if comparison.seeds
        else "They have no common seed: their runs are compared as independent ones, which needs more seeds than pairs do.",
        f"They differ in {len(comparison.differences)} conditions."
        if comparison.differences
        else "All their conditions are equal.",
    )
    differ = Bullets(comparison.differences) if comparison.differences else Text("Nothing.")
    blocks: tuple[Block, ...] = (Figures(tuple(_figures(comparison))), Grid(comparison.table()))
    return Page(
        f"{comparison.second.name} against {comparison.first.name}",
        f"First: {comparison.first}. Second: {comparison.second}.",
        summary,
        (
            Section("gains", "Gains of the second study", blocks),
            Section("differences", "Conditions that differ", (differ,)),
            methods.made(command, {"metric": comparison.metric}),
        ),
    )


def _figures(comparison: Comparison) -> list[Figure]:
    schedules = dict.fromkeys(p.schedule for p in comparison.pairings)
    return [
        _forest(
            schedule, [p for p in comparison.pairings if p.schedule == schedule and p.gain.seeds]
        )
        for schedule in schedules
    ]


def _forest(schedule: str, pairings: list[Pairing]) -> Figure:
    scale = 100 if all(p.is_share for p in pairings) else 1
    gains = {p.arm: p.gain.map(lambda value: scale * value) for p in pairings}
    rows = tuple((p.arm, _gain(p)) for p in pairings)
    title = f"Gain of the second study: {schedule}"
    unit = "gain of the second study" + (", %" if scale == 100 else "")
    above = sum(p.gain.low > 0 for p in pairings)
    return Figure(
        f"compared_{file_name(schedule)}", charts.forest(gains, unit, f"arm: {schedule}"),
        "Gain with its 95 % interval; right of 0 the second study is better. A hollow point: the interval holds 0.",
        f"Wholly right of 0: {above} of {len(pairings)}.{charts.cut_off(gains, lambda v: significant(v, 3))}",
        Table(f"compared_{file_name(schedule)}", title, ("arm", "gain [95 % interval]"), rows),
    )  # fmt: skip
