"""The page of several studies: each beside the first, and all arms over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from polyak.rules import LIVE
from polyak.study import _figures as charts
from polyak.study import _methods as methods
from polyak.study import _page as pages
from polyak.study import _speed as speed
from polyak.study._compare import Compared, Comparison, Pairing
from polyak.study._effects import Effects
from polyak.study._page import Block, Bullets, Figure, Figures, Grid, Page, Section, Text
from polyak.study._text import Table, between, file_name, listed, percent, significant

_NOTE = (
    "Test values at the last step, mean over the seeds that both studies have [95 % interval], each arm at the learning rate that is "
    "best for it on validation in its study. Gain: paired within a seed, positive if study {0} is better than study 1; a ratio of "
    "geometric means where it is in %. Probability of improvement: share of seeds in which study {0} is better, ties by half. p: "
    "random signs of the gains, corrected over the rows."
)


def write(compared: Compared, folder: Path, command: str) -> Path:
    """Write the page of a comparison with its tables and charts into a folder; return the page's path."""
    return pages.write(_page(compared, command), folder)


def table(compared: Compared, comparison: Comparison) -> Table:
    """A row for each schedule and arm of two studies."""
    number = comparison.number
    rows = tuple(
        (
            p.schedule, p.arm, between(p.first), between(p.other), _gain(p),
            between(p.improvement, lambda v: percent(v, 0)), significant(p.p, 2),
        )
        for p in comparison.pairings
    )  # fmt: skip
    header = (
        "schedule", "arm", f"{compared.metric}, study 1", f"{compared.metric}, study {number}",
        f"gain of study {number}", "probability of improvement", "p (Holm)",
    )  # fmt: skip
    title = f"Study {number} against study 1"
    return Table(f"compared_{number}", title, header, rows, _NOTE.format(number))


def _page(compared: Compared, command: str) -> Page:
    studies = [Effects(result) for result in compared.results]
    names = [folder.name for folder in compared.folders]
    return Page(
        f"{listed(names[1:])} against {names[0]}",
        " ".join(f"Study {i}: {folder}." for i, folder in enumerate(compared.folders, 1)),
        (*(said(each, compared.metric) for each in compared.comparisons), *_fastest(studies)),
        (
            *(s for each in compared.comparisons for s in _sections(compared, each)),
            Section("speed", "Time to the target in all studies", tuple(_speed(studies))),
            methods.made(command, {"metric": compared.metric}),
        ),
    )


def said(comparison: Comparison, metric: str) -> str:
    """The comparison of two studies in a sentence or two."""
    pairings, number = comparison.pairings, comparison.number
    if not pairings:
        return (
            f"Study {number} and study 1 have no {metric} of one arm under one schedule and seed in common, with one "
            "better direction, so only times to the target are compared."
        )
    better = sum(p.gain.low > 0 for p in pairings)
    worse = sum(p.gain.high < 0 for p in pairings)
    differ = len(comparison.differences)
    return (
        f"Of {len(pairings)} arms under their schedules, study {number} is better than study 1 in {better} and worse in "
        f"{worse}; for the others the 95 % interval holds 0. They have {len(comparison.seeds)} common seeds, and {f'{differ} conditions differ' if differ else 'all conditions are equal'}."
    )


def _speed(studies: list[Effects]) -> Iterator[Block]:
    if figures := speed.over_studies(studies):
        yield Figures(figures)
    yield Grid(speed.scores_over_studies(studies))


def _fastest(studies: list[Effects]) -> Iterator[str]:
    """A sentence on the average with the best score, beside the live weights."""
    rows = {row[0]: row[1] for row in speed.scores_over_studies(studies).rows}
    if best := next((arm for arm in rows if arm != LIVE), None):
        yield (
            f"Over all studies, {best} is the average that reaches the live weights' last validation value soonest: its "
            f"speed score is {rows[best]}, that of the live weights {rows[LIVE]}."
        )


def _sections(compared: Compared, comparison: Comparison) -> Iterator[Section]:
    number, differ = comparison.number, comparison.differences
    if comparison.pairings:
        gains = Figures(tuple(_figures(comparison))), Grid(table(compared, comparison))
        yield Section(f"gains_{number}", f"Gains of study {number}", gains)
    title = f"Conditions in which study {number} differs"
    yield Section(
        f"differences_{number}", title, (Bullets(differ) if differ else Text("Nothing."),)
    )


def _figures(comparison: Comparison) -> list[Figure]:
    schedules = dict.fromkeys(p.schedule for p in comparison.pairings)
    return [
        _forest(comparison.number, s, [p for p in comparison.pairings if p.schedule == s])
        for s in schedules
    ]  # fmt: skip


def _forest(number: int, schedule: str, pairings: list[Pairing]) -> Figure:
    scale = 100 if all(p.is_share for p in pairings) else 1
    gains = {p.arm: p.gain.map(lambda value: scale * value) for p in pairings}
    rows = tuple((p.arm, _gain(p)) for p in pairings)
    name = f"compared_{number}_{file_name(schedule)}"
    gain = f"gain of study {number}"
    above = sum(p.gain.low > 0 for p in pairings)
    return Figure(
        name, charts.forest(gains, gain + (", %" if scale == 100 else ""), f"gain of each arm: {schedule}"),
        f"Gain with its 95 % interval; right of 0 study {number} is better. A hollow point: the interval holds 0.",
        f"Wholly right of 0: {above} of {len(pairings)}.{charts.cut_off(gains, lambda v: significant(v, 3))}",
        Table(name, f"G{gain[1:]}: {schedule}", ("arm", "gain [95 % interval]"), rows),
    )  # fmt: skip


def _gain(pairing: Pairing) -> str:
    return between(pairing.gain, percent if pairing.is_share else lambda v: significant(v, 3))
