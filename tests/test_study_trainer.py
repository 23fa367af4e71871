"""The fast trainer is the plain script, bit for bit, and nothing that watches it disturbs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from torch import nn

from polyak.study._arms import ARTICLE, Tracker, all_arms, article_arm
from polyak.study._data import Data, make_data
from polyak.study._gradient import loss_and_gradient
from polyak.study._live import Live
from polyak.study._model import Probe, as_layers, initial_weights, views
from polyak.study._settings import Settings
from polyak.study._trainer import EarlyStop, _best, alone, run_seed
from study_cases import SMALL, plain_article


@pytest.fixture(scope="module")
def data() -> Data:
    return make_data(Settings())


@pytest.fixture(scope="module")
def small() -> Data:
    return make_data(SMALL)


def trained(settings: Settings, data: Data, epochs: int, seed: int) -> tuple[Live, Tracker]:
    """Live weights and the article's EMA after a few epochs."""
    with alone():
        torch.manual_seed(seed)
        live = Live(settings, data)
        tracker, probe = Tracker(article_arm(settings), live.flat), Probe(live.shapes, data)
        for _ in range(epochs):
            live.train_epoch(tracker.after_step)
            live.judged(probe.evaluate(tracker.driver())["mse"])
    return live, tracker


def test_data_is_the_plain_script_s(data: Data) -> None:
    train_x, valid_x, train_y, valid_y = plain_article().load_data()
    for ours, theirs in zip(data, (train_x, train_y, valid_x, valid_y), strict=True):
        assert torch.equal(ours, theirs)
    assert (len(data.train_x), len(data.valid_x)) == (1600, 400)


def test_weights_are_the_plain_script_s_bit_for_bit(data: Data) -> None:
    epochs = 4  # past the end of the EMA's copies, at step 102
    outcome = plain_article().train(5, max_epochs=epochs)
    live, tracker = trained(Settings(), data, epochs, seed=5)
    shapes = live.shapes
    for flat, theirs in (
        (live.flat, outcome.live_weights),
        (tracker.driver(), outcome.average_weights),
    ):
        for ours, wanted in zip(views(flat, shapes), theirs, strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 7])
def test_a_whole_seed_is_the_plain_script_s(data: Data, seed: int) -> None:
    outcome = plain_article().train(seed)
    record = run_seed(seed, Settings(), data)
    history = vars(outcome.history)
    assert record["stop_epoch"] == len(history["train_loss"])
    for name in ("train_loss", "val_loss_original", "val_loss_ema"):
        assert record["history"][name] == history[name]
    for name in ("r2_original", "r2_ema"):
        assert record["history"][name] == pytest.approx(history[name], abs=1e-6)
    for model in ("live", "average"):
        wanted = getattr(outcome, model)
        assert record[model] == pytest.approx({k: wanted[k] for k in record[model]}, rel=1e-5)
    live, _ = trained(Settings(), data, record["stop_epoch"], seed)
    for ours, theirs in zip(views(live.flat, live.shapes), outcome.live_weights, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("hidden", [(8, 4), (7,), (5, 4, 3)])
@pytest.mark.parametrize("dropout", [0.0, 0.2, 0.35])
def test_gradient_is_autograd_s(small: Data, hidden: tuple[int, ...], dropout: float) -> None:
    settings = replace(SMALL, hidden=hidden, dropout=dropout)
    weights = initial_weights(settings)
    gradient = [torch.empty_like(w) for w in weights]
    x, y = small.train_x[:32], small.train_y[:32]
    module = as_module(weights, settings)
    torch.manual_seed(3)
    loss = loss_and_gradient(as_layers(weights), as_layers(gradient), x, y, dropout)
    torch.manual_seed(3)
    wanted = nn.functional.mse_loss(module(x), y)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item())
    for ours, parameter in zip(gradient, module.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-6, atol=1e-7)


def as_module(weights: list[torch.Tensor], settings: Settings) -> nn.Sequential:
    """The network as an ordinary module with the given weights."""
    layers: list[nn.Module] = []
    for sizes in pairwise((settings.features, *settings.hidden, 1)):
        layers += [nn.Linear(*sizes), nn.ReLU(), nn.Dropout(settings.dropout)]
    module = nn.Sequential(*layers[:-2])
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return module


def test_the_arms_do_not_change_the_run(small: Data) -> None:
    alone_, together = (run_seed(2, SMALL, small, arms(SMALL)) for arms in (article_arm, all_arms))
    for part in ("history", "after_stop", "stop_epoch", "live", "average", "best"):
        assert alone_[part] == together[part]


def test_evaluating_more_does_not_change_the_run(
    small: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = run_seed(2, SMALL, small, article_arm(SMALL))
    probe = Probe([w.shape for w in initial_weights(SMALL)], small)
    update, seen = Tracker.after_step, []

    def nosy(tracker: Tracker) -> None:
        update(tracker)
        seen.append(probe.evaluate(tracker.driver()))

    monkeypatch.setattr(Tracker, "after_step", nosy)
    assert run_seed(2, SMALL, small, article_arm(SMALL)) == quiet
    assert len(seen) == 5 * quiet["stop_epoch"]


def test_a_seed_is_repeated_exactly_and_seeds_differ(small: Data) -> None:
    first, again, other = (run_seed(seed, SMALL, small) for seed in (4, 4, 5))
    assert first == again
    assert first["history"] != other["history"]


def test_the_caller_s_stream_and_threads_are_left_alone(small: Data) -> None:
    torch.manual_seed(11)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run_seed(0, SMALL, small)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_record_says_all_that_a_reader_needs(small: Data) -> None:
    record = run_seed(1, SMALL, small)
    epochs = record["stop_epoch"]
    assert set(record["history"]) == {
        "train_loss", "val_loss_original", "val_loss_ema", "r2_original", "r2_ema"
    }  # fmt: skip
    assert {len(curve) for curve in record["history"].values()} == {epochs}
    assert {len(c) for c in record["after_stop"].values()} == {SMALL.epochs_after_stop}
    assert list(record["arms"]) == all_arms(SMALL).names()
    assert record["live"] == record["arms"]["live"]
    assert record["average"] == record["arms"][ARTICLE]
    assert record["live"]["mse"] == record["history"]["val_loss_original"][-1]
    assert record["best"]["average"]["mse"] == min(record["history"]["val_loss_ema"])
    assert all(1 <= epoch <= epochs for epoch in record["learning_rate_drops"])
    assert record["conditions"]["batch_size"] == 32
    assert len(record["fingerprint"]) == 12


def losses(*values: float) -> Callable[[EarlyStop], list[bool]]:
    return lambda stop: [stop(value) for value in values]


def test_early_stop_wants_a_strictly_lower_loss() -> None:
    assert losses(3.0, 2.0, 2.0, 2.5)(EarlyStop(2)) == [False, False, False, True]
    assert losses(3.0, 3.5, 2.9, 2.9, 2.9)(EarlyStop(2)) == [False] * 4 + [True]


def test_the_best_epoch_is_the_first_of_the_lowest_loss() -> None:
    losses = [3.0, 1.0, 2.0, 1.0]
    metrics = [{"mse": mse, "mae": i + 0.5, "r2": -mse} for i, mse in enumerate(losses)]
    assert _best(metrics) == {"epoch": 2, **metrics[1]}


def test_the_metrics_are_those_of_scikit_learn(data: Data) -> None:
    torch.manual_seed(0)
    wanted = data.valid_y.double().numpy()
    prediction = data.valid_y + torch.randn_like(data.valid_y)
    got, seen = Probe([], data).judge(prediction), prediction.double().numpy()
    assert got["r2"] == pytest.approx(r2_score(wanted, seen), rel=1e-5)
    assert got["mse"] == pytest.approx(mean_squared_error(wanted, seen), rel=1e-5)
    assert got["mae"] == pytest.approx(mean_absolute_error(wanted, seen), rel=1e-5)
