"""The article as a recipe is the plain script, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from torch import Tensor, nn

from polyak.study import Arm, Metric, Plateau, recipes
from polyak.study._loop import Run, alone, train
from polyak.study.recipes._regression import data
from polyak.study.recipes.article import study
from study_cases import plain_article, short


def test_the_data_are_the_plain_script_s() -> None:
    train_x, valid_x, train_y, valid_y = plain_article().load_data()
    ours = data(0)
    wanted = ((train_x, train_y), (valid_x, valid_y), (valid_x, valid_y))
    for part, theirs in zip((ours.train, ours.validation, ours.test), wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, theirs, strict=True))


@pytest.mark.parametrize(("epochs", "seed"), [(4, 0), pytest.param(500, 0, marks=pytest.mark.slow)])
def test_a_run_is_the_plain_script_s(epochs: int, seed: int) -> None:
    """4 epochs go past the end of the EMA's copies, at step 102; 500 go to the early stop."""
    with alone():
        order = torch.Generator().manual_seed(4 * seed + 1)
        outcome = plain_article().train(4 * seed, epochs, order, 4 * seed + 2)
    record = train(short(epochs), Run(seed, "plateau", 1e-3))
    history = outcome.history
    assert record["train_loss"] == history.train_loss
    assert record["curves"]["live"]["mse"] == history.val_loss_original
    assert record["curves"]["article_ema"]["mse"] == history.val_loss_ema
    assert record["stopped_early"] == (epochs == 500)
    for arm, theirs in (("live", outcome.live), ("article_ema", outcome.average)):
        ours = record["test"][arm]["last"]
        assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-4)


def test_the_metrics_are_those_of_scikit_learn() -> None:
    x, y = study.data(0).validation
    guess = y + torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    found = {
        name: float(metric.function(lambda _: guess, x, y))
        for name, metric in study.metrics.items()
    }
    wanted = {
        "mse": mean_squared_error(y, guess),
        "mae": mean_absolute_error(y, guess),
        "r2": r2_score(y, guess),
    }
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_recipe_ships() -> None:
    assert recipes()["article"] is study


Trajectory = NDArray[np.float64]


def projected(model: nn.Module, *_: Tensor) -> Tensor:
    """A number that is linear in the weights: that of an average is the average of the numbers."""
    weights = torch.cat([parameter.flatten() for parameter in model.parameters()]).double()
    random = torch.Generator().manual_seed(0)
    return weights @ torch.randn(len(weights), generator=random, dtype=torch.float64)


def recursion(values: Trajectory, decays: Iterable[float]) -> float:
    average = values[0]
    for value, decay in zip(values[1:], decays, strict=True):
        average = decay * average + (1 - decay) * value
    return float(average)


def article_decay(call: int) -> float:
    """The article's class, from its description: copies up to call 102, then a warm-up."""
    since = call - 100 - 1
    return min(1 - (1 + since) ** (-2 / 3), 0.999) if since > 1 else 0.0


@pytest.mark.slow
def test_every_average_equals_its_definition() -> None:
    """20 epochs, the 3rd of which takes the place of the 75th of 500."""
    metrics = {"mse": study.metrics["mse"], "projected": Metric(projected)}
    still = {"plateau": Plateau("article_ema", patience=999)}
    twenty = replace(short(20), metrics=metrics, schedules=still, claims=(), published=())
    often = replace(twenty, evaluations=1000, arms={"article_ema": study.arms["article_ema"]})
    run = Run(0, "plateau", 1e-3)
    steps = np.array(train(often, run)["curves"]["live"]["projected"])
    ends = steps[49::50]
    debiased = 0.001 * 0.999 ** np.arange(999, -1, -1.0)
    expected = {
        "live": steps[-1],
        "article_ema": recursion(steps, map(article_decay, range(2, 1001))),
        **{f"ema_{d}": recursion(steps, [d] * 999) for d in (0.9, 0.99, 0.995, 0.999)},
        "ema_0.999_debiased": debiased @ steps / debiased.sum(),
        **{f"sma_{k}": steps[-k:].mean() for k in (100, 500, 1000)},
        **{f"lawa_{k}": ends[-k:].mean() for k in (5, 10, 20)},
        "swa_75": ends[3:].mean(),
    }
    found = train(twenty, run)["test"]
    assert {name for name, arm in study.arms.items() if isinstance(arm, Arm)} == {*expected} - {
        "live"
    }
    for name, wanted in expected.items():
        assert found[name]["last"]["projected"] == pytest.approx(wanted, abs=2e-5), name
    assert study.arms["swa_75"].start == 75 / 500
