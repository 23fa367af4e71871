"""Every arm equals an independent computation from the stored trajectory of the live weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from polyak import Averager
from polyak.rules import Window
from polyak.study import _costs as costs
from polyak.study._arms import Arms, Tracker, all_arms, first_of_swa
from polyak.study._data import Data, make_data
from polyak.study._live import Live
from polyak.study._model import Probe
from polyak.study._trainer import alone
from study_cases import SMALL

EPOCHS = 24
STEPS = 5
Array = NDArray[np.float64]


class Watched:
    """A small run with every arm, and its trajectory of live weights in float64."""

    def __init__(self) -> None:
        self.data: Data = make_data(SMALL)
        self.arms: Arms = all_arms(SMALL)
        self.steps: list[Array] = []
        with alone():
            torch.manual_seed(0)
            self.live = Live(SMALL, self.data)
            self.tracker = Tracker(self.arms, self.live.flat)
            self.window = Averager({"w": self.live.flat}, Window(100))
            for _ in range(EPOCHS):
                self.live.train_epoch(self.step)
                self.tracker.after_epoch()
            self.probe = Probe(self.live.shapes, self.data)
            self.averages = self.tracker.averages()
            self.metrics = self.tracker.evaluate(self.probe)
        self.epoch_ends = self.steps[STEPS - 1 :: STEPS]

    def step(self) -> None:
        self.tracker.after_step()
        self.window.update()
        self.steps.append(self.live.flat.double().numpy().copy())


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


def ema(steps: list[Array], decay: float) -> Array:
    average = steps[0]
    for live in steps[1:]:
        average = decay * average + (1 - decay) * live
    return average


def article_ema(steps: list[Array]) -> Array:
    """The article's class, from its description: copies, then averages by its warm-up."""
    average = steps[0]
    for n, live in enumerate(steps, start=1):
        since = n - SMALL.ema_update_after_step - 1
        decay = min(1 - (1 + since) ** -SMALL.ema_power, SMALL.ema_beta) if since > 1 else 0.0
        average = decay * average + (1 - decay) * live
    return average


def debiased(steps: list[Array], decay: float) -> Array:
    """Adam's way: a zero start, divided by 1 - decay^t."""
    average = np.zeros_like(steps[0])
    for live in steps:
        average = decay * average + (1 - decay) * live
    return average / (1 - decay ** len(steps))


def wanted(run: Watched) -> dict[str, Array]:
    first = int(np.ceil(0.75 * EPOCHS))
    return {
        "article_ema": article_ema(run.steps),
        **{f"ema_{d}": ema(run.steps, d) for d in (0.9, 0.99, 0.995, 0.999)},
        "ema_0.999_debiased": debiased(run.steps, 0.999),
        **{f"sma_{k}": np.mean(run.steps[-k:], axis=0) for k in (100, 500, 1000)},
        **{f"lawa_{k}": np.mean(run.epoch_ends[-k:], axis=0) for k in (5, 10, 20)},
        "swa_75": np.mean(run.epoch_ends[first:], axis=0),
    }


def test_every_average_equals_its_definition(watched: Watched) -> None:
    expected = wanted(watched)
    assert list(watched.averages) == list(expected)
    for name, average in watched.averages.items():
        np.testing.assert_allclose(average.numpy(), expected[name], rtol=0, atol=1e-6, err_msg=name)


def test_a_window_from_the_ring_is_the_window_rule(watched: Watched) -> None:
    torch.testing.assert_close(
        watched.averages["sma_100"], watched.window.average()["w"], rtol=0, atol=1e-6
    )


def predicted(run: Watched, flat: Array) -> Array:
    """Predictions by numpy, in float64."""
    x: Array = run.data.valid_x.double().numpy()
    at = 0
    for i, shape in enumerate(run.live.shapes[::2]):
        weight = flat[at : at + shape.numel()].reshape(tuple(shape))
        bias = flat[at + shape.numel() : at + shape.numel() + shape[0]]
        at += shape.numel() + shape[0]
        x = x @ weight.T + bias
        x = np.maximum(x, 0) if i < len(SMALL.hidden) else x
    return x


def judged(run: Watched, prediction: Array) -> dict[str, float]:
    target: Any = run.data.valid_y.numpy()
    return {
        "mse": mean_squared_error(target, prediction),
        "mae": mean_absolute_error(target, prediction),
        "r2": r2_score(target, prediction),
    }


def test_metrics_are_sklearn_s_of_those_weights(watched: Watched) -> None:
    flats = {"live": watched.steps[-1], **wanted(watched)}
    for name, flat in flats.items():
        expected = judged(watched, predicted(watched, flat))
        assert watched.metrics[name] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("size", [5, 10, 20])
def test_an_ensemble_is_the_mean_prediction(watched: Watched, size: int) -> None:
    predictions = [predicted(watched, flat) for flat in watched.epoch_ends[-size:]]
    expected = judged(watched, np.mean(predictions, axis=0))
    assert watched.metrics[f"ensemble_{size}"] == pytest.approx(expected, rel=1e-4)


def test_swa_begins_after_three_quarters_of_the_epochs_run() -> None:
    assert [first_of_swa(epochs) for epochs in (1, 2, 4, 97, 100)] == [0, 1, 3, 73, 75]


def test_costs_name_every_arm_with_its_copies(watched: Watched) -> None:
    measured = costs.measure(SMALL, watched.data, watched.arms, rounds=4)
    assert list(measured.arms) == watched.arms.names()
    copies = {name: cost.copies for name, cost in measured.arms.items()}
    assert copies["live"] == 0 and copies["article_ema"] == copies["swa_75"] == 1
    assert copies["sma_1000"] == 1000 and copies["lawa_20"] == copies["ensemble_20"] == 20
    assert measured.arms["sma_100"].bytes == 100 * watched.live.flat.nbytes
    assert [measured.arms[f"ensemble_{k}"].passes for k in (5, 10, 20)] == [5, 10, 20]
    assert measured.arms["ensemble_20"].prediction > measured.arms["live"].prediction == 1
    assert min(measured.step_microseconds, measured.arms["ema_0.9"].microseconds) > 0
