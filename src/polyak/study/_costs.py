"""Costs: the memory, the time per step and the forward passes of each arm, measured alone.

The arms are timed in turns, round by round, so that a busy moment of the machine affects all of them.
The median over the rounds counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from polyak.averager import Averager
from polyak.rules import LIVE, Rule, Uniform, Window
from polyak.study._arms import WEIGHTS, Arms, ensemble
from polyak.study._data import Data
from polyak.study._live import Live
from polyak.study._model import Probe
from polyak.study._settings import Settings
from polyak.study._trainer import alone

Key = TypeVar("Key", str, int)

ROUNDS = 40
STEPS = 50


@dataclass(frozen=True)
class Cost:
    """Copies of the weights and their bytes, microseconds per optimizer step, cost of a prediction.

    `passes` is the number of forward passes of a prediction; `prediction` is its time divided by that
    of one network.
    """

    copies: int
    bytes: int
    microseconds: float
    passes: int
    prediction: float


@dataclass(frozen=True)
class Costs:
    """The cost of every arm, and of a training step without averages."""

    step_microseconds: float
    arms: dict[str, Cost]


def measure(settings: Settings, data: Data, arms: Arms, rounds: int = ROUNDS) -> Costs:
    """Measure the costs of all arms on this machine, on one thread."""
    with alone():
        torch.manual_seed(0)
        live = Live(settings, data)
        steps_an_epoch = -(-len(data.train_x) // settings.batch_size)
        updates = _updates(arms, live.flat)
        training = _medians({LIVE: lambda: live.train_epoch(_nothing)}, rounds // 4)
        times = _medians(updates, rounds)
        sizes = {1, *arms.ensembles.values()}
        predictions = _predictions(Probe(live.shapes, data), live.flat, sizes, rounds)
    copies = _copies(arms)
    costs = {}
    for name in arms.names():
        once_an_epoch = name in (*arms.last_epochs, *arms.swa, *arms.ensembles)
        updates_a_step = 1 / steps_an_epoch if once_an_epoch else 1
        passes = arms.ensembles.get(name, 1)
        costs[name] = Cost(
            copies[name],
            copies[name] * live.flat.nbytes,
            times.get(name, 0.0) / STEPS * updates_a_step * 1e6,
            passes,
            predictions[passes] / predictions[1],
        )
    return Costs(training[LIVE] / steps_an_epoch * 1e6, costs)


def as_json(costs: Costs) -> dict[str, Any]:
    """The costs as plain data, for JSON."""
    return asdict(costs)


def _nothing() -> None:
    """The step hook of an epoch without averages."""


def _rules(arms: Arms) -> dict[str, Rule]:
    """Arm -> the rule that a user would choose for it; windows are `Window`."""
    windows = {**arms.last_steps, **arms.last_epochs}
    return {**arms.rules, **{name: Window(size) for name, size in windows.items()}}


def _copies(arms: Arms) -> dict[str, int]:
    """Arm -> the number of copies of the weights that it keeps besides the live ones."""
    kept = {name: len(rule.slots) for name, rule in _rules(arms).items()}
    return {LIVE: 0, **kept, **dict.fromkeys(arms.swa, 1), **arms.ensembles}


def _updates(arms: Arms, flat: Tensor) -> dict[str, Callable[[], None]]:
    """Arm -> a function that makes STEPS updates."""
    updates = {name: _updating(rule, flat) for name, rule in _rules(arms).items()}
    swa = {name: _updating(Uniform(), flat) for name in arms.swa}
    snapshot = torch.empty_like(flat)
    keeping = _repeated(lambda: snapshot.copy_(flat))
    return {**updates, **swa, **dict.fromkeys(arms.ensembles, keeping)}


def _updating(rule: Rule, flat: Tensor) -> Callable[[], None]:
    averager = Averager({WEIGHTS: flat.detach()}, rule)
    for _ in rule.slots:  # fill the window, as it is for most of a run
        averager.update()
    return _repeated(averager.update)


def _repeated(action: Callable[[], object]) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(STEPS):
            action()

    return repeated


def _predictions(probe: Probe, flat: Tensor, sizes: set[int], rounds: int) -> dict[int, float]:
    """Number of networks -> median seconds of one prediction of the validation set."""
    actions = {size: _predicting(probe, [flat.detach()] * size) for size in sizes}
    return {int(size): seconds for size, seconds in _medians(actions, rounds).items()}


def _predicting(probe: Probe, networks: list[Tensor]) -> Callable[[], object]:
    if len(networks) == 1:
        return lambda: probe.predict(networks[0])
    return lambda: ensemble(probe, networks)


def _medians(actions: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, float]:
    """Median seconds of each action, timed in turns; the first round is a warm-up."""
    times: dict[Key, list[float]] = {name: [] for name in actions}
    for _ in range(max(rounds, 1) + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
