"""Curves of any study by step, and the pairs of its seeds: validation, distance and cosine, last values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from polyak.rules import LIVE
from polyak.study import _figures as charts
from polyak.study._curves import lines, spread
from polyak.study._effects import Effects, late
from polyak.study._page import Figure
from polyak.study._record_format import Record
from polyak.study._statistics import known
from polyak.study._text import Table, file_name, significant

Read = Callable[[Record], Sequence[float | None]]


def curves(effects: Effects) -> tuple[Figure, ...]:
    """The validation values by step: of each metric of one average, and of the main metric of the best ones.

    The one average is that of `Effects.focus` under the first schedule.
    """
    study = effects.study
    first = next(iter(study.schedules))
    one = effects.focus(first)
    each = [Effects(effects.result, metric) for metric in study.metrics] if one else []
    drawn = [_curves(e, first, [str(one)], f"one_{file_name(e.metric)}", train=True) for e in each]
    drawn += [
        _curves(effects, s, _shown(effects, s), f"curves_{file_name(s)}") for s in study.schedules
    ]
    return tuple(figure for figure in drawn if figure)


def pairs(effects: Effects) -> tuple[Figure, ...]:
    """The last test values of one average and of the live weights, seed by seed, under each schedule."""
    return tuple(
        _pairs(effects, schedule, arm)
        for schedule in effects.study.schedules
        if (arm := effects.focus(schedule)) and effects.pairs(arm, schedule)[0]
    )


def geometry(effects: Effects, schedule: str) -> tuple[Figure, ...]:
    """Distance and cosine between each average and the live weights by step, under a schedule."""
    about = {
        "distance": ("‖average − live‖ / ‖live‖", "Distance between the averages and the live weights"),
        "cosine": ("cosine of the ways from the start", "Cosine between the way of an average and the way of the live weights from the start"),
    }  # fmt: skip
    made = []
    for name, (title, caption) in about.items():
        rows = [
            {"x": row["x"], "curve": arm, "middle": row["middle"]}
            for arm in _shown(effects, schedule)
            for row in _spreads(effects, schedule, arm, arm, lambda r, n=name, a=arm: r[n][a])  # type: ignore[misc]
        ]
        if rows:
            caption = f"{caption}; median over seeds, schedule {schedule}."
            made.append(lines(name, rows, title, caption, "step"))
    return tuple(made)


def _curves(
    effects: Effects, schedule: str, arms: list[str], name: str, train: bool = False
) -> Figure | None:
    """A chart of the live weights and some arms; with the training loss if it is the same function."""
    metric = effects.study.metrics[effects.metric]
    rows = [
        row
        for arm in (LIVE, *arms)
        for row in _spreads(effects, schedule, arm, arm, lambda r, a=arm: r["curves"][a][effects.metric])  # type: ignore[misc]
    ]  # fmt: skip
    if train and metric.function is effects.study.loss:
        rows += _spreads(effects, schedule, LIVE, "train", lambda r: r["train_loss"])
    if not rows:
        return None
    caption = (
        "Line: median over the seeds that are still running, as far as half of them are; band: their middle 80 %; each arm "
        f"at its own learning rate.{late(effects.study, arms)}"
    )
    last = [row for row in rows if 10 * row["x"] >= rows[-1]["x"]]
    low, high = min(row["low"] for row in last), max(row["high"] for row in last)
    log = effects.lower and low > 0 and max(row["high"] for row in rows) > 5 * low
    title = (
        f"{metric.title or effects.metric}, validation: {schedule}{'' if train else ', the best'}"
    )
    domain = () if log or low == high else (low, high)
    return lines(name, rows, title, caption, "step", log=log, domain=domain)


def _pairs(effects: Effects, schedule: str, arm: str) -> Figure:
    columns = [effects.values(name, schedule) for name in (LIVE, arm)]
    numbers = [seed.number for seed in effects.result.seeds]
    both = [each for each in zip(numbers, *columns, strict=True) if len(known(each)) == 3]
    better = sum(own < live if effects.lower else own > live for _, live, own in both)
    name, title = f"pairs_{file_name(schedule)}", f"{effects.metric} on test: {schedule}"
    rows = tuple((str(n), significant(live), significant(own)) for n, live, own in both)
    side = "Below" if effects.lower else "Above"
    return Figure(
        name,
        charts.pairs([{"x": live, "y": own} for _, live, own in both], f"{LIVE} ({title})", arm),
        f"A point for each seed: {LIVE} to the right, {arm} upwards. {side} the dashed line {arm} is better.",
        f"{arm} is better in {better} of {len(both)} seeds.",
        Table(name, f"{title}, {LIVE} and {arm}", ("seed", LIVE, arm), rows, sortable=True),
    )


def _shown(effects: Effects, schedule: str) -> list[str]:
    """The arms that a chart of lines has room for beside the live weights: the focus, and the best ones."""
    best = dict.fromkeys((effects.focus(schedule), *effects.ranked(schedule)))
    return [arm for arm in effects.arms if arm in [*best][: charts.MOST_SERIES - 1]]


def _spreads(effects: Effects, schedule: str, arm: str, curve: str, read: Read) -> charts.Rows:
    """The spread of a curve over seeds at every evaluated step that at least half of the seeds reach."""
    found: dict[int, list[float]] = {}
    for seed in effects.result.seeds:
        if record := seed.record(arm, schedule):
            for step, value in zip(record["steps"], read(record), strict=True):
                if value is not None:
                    found.setdefault(step, []).append(value)
    least = len(effects.result.seeds) / 2
    return [spread(step, curve, v) for step, v in sorted(found.items()) if len(v) >= least]
