"""The article's claims as quantities of a seed. Epochs count from 1; an evaluation is one epoch.

The tolerances are the study's, since the article gives none: 25 % for a figure, 10 % for an epoch, 90 % of
the seeds for "to the end" and "always", 2 % for "the optimum is reached", 5 % for "as good".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from polyak.rules import LIVE
from polyak.study import Claim, Region, Seed, log_ratio

EMA = "article_ema"
EARLY, LATE, LAST = 30, 60, 20

Curve = list[float]


def curves(seed: Seed) -> tuple[Curve, Curve]:
    """The validation losses of the live model and of the EMA, epoch by epoch."""
    return seed.curve(LIVE), seed.curve(EMA)


def early_gap(seed: Seed) -> float:
    """The mean of EMA loss - live loss over epochs 1 to 30."""
    live, ema = curves(seed)
    return fmean(ema[:EARLY]) - fmean(live[:EARLY])


def early_log_ratio(seed: Seed) -> float:
    """The mean of log(EMA loss / live loss) over epochs 1 to 30."""
    live, ema = (curve[:EARLY] for curve in curves(seed))
    return fmean(math.log(b / a) for a, b in zip(live, ema, strict=True))


def best_epoch(seed: Seed) -> float:
    """The epoch of the live model's lowest loss."""
    live, _ = curves(seed)
    return live.index(min(live)) + 1


def best_loss(seed: Seed) -> float:
    """The live model's lowest loss."""
    return min(curves(seed)[0])


def overtaking(seed: Seed) -> float:
    """The epoch from which the EMA stays better until the stop; stop + 1 if never."""
    pairs = enumerate(zip(*curves(seed), strict=True), 1)
    return max((number for number, (live, ema) in pairs if ema >= live), default=0) + 1


def overtaken_for_good(seed: Seed) -> float:
    """Whether the EMA stays better from epoch 66 at the latest."""
    return float(overtaking(seed) <= min(66, stop_epoch(seed)))


def stop_epoch(seed: Seed) -> float:
    """The epoch of the early stop."""
    return len(seed.steps())


def _after_stop(seed: Seed) -> Curve:
    """The EMA's losses of the epochs after the stop."""
    record: Any = seed.record()
    losses: Curve = record["after_stop"]["curves"][EMA]["mse"]
    return losses


def after_best(seed: Seed) -> float:
    """The change of the EMA's lowest loss by the epochs after the stop, as a share; at most 0."""
    return min(min(_after_stop(seed)) / min(curves(seed)[1]) - 1, 0.0)


def after_change(seed: Seed) -> float:
    """The change of the EMA's loss from the stop to the mean of the last 5 epochs after it, as a share."""
    return fmean(_after_stop(seed)[-5:]) / seed.value(EMA) - 1


def log_ratio_from(
    first: int, measure: Callable[[Curve], float] = stdev
) -> Callable[[Seed], float]:
    """log(EMA / live) of a measure of the loss curves from epoch `first`, or of the last `-first` epochs."""

    def quantity(seed: Seed) -> float:
        live, ema = (curve[first - 1 if first > 0 else first :] for curve in curves(seed))
        return math.log(measure(ema) / measure(live)) if len(live) > 1 else math.nan

    return quantity


def roughness(curve: Curve) -> float:
    """The root mean square of the change from epoch to epoch: the fluctuation without the trend."""
    return math.sqrt(fmean((b - a) ** 2 for a, b in pairwise(curve)))


def late_lead(seed: Seed) -> float:
    """The share of epochs from 60 to the stop at which the EMA's loss is lower; NaN if there is none."""
    pairs = list(zip(*curves(seed), strict=True))[LATE - 1 :]
    return fmean(ema < live for live, ema in pairs) if pairs else math.nan


def always_lower(seed: Seed) -> float:
    """Whether the EMA's loss is lower at every epoch from 60 to the stop; NaN if there is none."""
    lead = late_lead(seed)
    return lead if math.isnan(lead) else float(lead == 1)


def r2_of(arm: str) -> Callable[[Seed], float]:
    """R² of an arm at the stop."""
    return lambda seed: seed.value(arm, "r2")


def _logs(low: float, high: float) -> Region:
    """The logs of ratios from `1 + low` to `1 + high`."""
    return Region.between(math.log1p(low), math.log1p(high))


def _parts(sentence: str, *parts: dict[str, Any]) -> list[Claim]:
    return [Claim(sentence, source="the article", **part) for part in parts]


MOST = Region.between(0.9, 1)
FIVE = _logs(-0.05, 0.05)
IN_WORDS = "in words in the article; the 5 % are the study's"

CLAIMS = (
    *_parts(
        "C1. Early, in epochs 1 to 30, the EMA is slightly worse than the live model.",
        {"what": "EMA loss − live loss", "quantity": early_gap, "region": Region.above(0), "form": "number"},
        {"what": "EMA loss / live loss of an epoch, mean of log ratios; at most the article's largest", "quantity": early_log_ratio, "region": Region.below(math.log(1.36)), "form": "factor"},
    ),
    *_parts(
        "C2. The live model is best at epoch 50, with a validation loss of .0037.",
        {"what": "epoch of its lowest loss", "quantity": best_epoch, "region": Region.between(45, 55), "form": "steps", "statistic": "median"},
        {"what": "its lowest loss", "quantity": best_loss, "region": Region.between(0.75 * 0.0037, 1.25 * 0.0037), "form": "number"},
    ),
    *_parts(
        "C3. The EMA overtakes the live model at epoch 60 and stays better to the end.",
        {"what": "epoch from which it stays better until the stop (never: stop + 1)", "quantity": overtaking, "region": Region.between(54, 66), "form": "steps", "statistic": "median"},
        {"what": "whether it stays better from epoch 66 at the latest", "quantity": overtaken_for_good, "region": MOST},
    ),
    *_parts(
        "C4. Early stopping fires at epoch 97; the optimum is reached and over-fitting avoided.",
        {"what": "epoch of the stop", "quantity": stop_epoch, "region": Region.between(87.3, 106.7), "form": "steps", "statistic": "median"},
        {"what": "optimum reached: change of the EMA's lowest loss when training goes on for 25 epochs", "quantity": after_best, "region": Region.above(-0.02)},
        {"what": "over-fitting avoided: change of the EMA's loss by then", "quantity": after_change, "region": Region.above(0)},
    ),
    *_parts(
        "C5. At the stop the EMA's MSE is 20 % lower, its MAE 9.5 % lower, its R² .11 % higher.",
        {"what": "change of the MSE", "quantity": log_ratio(EMA), "region": _logs(-0.25, -0.15), "form": "percent"},
        {"what": "change of the MAE", "quantity": log_ratio(EMA, metric="mae"), "region": _logs(-0.119, -0.071), "form": "percent"},
        {"what": "change of R²", "quantity": log_ratio(EMA, metric="r2"), "region": _logs(0.0008, 0.0014), "form": "percent"},
    ),
    *_parts(
        "C6. The EMA's validation loss is smoother: standard deviation .0015 against .0023.",
        {"what": "standard deviation, EMA / live, last 20 epochs", "quantity": log_ratio_from(-LAST), "region": Region.below(0), "form": "factor"},
        {"what": "standard deviation, EMA / live, epochs from 50", "quantity": log_ratio_from(50), "region": Region.below(0), "form": "factor"},
        {"what": "change from epoch to epoch, EMA / live, epochs from 50", "quantity": log_ratio_from(50, roughness), "region": Region.below(0), "form": "factor"},
    ),
    *_parts(
        "C7. Late in training the EMA's loss lies always below the live model's.",
        {"what": "whether it is lower at every epoch from 60 to the stop", "quantity": always_lower, "region": MOST},
        {"what": "mean EMA loss / mean live loss over those epochs", "quantity": log_ratio_from(LATE, fmean), "region": Region.below(0), "form": "factor"},
    ),
    *_parts(
        "C8. Both models end with R² above .99.",
        *({"what": f"R² of {arm} at the stop", "quantity": r2_of(arm), "region": Region.above(0.99), "form": "number"} for arm in (LIVE, EMA)),
    ),
    *(
        Claim(sentence, log_ratio(EMA, against=arm), FIVE, IN_WORDS, "factor", f"EMA loss / loss of {arm} at the stop")
        for sentence, arm in (
            ("T7. The EMA is as good as a simple moving average (SMA).", "sma_500"),
            ("T8. The EMA is as good as stochastic weight averaging (SWA).", "swa_75"),
            ("T9. The EMA is as good as an ensemble, which costs more.", "ensemble_10"),
        )
    ),
)  # fmt: skip
