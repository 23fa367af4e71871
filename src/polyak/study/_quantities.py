"""Quantities: one number per seed, from its record. Epochs count from 1, as in the article."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from polyak.study._record_format import Record

LAST = 20
LATE = 60
EARLY = 30

Curve = NDArray[np.float64]


def curves(record: Record, phase: str = "history") -> tuple[Curve, Curve]:
    """The validation losses of the live model and of the article's EMA, epoch by epoch."""
    history = record[phase]
    return np.array(history["val_loss_original"]), np.array(history["val_loss_ema"])


def early_gap(record: Record) -> float:
    """Mean over epochs 1 to 30 of EMA loss - live loss."""
    live, average = curves(record)
    return float((average - live)[:EARLY].mean())


def early_share(record: Record) -> float:
    """Mean over epochs 1 to 30 of EMA loss - live loss, as a share of the mean live loss there."""
    live, _ = curves(record)
    return early_gap(record) / float(live[:EARLY].mean())


def early_log_ratio(record: Record) -> float:
    """Mean over epochs 1 to 30 of log(EMA loss / live loss)."""
    live, average = curves(record)
    return float(np.log(average / live)[:EARLY].mean())


def overtaking(record: Record) -> int:
    """The epoch from which the EMA's loss stays below the live loss until the stop; stop + 1 if never."""
    live, average = curves(record)
    behind = np.flatnonzero(average >= live)
    return int(behind[-1]) + 2 if len(behind) else 1


def first_lead(record: Record) -> float:
    """The first epoch at which the EMA's loss is below the live loss; infinite if never."""
    live, average = curves(record)
    ahead = np.flatnonzero(average < live)
    return float(ahead[0] + 1) if len(ahead) else math.inf


def improvement(record: Record, metric: str) -> float:
    """The relative improvement by the average at the stop, computed as in the article."""
    live, average = record["live"][metric], record["average"][metric]
    change = (average - live) / live
    return float(change if metric == "r2" else -change)


def gain(record: Record, metric: str) -> float:
    """The improvement by the average at the stop, in the unit of the metric."""
    difference = record["average"][metric] - record["live"][metric]
    return float(difference if metric == "r2" else -difference)


def log_improvement(record: Record, metric: str) -> float:
    """The log of the ratio of the two models at the stop, above 0 if the average is better."""
    ratio = math.log(record["average"][metric] / record["live"][metric])
    return ratio if metric == "r2" else -ratio


def late(record: Record) -> slice:
    """The late epochs: from epoch 60 to the stop."""
    return slice(LATE - 1, record["stop_epoch"])


def has_late(record: Record) -> bool:
    """Whether the run reached epoch 60."""
    return bool(record["stop_epoch"] >= LATE)


def late_lead(record: Record) -> float:
    """The share of late epochs at which the EMA's loss is below the live loss."""
    live, average = (curve[late(record)] for curve in curves(record))
    return float((average < live).mean())


def late_log_ratio(record: Record) -> float:
    """log(mean EMA loss / mean live loss) over the late epochs."""
    live, average = (curve[late(record)] for curve in curves(record))
    return float(np.log(average.mean() / live.mean()))


def last_epochs(curve: Curve) -> Curve:
    """The window `last 20`: the last 20 epochs before the stop."""
    return curve[-LAST:]


def from_50(curve: Curve) -> Curve:
    """The window `from 50`: all epochs from 50 to the stop; empty if the run stopped earlier."""
    return curve[49:]


def from_25(curve: Curve) -> Curve:
    """The window `from 25`: all epochs from 25 to the stop."""
    return curve[24:]


def deviation(curve: Curve) -> float:
    """Sample standard deviation; NaN for fewer than two epochs."""
    return float(curve.std(ddof=1)) if len(curve) > 1 else math.nan


def roughness(curve: Curve) -> float:
    """Root mean square of the change from epoch to epoch: the fluctuation without the trend."""
    return float(np.sqrt(np.square(np.diff(curve)).mean())) if len(curve) > 1 else math.nan


def log_ratio(
    record: Record, measure: Callable[[Curve], float], window: Callable[[Curve], Curve]
) -> float:
    """log(measure of the EMA's curve / measure of the live curve) in a window; NaN for a short run."""
    live, average = (measure(window(curve)) for curve in curves(record))
    return math.log(average / live)


def finite(values: Iterable[float]) -> list[float]:
    """The finite values: a quantity leaves out seeds whose run was too short for it."""
    return [value for value in values if math.isfinite(value)]


def after_best(record: Record) -> float:
    """Relative change of the EMA's lowest loss when the epochs after the stop are included; <= 0."""
    after = min(curves(record, "after_stop")[1])
    return float(min(after / record["best"]["average"]["mse"] - 1, 0.0))


def after_change(record: Record) -> float:
    """Relative change of the EMA's loss from the stop to the mean of the last 5 epochs after it."""
    after = curves(record, "after_stop")[1]
    return float(after[-5:].mean() / record["average"]["mse"] - 1)


def arm_log_ratio(record: Record, arm: str, reference: str) -> float:
    """log(MSE of an arm / MSE of another) at the stop."""
    arms = record["arms"]
    return math.log(arms[arm]["mse"] / arms[reference]["mse"])


def per_seed(records: Sequence[Record], arm: str, metric: str) -> list[float]:
    """One metric of one arm at the stop, seed by seed."""
    return [record["arms"][arm][metric] for record in records]
