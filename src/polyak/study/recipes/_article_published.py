"""The figures that the article reports of its one run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import stdev
from typing import Any

from polyak.rules import LIVE
from polyak.study import Published, Seed, log_ratio
from polyak.study.recipes import _article_claims as of
from polyak.study.recipes._article_claims import EMA

COLUMNS = ("train loss", "live loss", "live R²", "EMA loss", "EMA R²")
EPOCHS = {  # table 4.1: epoch -> one figure for each column
    10: (0.0843, 0.0209, 0.9796, 0.0233, 0.9773),
    20: (0.0536, 0.0100, 0.9902, 0.0110, 0.9892),
    30: (0.0398, 0.0055, 0.9947, 0.0075, 0.9927),
    40: (0.0367, 0.0043, 0.9958, 0.0051, 0.9950),
    50: (0.0369, 0.0037, 0.9964, 0.0051, 0.9951),
    60: (0.0297, 0.0053, 0.9949, 0.0041, 0.9960),
    70: (0.0271, 0.0053, 0.9948, 0.0043, 0.9958),
    80: (0.0251, 0.0052, 0.9950, 0.0044, 0.9957),
    90: (0.0274, 0.0051, 0.9950, 0.0044, 0.9957),
}
STOP = {"mse": (0.0055, 0.0044, -0.2), "mae": (0.0581, 0.0526, -0.095), "r2": (0.9946, 0.9957, 0.0011)}  # fmt: skip


def _train_loss(seed: Seed) -> list[float]:
    record: Any = seed.record()
    losses: list[float] = record["train_loss"]
    return losses


def _curves(seed: Seed) -> tuple[list[float], ...]:
    """A curve for each column."""
    values = (seed.curve(arm, metric) for arm in (LIVE, EMA) for metric in ("mse", "r2"))
    return _train_loss(seed), *values


def at_epoch(column: int, epoch: int, seed: Seed) -> float:
    """A column at an epoch; NaN for a run that stopped before."""
    curve = _curves(seed)[column]
    return curve[epoch - 1] if len(curve) >= epoch else math.nan


def deviation(arm: str, first: int, seed: Seed) -> float:
    """The standard deviation of an arm's loss from an epoch to the stop, or of the last `-first` epochs."""
    curve = seed.curve(arm)[first - 1 if first > 0 else first :]
    return stdev(curve) if len(curve) > 1 else math.nan


def _at_stop(metric: str, live: float, ema: float, change: float) -> list[Published]:
    name, source = "R²" if metric == "r2" else metric.upper(), "table 4.3, at the stop"
    values: dict[str, tuple[Callable[[Seed], float], float, str]] = {
        f"{name}, live": (lambda seed: seed.value(LIVE, metric), live, "number"),
        f"{name}, EMA": (lambda seed: seed.value(EMA, metric), ema, "number"),
        f"{name}, change by the EMA": (log_ratio(EMA, metric=metric), math.log1p(change), "percent"),
    }  # fmt: skip
    return [Published(what, *about[:2], source, about[2]) for what, about in values.items()]


PUBLISHED = (
    *(
        Published(f"epoch {epoch}: {name}", partial(at_epoch, i, epoch), figure, "table 4.1, by epoch")
        for epoch, figures in EPOCHS.items()
        for i, (name, figure) in enumerate(zip(COLUMNS, figures, strict=True))
    ),
    *(each for metric, figures in STOP.items() for each in _at_stop(metric, *figures)),
    *(
        Published(f"standard deviation of the {name} loss, {window}", partial(deviation, arm, first), figure, "standard deviations, whose window is not stated")
        for first, window in ((-of.LAST, "last 20 epochs"), (50, "epochs from 50"), (25, "epochs from 25"), (1, "all epochs"))
        for name, arm, figure in (("live", LIVE, 0.0023), ("EMA's", EMA, 0.0015))
    ),
    Published("epoch of the live model's lowest loss", of.best_epoch, 50, "the text", "steps"),
    Published("the live model's lowest loss", of.best_loss, 0.0037, "the text"),
    Published("epoch from which the EMA stays better (never: stop + 1)", of.overtaking, 60, "the text", "steps"),
    Published("share of the epochs from 60 to the stop at which the EMA is better", of.late_lead, 1, "the text", "share"),
    Published("epoch of the early stop", of.stop_epoch, 97, "the text", "steps"),
)  # fmt: skip
