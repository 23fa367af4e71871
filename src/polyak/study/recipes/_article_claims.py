"""The article's eight claims as quantities of a seed. Epochs count from 1; an evaluation is one epoch.

The tolerances are the study's, since the article gives none: 25 % for a figure, 10 % for an epoch.
"""

from __future__ import annotations

import math
from statistics import fmean, stdev

from polyak.rules import LIVE
from polyak.study import Claim, Region, Seed, gain

EMA = "article_ema"
EARLY, LATE, LAST = 30, 60, 20


def _curves(seed: Seed) -> tuple[list[float], list[float]]:
    """The validation losses of the live model and of the EMA, epoch by epoch."""
    return seed.curve(LIVE), seed.curve(EMA)


def early_excess(seed: Seed) -> float:
    """The geometric mean of EMA loss / live loss over epochs 1 to 30, less 1."""
    live, ema = (curve[:EARLY] for curve in _curves(seed))
    return math.expm1(fmean(math.log(b / a) for a, b in zip(live, ema, strict=True)))


def best_epoch(seed: Seed) -> float:
    """The epoch of the live model's lowest loss."""
    live, _ = _curves(seed)
    return live.index(min(live)) + 1


def overtaking(seed: Seed) -> float:
    """The epoch from which the EMA stays better until the stop; stop + 1 if never."""
    pairs = list(zip(*_curves(seed), strict=True))
    return (
        max((number for number, (live, ema) in enumerate(pairs, 1) if ema >= live), default=0) + 1
    )


def stop_epoch(seed: Seed) -> float:
    """The epoch of the early stop."""
    return len(seed.steps())


def smoothness(seed: Seed) -> float:
    """The standard deviation of the EMA's loss over that of the live loss, last 20 epochs."""
    live, ema = (curve[-LAST:] for curve in _curves(seed))
    return stdev(ema) / stdev(live)


def late_lead(seed: Seed) -> float:
    """The share of epochs from 60 to the stop at which the EMA's loss is lower; NaN if there is none."""
    pairs = list(zip(*_curves(seed), strict=True))[LATE - 1 :]
    return fmean(ema < live for live, ema in pairs) if pairs else math.nan


def lower_r2(seed: Seed) -> float:
    """The lower of the two R² at the stop."""
    return min(seed.value(arm, "r2") for arm in (LIVE, EMA))


CLAIMS = (
    Claim("Early, in epochs 1 to 30, the EMA is slightly worse than the live model.", early_excess, Region.between(0, 0.36)),
    Claim("The live model is best at epoch 50.", best_epoch, Region.between(45, 55), form="steps"),
    Claim("The EMA overtakes the live model at epoch 60 and stays better to the end.", overtaking, Region.between(54, 66), form="steps"),
    Claim("Early stopping fires at epoch 97.", stop_epoch, Region.between(87.3, 106.7), form="steps"),
    Claim("At the stop the EMA's MSE is 20 % lower.", gain(EMA), Region.between(0.15, 0.25)),
    Claim("The EMA's validation loss is smoother.", smoothness, Region.below(1), form="ratio"),
    Claim("Late in training the EMA's loss lies always below the live model's.", late_lead, Region.between(0.9, 1)),
    Claim("Both models end with R² above .99.", lower_r2, Region.above(0.99), form="number"),
)  # fmt: skip
