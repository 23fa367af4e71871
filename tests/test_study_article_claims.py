"""The article's claims on runs that never were: where it is right by construction they hold, and so on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from polyak.study import Result, Seed
from polyak.study._judging import Judgement, judge
from polyak.study._rehearsal import rehearse
from polyak.study.recipes import _article_claims as of
from polyak.study.recipes._article_published import PUBLISHED, STOP, deviation
from polyak.study.recipes.article import study

SEEDS, EPOCHS = 64, 97
OTHERS = ("sma_500", "swa_75", "ensemble_10")

Curve = NDArray[np.float64]


def record(seed: int, live: Any, ema: Any, after: Any = (0.004,) * 25) -> dict[str, Any]:
    """A record with the given validation losses; R², MAE and the values of the other arms follow."""
    curves = {
        arm: _metrics(live if arm == "live" else ema) for arm in ("live", "article_ema", *OTHERS)
    }
    last = {arm: {m: values[-1] for m, values in each.items()} for arm, each in curves.items()}
    return {
        "seed": seed, "schedule": "plateau", "learning_rate": 1e-3,
        "steps": [50 * epoch for epoch in range(1, len(live) + 1)],
        "train_loss": [0.03] * len(live), "curves": curves,
        "test": {arm: {"last": values} for arm, values in last.items()},
        "after_stop": {"curves": {"article_ema": _metrics(after)}},
    }  # fmt: skip


def _metrics(losses: Any) -> dict[str, list[float]]:
    mse = np.asarray(losses, dtype=float)
    return {"mse": mse.tolist(), "mae": (0.8 * mse**0.5).tolist(), "r2": (1 - mse).tolist()}


def faithful(seed: int) -> dict[str, Any]:
    """A run in which every claim of the article is true."""
    generator = np.random.default_rng(seed)
    epochs = np.arange(1, EPOCHS + 1)
    live = np.where(epochs < 60, 0.0037 + 0.0002 * abs(epochs - 50), 0.0055)
    ema = np.where(epochs < 60, 1.1 * live, 0.0044)
    wobble = (0.0005 * generator.standard_normal(EPOCHS)).clip(-0.0009, 0.0009)
    wobble[epochs < 60] = 0
    found = record(seed, live + wobble, ema + wobble / 10, np.linspace(0.0045, 0.0060, 25))
    for metric, figures in STOP.items():
        for arm, figure in zip(("live", "article_ema"), figures, strict=False):
            found["test"][arm]["last"][metric] = figure * (1 + 2e-5 * generator.standard_normal())
    return found


def contrary(seed: int) -> dict[str, Any]:
    """A run in which each of them is false."""
    generator = np.random.default_rng(seed)
    live = 0.05 * np.exp(-np.arange(200) / 20) + 0.02
    ema = live * 0.9
    ema[60:] = live[60:] * 1.2 + 0.004 * generator.standard_normal(140).clip(-0.5, 0.5)
    found = record(seed, live, ema, np.full(25, 0.01))
    for arm in OTHERS:
        found["test"][arm] = {"last": {"mse": 0.5 * float(ema[-1])}}
    return found


def mixed(seed: int) -> dict[str, Any]:
    """A run of either kind."""
    return faithful(seed) if seed % 2 else contrary(seed)


def judged(make: Any, seeds: int = SEEDS) -> list[Judgement]:
    return judge(Result(study, [make(seed) for seed in range(seeds)]))


def verdicts(make: Any, seeds: int = SEEDS) -> set[str]:
    return {each.verdict for each in judged(make, seeds)}


def test_true_claims_hold_in_every_part() -> None:
    parts = [part for each in judged(faithful) for part in each.parts]
    assert {part.verdict for part in parts} == {"holds"} and len(parts) == len(study.claims)


def test_false_claims_do_not_hold() -> None:
    assert verdicts(contrary) == {"does not hold"}


def test_few_runs_leave_every_claim_undecided() -> None:
    assert verdicts(faithful, 5) == verdicts(contrary, 1) == {"undecided"}


def test_runs_of_both_kinds_are_no_proof() -> None:
    assert "holds" not in verdicts(mixed)


def test_there_are_the_articles_eight_claims_and_its_three_comparisons() -> None:
    labels = [each.sentence.split(".")[0] for each in judged(faithful)]
    assert labels == [*(f"C{i}" for i in range(1, 9)), "T7", "T8", "T9"]


def test_a_run_that_stops_early_has_no_late_epochs() -> None:
    late = judged(lambda seed: record(seed, [0.3, 0.2], [0.4, 0.3]), 9)[6]
    assert late.verdict == "undecided" and [part.missing for part in late.parts] == [9, 9]


def seed_of(found: dict[str, Any]) -> Seed:
    return Result(study, [found]).seeds[0]


@pytest.mark.parametrize(
    ("live", "ema", "wanted"),
    [
        ([3, 2, 1], [4, 3, 2], 4),  # never: the epoch after the stop
        ([3, 2, 1], [4, 1, 0.5], 2),
        ([3, 2, 1], [2, 1, 0.5], 1),
        ([3, 2, 1], [2, 3, 0.5], 3),
        ([3, 2, 1], [2, 1, 1], 4),  # equal is not below
    ],
)
def test_overtaking_counts_from_one(live: list[float], ema: list[float], wanted: int) -> None:
    seed = seed_of(record(0, live, ema))
    assert of.overtaking(seed) == wanted
    assert of.overtaken_for_good(seed) == (wanted < 4)


def test_quantities_against_numpy() -> None:
    live, ema, after = np.random.default_rng(0).uniform(0.001, 0.01, (3, 80))
    seed = seed_of(record(0, live, ema, after[:25]))
    expected = {
        of.early_gap: np.mean(ema[:30] - live[:30]),
        of.early_log_ratio: np.mean(np.log(ema[:30] / live[:30])),
        of.best_epoch: np.argmin(live) + 1,
        of.best_loss: live.min(),
        of.stop_epoch: 80,
        of.after_best: min(0, after[:25].min() / ema.min() - 1),
        of.after_change: after[20:25].mean() / ema[-1] - 1,
        of.late_lead: np.mean(ema[59:] < live[59:]),
        of.log_ratio_from(-20): np.log(np.std(ema[-20:], ddof=1) / np.std(live[-20:], ddof=1)),
        of.log_ratio_from(50): np.log(np.std(ema[49:], ddof=1) / np.std(live[49:], ddof=1)),
        of.log_ratio_from(50, of.roughness): np.log(
            np.sqrt(np.mean(np.diff(ema[49:]) ** 2) / np.mean(np.diff(live[49:]) ** 2))
        ),
    }
    for quantity, wanted in expected.items():
        assert quantity(seed) == pytest.approx(wanted)
    assert deviation("live", 50, seed) == pytest.approx(np.std(live[49:], ddof=1))
    assert deviation("article_ema", -20, seed) == pytest.approx(np.std(ema[-20:], ddof=1))


def test_published_figures_are_read_where_the_article_reports_them() -> None:
    live, ema = (np.linspace(*ends, 85) for ends in ((0.5, 0.1), (0.4, 0.2)))
    found = record(0, live, ema)
    found["train_loss"] = np.linspace(1, 2, 85).tolist()
    seed = seed_of(found)
    got = {each.what: each.quantity(seed) for each in PUBLISHED}
    assert got["epoch 10: live loss"] == live[9] and got["epoch 10: EMA R²"] == 1 - ema[9]
    assert got["epoch 80: train loss"] == found["train_loss"][79]
    assert math.isnan(got["epoch 90: live R²"])  # it stopped before
    assert got["MSE, live"] == live[-1] and got["R², EMA"] == 1 - ema[-1]
    assert got["MAE, change by the EMA"] == pytest.approx(math.log(ema[-1] / live[-1]) / 2)
    assert got["epoch of the early stop"] == 85
    assert len(PUBLISHED) == 9 * 5 + 3 * 3 + 4 * 2 + 5


def test_every_name_in_the_claims_exists() -> None:
    rehearse(study)
