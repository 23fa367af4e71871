"""Compare studies with the first one, arm by arm, over the seeds that both have.

It reads what the records say about their study, so it needs no recipe, and the studies may differ in any
condition, such as the model, the data or the length of the runs: what differs is listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyak._checks import require
from polyak.study import _comparisons as comparisons
from polyak.study._record_format import all_differences
from polyak.study._recorded import recorded
from polyak.study._result import Result
from polyak.study._statistics import Interval, bootstrap
from polyak.study._text import listed


@dataclass(frozen=True)
class Pairing:
    """One arm under one schedule in two studies, over the seeds that both have.

    `gain` is positive if the other study is better than the first: a share if all values are above 0, else
    in the metric's unit. `p` is Holm's p-value among all pairings of the two.
    """

    schedule: str
    arm: str
    first: Interval
    other: Interval
    gain: Interval
    is_share: bool
    improvement: Interval
    p: float


@dataclass(frozen=True)
class Comparison:
    """A study beside the first one: the pairings, and the conditions in which they differ.

    `number` is the study's place among the folders, from 2, `seeds` are those that both have. Studies
    without a common seed, metric of one direction, or arm under one schedule have no pairings.
    """

    number: int
    seeds: tuple[int, ...]
    pairings: tuple[Pairing, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """The results of several folders, and the comparison of each with the first, in the first one's metric."""

    folders: tuple[Path, ...]
    results: tuple[Result, ...]
    metric: str
    comparisons: tuple[Comparison, ...]


def compare(folders: Sequence[Path]) -> Compared:
    """Compare the records of two folders or more, in the main metric of the first.

    Raises `FileNotFoundError` for a folder without results.jsonl; `ValueError` for fewer than two folders, a
    line that is not a record of a study, and studies that have nothing in common.
    """
    require(len(folders) > 1, "the number of folders", len(folders), "at least 2")
    first, *others = results = tuple(map(recorded, folders))
    metric = first.study.main
    compared = tuple(_compared(n, first, other, metric) for n, other in enumerate(others, 2))
    arms = set.intersection(*(set(result.study.arms) for result in results))
    if not arms and not any(each.pairings for each in compared):
        what = f"an average, or the metric {metric!r} of the live weights under one schedule"
        raise ValueError(
            f"{listed([*map(str, folders)])} do not all have {what}: nothing to compare"
        )
    return Compared(tuple(folders), results, metric, compared)


def _compared(number: int, one: Result, two: Result, metric: str) -> Comparison:
    seeds = tuple(sorted({s.number for s in one.seeds} & {s.number for s in two.seeds}))
    lower = [
        r.study.metrics[metric].lower_is_better for r in (one, two) if metric in r.study.metrics
    ]
    pairs = (
        _paired(one, two, schedule, arm, metric, seeds)
        for schedule in one.study.schedules
        for arm in one.study.arm_names
        if schedule in two.study.schedules and arm in two.study.arm_names
        if lower in ([True, True], [False, False]) and seeds
    )
    found = [pair for pair in pairs if pair.gain.seeds]
    corrected = comparisons.holm({f"{i}": p.p for i, p in enumerate(found)})
    pairings = tuple(replace(p, p=corrected[f"{i}"]) for i, p in enumerate(found))
    differ = tuple(all_differences(_conditions(one), _conditions(two)))
    return Comparison(number, seeds, pairings, differ)


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
    gain = bootstrap(gains)
    return Pairing(
        schedule, arm, bootstrap(theirs), bootstrap(ours),
        gain.map(lambda value: comparisons.as_share(value, lower)) if is_share else gain,
        is_share, comparisons.improvement(ours, theirs, lower), comparisons.sign_flip(gains),
    )  # fmt: skip
