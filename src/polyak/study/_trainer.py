"""Trainer: run one seed of the article's experiment, bit for bit like the plain script, and record it.

Random numbers are drawn as in the plain script (`benchmarks/plain_article.py`): the initial weights, two
draws of the loader per epoch, the dropout masks. Averages and evaluations draw none, so they cannot
disturb the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from polyak.rules import LIVE
from polyak.study._arms import ARTICLE, Arms, Tracker, all_arms
from polyak.study._data import Data
from polyak.study._live import Live
from polyak.study._model import Metrics, Probe
from polyak.study._record_format import AVERAGE, Record
from polyak.study._settings import Settings, as_json, fingerprint


class EarlyStop:
    """Stops after `patience` epochs in a row without a strictly lower loss."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._best = float("inf")
        self._waited = 0

    def __call__(self, loss: float) -> bool:
        self._waited = 0 if loss < self._best else self._waited + 1
        self._best = min(self._best, loss)
        return self._waited >= self._patience


@dataclass(frozen=True)
class Epoch:
    """The measurements after one epoch; `learning_rate` is that of the next epoch."""

    train_loss: float
    live: Metrics
    average: Metrics
    learning_rate: float


def run_seed(seed: int, settings: Settings, data: Data, arms: Arms | None = None) -> Record:
    """Run one seed; its record has the history, the stop, every arm at the stop, and what came after.

    It runs on one thread and with its own random numbers; the caller's threads and generator are
    restored.
    """
    arms = arms or all_arms(settings)
    with alone():
        torch.manual_seed(seed)
        live = Live(settings, data)
        tracker, probe = Tracker(arms, live.flat), Probe(live.shapes, data)
        epochs, stopped = _until_stop(live, tracker, probe, settings)
        at_stop = tracker.evaluate(probe)
        after = [
            _epoch(live, tracker, probe, tracker.update_rules)
            for _ in range(settings.epochs_after_stop)
        ]
    return {
        "seed": seed,
        "fingerprint": fingerprint(conditions(settings, arms)),
        "conditions": conditions(settings, arms),
        "stop_epoch": len(epochs),
        "stopped_early": stopped,
        LIVE: at_stop[LIVE],
        AVERAGE: at_stop[ARTICLE],
        "best": {
            LIVE: _best([e.live for e in epochs]),
            AVERAGE: _best([e.average for e in epochs]),
        },
        "learning_rate_drops": _drops(settings.learning_rate, epochs),
        "history": _history(epochs),
        "after_stop": _history(after),
        "arms": at_stop,
    }


def conditions(settings: Settings, arms: Arms) -> dict[str, Any]:
    """Everything that a record depends on besides its seed, so that other conditions never mix in."""
    return {**as_json(settings), "arms": arms.specs(), "torch": torch.__version__}


@contextmanager
def alone() -> Iterator[None]:
    """Use one thread, since the tensors are tiny, and restore the caller's threads and generator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _until_stop(
    live: Live, tracker: Tracker, probe: Probe, settings: Settings
) -> tuple[list[Epoch], bool]:
    """The epochs until the stop, and whether it was an early stop."""
    stop, epochs = EarlyStop(settings.stop_patience), []
    for _ in range(settings.max_epochs):
        epochs.append(_epoch(live, tracker, probe, tracker.after_step))
        tracker.after_epoch()
        if stop(epochs[-1].average["mse"]):
            return epochs, True
    return epochs, False


def _epoch(live: Live, tracker: Tracker, probe: Probe, after_step: Callable[[], None]) -> Epoch:
    """Train one epoch, evaluate both networks, and give the EMA's loss to the schedule."""
    train_loss = live.train_epoch(after_step)
    average = probe.evaluate(tracker.driver())
    live.judged(average["mse"])
    return Epoch(train_loss, probe.evaluate(live.flat), average, live.learning_rate)


def _best(metrics: Sequence[Metrics]) -> dict[str, float]:
    """The first epoch of lowest MSE, counted from 1, and its metrics."""
    first = min(range(len(metrics)), key=lambda i: metrics[i]["mse"])
    return {"epoch": first + 1, **metrics[first]}


def _drops(initial: float, epochs: Sequence[Epoch]) -> list[int]:
    """The epochs after which the learning rate was lowered."""
    before = [initial, *(e.learning_rate for e in epochs)]
    return [i + 1 for i, epoch in enumerate(epochs) if epoch.learning_rate < before[i]]


def _history(epochs: Sequence[Epoch]) -> dict[str, list[float]]:
    """The article's five curves, under its names."""
    return {
        "train_loss": [e.train_loss for e in epochs],
        "val_loss_original": [e.live["mse"] for e in epochs],
        "val_loss_ema": [e.average["mse"] for e in epochs],
        "r2_original": [e.live["r2"] for e in epochs],
        "r2_ema": [e.average["r2"] for e in epochs],
    }
