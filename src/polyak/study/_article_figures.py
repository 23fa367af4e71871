"""The article's figures over seeds: its two panels, and what a single run cannot show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from polyak.rules import LIVE
from polyak.study import _article as article
from polyak.study import _figures as charts
from polyak.study import _quantities as q
from polyak.study._curves import lines, spreads
from polyak.study._page import Figure
from polyak.study._record_format import Record
from polyak.study._statistics import Interval, bootstrap
from polyak.study._text import Table, between, number

Records = Sequence[Record]

LOSSES = {"val_loss_original": "live", "val_loss_ema": "EMA", "train_loss": "train"}
R2 = {"r2_original": "live", "r2_ema": "EMA"}


def curves(records: Records) -> tuple[Figure, ...]:
    """The article's figure over seeds: the median and the middle 80 % of seeds, by epoch."""
    caption = "Line: median over seeds; band: the middle 80 % of seeds; up to the epoch that half of them reach."
    losses, scores = _spread(records, LOSSES), _spread(records, R2)
    return (
        _curves("losses", losses, "loss (MSE, log scale)", caption, log=True, domain=(0.001, 1)),
        _curves("r2", scores, "R² on validation; below .96 cut off", caption, domain=(0.96, 1)),
    )


def one_seed(record: Record) -> tuple[Figure, ...]:
    """The article's figure of a single run."""
    caption, seed = "One run.", f", seed {record['seed']}"
    losses, scores = _single(record, LOSSES), _single(record, R2)
    return (
        _curves(
            "losses_one",
            losses,
            f"loss (MSE, log scale){seed}",
            caption,
            log=True,
            domain=(0.001, 1),
        ),
        _curves(
            "r2_one",
            scores,
            f"R² on validation; below .96 cut off{seed}",
            caption,
            domain=(0.96, 1),
        ),
    )


def final(records: Records) -> tuple[Figure, ...]:
    """The pair of each seed at the stop, and the distribution of the paired relative difference."""
    rows = [{"seed": r["seed"], "x": r["live"]["mse"], "y": r["average"]["mse"]} for r in records]
    gains = [100 * -math.expm1(-q.log_improvement(r, "mse")) for r in records]
    live, average, theirs = article.TABLE_FINAL["mse"]
    better = sum(row["y"] < row["x"] for row in rows)
    table = Table(
        "pairs", "MSE at the stop, seed by seed", ("seed", "live", "EMA"),
        tuple((str(r["seed"]), number(r["x"], 5), number(r["y"], 5)) for r in rows), sortable=True,
    )  # fmt: skip
    below = Table(
        "improvement", "MSE of the EMA below the live model's, %, seed by seed", ("seed", "below by, %"),
        tuple((str(r["seed"]), number(g, 1)) for r, g in zip(rows, gains, strict=True)), sortable=True,
    )  # fmt: skip
    return (
        Figure("pairs", charts.pairs(rows, "MSE of the live model at the stop", "MSE of the EMA at the stop", (live, average)),
               "A point per seed; the cross is the article's run. Below the dashed line the EMA is better.",
               f"The EMA is better in {better} of {len(rows)} seeds.", table),
        Figure("improvement", charts.histogram(gains, 10, "MSE of the EMA below the live model's, %", "seeds", 100 * theirs),
               f"Right of 0 the EMA is better. Dashed: the article's {100 * theirs:g} %.",
               f"Half of the seeds lie above {number(float(np.median(gains)), 1)} %.", below),
    )  # fmt: skip


def epochs(records: Records) -> tuple[Figure, ...]:
    """The epochs of the events of claims 2 to 4 over seeds, and in the article's run."""
    events: dict[str, tuple[str, float, Callable[[Record], float]]] = {
        "best": ("the live model's lowest loss", article.BEST_LIVE[0], lambda r: r["best"]["live"]["epoch"]),
        "lead": ("the EMA stays better from here (never: stop + 1)", article.OVERTAKING_EPOCH, q.overtaking),
        "stop": ("the early stop", article.STOP_EPOCH, lambda r: r["stop_epoch"]),
    }  # fmt: skip
    return tuple(_event(name, records, *about) for name, about in events.items())


def arms(records: Records) -> tuple[Figure, ...]:
    """The paired difference between the MSE of every arm and of the live model, with its interval."""
    found: dict[str, Interval] = {}
    for name in (n for n in records[0]["arms"] if n != LIVE):
        pairs = zip(q.per_seed(records, name, "mse"), q.per_seed(records, LIVE, "mse"), strict=True)
        found[name] = bootstrap([1000 * (arm - live) for arm, live in pairs])
    below = [name for name, interval in found.items() if interval.high < 0]
    table = Table(
        "arms_chart", "MSE − live model's, ×10³", ("arm", "mean [95 % interval]"),
        tuple((name, between(interval, lambda v: number(v, 3))) for name, interval in found.items()),
    )  # fmt: skip
    return (
        Figure("arms", charts.forest(found, "MSE − live model's, ×10³", "arm"),
               "Mean paired difference at the stop with its 95 % interval; left of 0 the average is better. "
               "A hollow point: the interval holds 0.",
               f"Wholly below 0: {', '.join(below) or 'none'}.", table),
    )  # fmt: skip


def after_stop(records: Records) -> tuple[Figure, ...]:
    """The validation losses around the stop, divided by the EMA's loss at the stop."""
    whole = [r for r in records if r["stop_epoch"] >= q.LAST]
    around = {
        label: np.array([_around_stop(r, name) for r in whole]).reshape(len(whole), -1).T.tolist()
        for name, label in LOSSES.items()
        if label != "train"
    }
    rows = [row for label, matrix in around.items() for row in spreads(1 - q.LAST, label, matrix)]
    caption = "Line: median over seeds; band: the middle 80 % of seeds. Epoch 0 is the early stop."
    title = "validation loss / the EMA's loss at the stop"
    return (
        (_curves("after_stop", rows, title, caption, x="epochs from the early stop"),)
        if rows
        else ()
    )


def _event(
    name: str, records: Records, what: str, theirs: float, event: Callable[[Record], float]
) -> Figure:
    values = [float(event(r)) for r in records]
    middle = bootstrap(values, "median")
    caption = f"Epoch of: {what}. Dashed: the article's {theirs:g}."
    table = Table(
        f"epoch_{name}", f"Epoch of: {what}", ("seed", "epoch"),
        tuple((str(r["seed"]), f"{v:g}") for r, v in zip(records, values, strict=True)), sortable=True,
    )  # fmt: skip
    chart = charts.histogram(values, 5, "epoch", "seeds", theirs)
    words = f"The median is {between(middle, lambda v: number(v, 1))}."
    return Figure(f"epoch_{name}", chart, caption, words, table)


def _curves(
    name: str, rows: charts.Rows, title: str, caption: str, *, log: bool = False,
    domain: Sequence[float] = (), x: str = "epoch",
) -> Figure:  # fmt: skip
    return lines(name, rows, title, f"{_sentence(title)}. {caption}", x, log=log, domain=domain)


def _around_stop(record: Record, name: str) -> list[float]:
    """The losses of the last 20 epochs and of those after the stop, divided by the EMA's loss at it."""
    values = [*record["history"][name][-q.LAST :], *record["after_stop"][name]]
    return [value / record["average"]["mse"] for value in values]


def _spread(records: Records, names: Mapping[str, str]) -> charts.Rows:
    """Quantiles over the seeds still running, for each epoch that at least half of the seeds reach."""
    longest = int(np.median([r["stop_epoch"] for r in records]))
    running = [[r for r in records if r["stop_epoch"] >= epoch] for epoch in range(1, longest + 1)]
    return [
        row
        for name, label in names.items()
        for row in spreads(1, label, [[r["history"][name][i] for r in runs] for i, runs in enumerate(running)])
    ]  # fmt: skip


def _single(record: Record, names: Mapping[str, str]) -> charts.Rows:
    return [
        {"x": i + 1, "curve": label, "middle": value}
        for name, label in names.items()
        for i, value in enumerate(record["history"][name])
    ]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
