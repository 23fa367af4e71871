"""Claims: turn each claim of the article into quantities, and give it a verdict.

A claim has several parts. A part is a quantity with one value per seed, its interval over seeds, and
the range of values for which that part of the claim is true; `_statistics.verdict` decides it. A part
without a range is a figure for information. A claim holds if all its parts hold, and does not hold if
one part does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polyak.study import _article as article
from polyak.study import _quantities as q
from polyak.study._record_format import Record
from polyak.study._region import Region
from polyak.study._statistics import (
    ClaimVerdict,
    Interval,
    around,
    bootstrap,
    combined,
    share,
    verdict,
)

FIGURE_TOLERANCE = 0.25
EPOCH_TOLERANCE = 0.10
MOST_SEEDS = 0.9
SAME = 0.02
POSITIVE = Region.above(0)
BELOW_ONE = Region.below(1)

Records = Sequence[Record]


@dataclass(frozen=True)
class Part:
    """One quantity of a claim, its interval, and the values for which the claim is true."""

    quantity: str
    interval: Interval
    form: str
    claimed: Region | None = None
    wanted: str = ""

    @property
    def verdict(self) -> ClaimVerdict | None:
        """The verdict on this part; None for a figure for information."""
        return verdict(self.interval, self.claimed) if self.claimed else None


@dataclass(frozen=True)
class Judgement:
    """A claim of the article with its parts."""

    claim: str
    text: str
    parts: tuple[Part, ...]

    @property
    def verdict(self) -> ClaimVerdict:
        """The verdict on the claim."""
        return combined([part.verdict for part in self.parts if part.verdict])


def judge(records: Records) -> list[Judgement]:
    """Judge every claim of the article over the seeds."""
    return [
        Judgement(claim, article.CLAIMS[claim], tuple(_PARTS[claim](records)))
        for claim in article.CLAIMS
    ]


def as_json(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """claim -> its text, verdict, figures, deciding interval and parts, for JSON.

    `figures` is quantity -> estimate; `interval` is [low, high] of the first part that has the
    claim's verdict.
    """
    return {judgement.claim: _judgement_json(judgement) for judgement in judgements}


def _judgement_json(judgement: Judgement) -> dict[str, Any]:
    parts = [_part_json(part) for part in judgement.parts]
    deciding = next(part for part in parts if part["verdict"] == judgement.verdict)
    return {
        "claim": judgement.text,
        "verdict": judgement.verdict,
        "figures": {part["quantity"]: part["estimate"] for part in parts},
        "interval": [deciding["low"], deciding["high"]],
        "parts": parts,
    }


def _part_json(part: Part) -> dict[str, Any]:
    return {
        "quantity": part.quantity,
        **part.interval.as_dict(),
        "holds if": part.wanted or None,
        "verdict": part.verdict,
    }


def _early(records: Records) -> list[Part]:
    excess = bootstrap([q.early_log_ratio(r) for r in records]).map(math.expm1)
    most = article.LARGEST_EARLY_EXCESS
    return [
        Part(
            "EMA loss − live loss, mean of epochs 1–30",
            bootstrap([q.early_gap(r) for r in records]),
            "loss", POSITIVE, "above 0",
        ),
        Part(
            "the same as a share of the live model's mean loss there",
            bootstrap([q.early_share(r) for r in records]), "share",
        ),
        Part(
            "EMA loss / live loss − 1 of an epoch, geometric mean of epochs 1–30",
            excess, "share", Region(high=most),
            f"at most {100 * most:.0f} %, the article's largest early excess (“slightly”)",
        ),
        Part(
            "seeds in which the EMA is worse over epochs 1–30",
            share([q.early_gap(r) > 0 for r in records]), "share",
        ),
    ]  # fmt: skip


def _best_live(records: Records) -> list[Part]:
    epoch, loss = article.BEST_LIVE
    epochs = [r["best"]["live"]["epoch"] for r in records]
    near = around(epoch, EPOCH_TOLERANCE)
    return [
        Part(
            "epoch of the live model's lowest validation loss, median",
            bootstrap(epochs, "median"), "epoch", near, f"{near.low:.0f} to {near.high:.0f}",
        ),
        Part(
            "that lowest loss, mean",
            bootstrap([r["best"]["live"]["mse"] for r in records]),
            "loss", around(loss, FIGURE_TOLERANCE), f"within 25 % of {loss}",
        ),
        Part(
            f"seeds whose lowest loss is at epoch {near.low:.0f} to {near.high:.0f}",
            share([e in near for e in epochs]), "share",
        ),
    ]  # fmt: skip


def _overtaking(records: Records) -> list[Part]:
    near = around(article.OVERTAKING_EPOCH, EPOCH_TOLERANCE)
    return [
        Part(
            "epoch from which the EMA stays better until the stop, median (stop + 1 if never)",
            bootstrap([q.overtaking(r) for r in records], "median"),
            "epoch", near, f"{near.low:.0f} to {near.high:.0f}",
        ),
        Part(
            "seeds in which it stays better from epoch 66 at the latest",
            share([q.overtaking(r) <= min(near.high, r["stop_epoch"]) for r in records]),
            "share", Region(low=MOST_SEEDS), f"at least {100 * MOST_SEEDS:.0f} %",
        ),
        Part(
            "first epoch at which the EMA is better, median",
            bootstrap(q.finite(q.first_lead(r) for r in records), "median"), "epoch",
        ),
    ]  # fmt: skip


def _stopping(records: Records) -> list[Part]:
    near = around(article.STOP_EPOCH, EPOCH_TOLERANCE)
    after = [r for r in records if r["after_stop"]["val_loss_ema"]]
    return [
        Part(
            "stop epoch, median",
            bootstrap([r["stop_epoch"] for r in records], "median"),
            "epoch", near, f"{near.low:.0f} to {near.high:.0f}",
        ),
        Part(
            "optimum reached: change of the EMA's lowest loss when training continues after the stop",
            bootstrap([q.after_best(r) for r in after]),
            "share", Region(low=-SAME), f"no lower than −{100 * SAME:.0f} %",
        ),
        Part(
            "over-fitting avoided: change of the EMA's loss from the stop to the end of that training",
            bootstrap([q.after_change(r) for r in after]),
            "share", POSITIVE, "above 0: further training makes it worse",
        ),
        Part(
            "stop epoch, mean", bootstrap([r["stop_epoch"] for r in records]), "epoch",
        ),
    ]  # fmt: skip


def _final(records: Records) -> list[Part]:
    return [part for metric in article.TABLE_FINAL for part in _improvement(records, metric)]


def _improvement(records: Records, metric: str) -> list[Part]:
    """The difference decides the direction, the geometric mean of the ratio the size.

    The plain mean of 1 - EMA / live would be negative even for two equally good models.
    """
    figure = article.TABLE_FINAL[metric][2]
    name, better = ("R²", "higher") if metric == "r2" else (metric.upper(), "lower")
    gains = [q.gain(r, metric) for r in records]
    relative = bootstrap([q.log_improvement(r, metric) for r in records])
    return [
        Part(f"{name} {better} by, mean difference at the stop", bootstrap(gains), metric,
             POSITIVE, "above 0"),
        Part(f"{name} {better} by, as a share of the live model's (geometric mean)",
             relative.map(math.expm1 if metric == "r2" else lambda x: -math.expm1(-x)), "change",
             around(figure, FIGURE_TOLERANCE), f"within 25 % of {100 * figure:g} %"),
        Part(f"seeds in which the EMA's {name} is {better}", share([g > 0 for g in gains]), "share"),
        Part(f"seeds in which it is {better} by {100 * figure:g} % or more",
             share([q.improvement(r, metric) >= figure for r in records]), "share"),
    ]  # fmt: skip


def _smoother(records: Records) -> list[Part]:
    """The article does not tell the window of its figures, so they are shown but not judged."""
    theirs = article.STANDARD_DEVIATIONS[1] / article.STANDARD_DEVIATIONS[0]
    smaller = [q.log_ratio(r, q.deviation, q.last_epochs) < 0 for r in records]
    return [
        Part("standard deviation, EMA / live, last 20 epochs (geometric mean)",
             _ratio(records, q.deviation, q.last_epochs), "ratio", BELOW_ONE, "below 1"),
        Part("standard deviation, EMA / live, epochs from 50",
             _ratio(records, q.deviation, q.from_50), "ratio", BELOW_ONE, "below 1"),
        Part("epoch-to-epoch change, EMA / live, epochs from 50",
             _ratio(records, q.roughness, q.from_50), "ratio", BELOW_ONE, "below 1"),
        Part(f"standard deviation, EMA / live, epochs from 25; the article's is {theirs:.2f}",
             _ratio(records, q.deviation, q.from_25), "ratio"),
        Part("seeds in which the EMA's standard deviation is smaller, last 20 epochs",
             share(smaller), "share"),
    ]  # fmt: skip


def _late(records: Records) -> list[Part]:
    reached = [r for r in records if q.has_late(r)]
    leads = [q.late_lead(r) for r in reached]
    return [
        Part("seeds in which the EMA is below at every epoch from 60 to the stop",
             share([lead == 1 for lead in leads]), "share",
             Region(low=MOST_SEEDS), f"at least {100 * MOST_SEEDS:.0f} %"),
        Part("share of the epochs from 60 to the stop at which the EMA is below, mean",
             bootstrap(leads), "share"),
        Part("mean EMA loss / mean live loss over those epochs (geometric mean)",
             bootstrap([q.late_log_ratio(r) for r in reached]).map(math.exp), "ratio"),
    ]  # fmt: skip


def _above(records: Records) -> list[Part]:
    both = [r["live"]["r2"] > 0.99 and r["average"]["r2"] > 0.99 for r in records]
    high = Region(low=0.99)
    return [
        Part("R² of the live model at the stop, mean",
             bootstrap([r["live"]["r2"] for r in records]), "r2", high, "above .99"),
        Part("R² of the EMA at the stop, mean",
             bootstrap([r["average"]["r2"] for r in records]), "r2", high, "above .99"),
        Part("seeds in which both are above .99", share(both), "share"),
    ]  # fmt: skip


def _ratio(
    records: Records, measure: Callable[[q.Curve], float], window: Callable[[q.Curve], q.Curve]
) -> Interval:
    """Geometric mean over seeds of measure(EMA's curve) / measure(live curve) in a window."""
    return bootstrap(q.finite(q.log_ratio(r, measure, window) for r in records)).map(math.exp)


_PARTS: dict[str, Callable[[Records], list[Part]]] = {
    "C1": _early,
    "C2": _best_live,
    "C3": _overtaking,
    "C4": _stopping,
    "C5": _final,
    "C6": _smoother,
    "C7": _late,
    "C8": _above,
}
