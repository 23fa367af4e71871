"""Digits by an MLP that can fit all 1000 training images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from polyak.study import Arm, Ensemble, Study, constant, cosine, inverse_sqrt, mean_probability
from polyak.study.recipes._arms import USUAL, averages
from polyak.study.recipes._digits import FEWER_ERRORS, METRICS, SOURCE, cross_entropy, digits


def mlp() -> nn.Module:
    """64 pixels, two hidden layers of 128, 10 digits."""
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def nesterov(parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum .9."""
    return torch.optim.SGD(parameters, learning_rate, momentum=0.9, nesterov=True)


def arms(steps: int) -> dict[str, Arm | Ensemble]:
    """The usual averages, and an ensemble of the networks that LAWA averages."""
    networks = Ensemble(5, every=steps // 50, combine=mean_probability)
    return {**averages(steps), "ensemble": networks}


STEPS = 1000  # 31 epochs

study = Study(
    name="digits_mlp",
    title="Digits, MLP 64-128-128-10",
    model=mlp,
    data=digits,
    loss=cross_entropy,
    metrics=METRICS,
    optimizer=nesterov,
    learning_rates=(0.01, 0.03, 0.1, 0.3),
    schedules={"constant": constant, "inverse_sqrt": inverse_sqrt, "cosine": cosine},
    arms=arms(STEPS),
    claims=(*USUAL, FEWER_ERRORS),
    steps=STEPS,
    batch_size=32,
    evaluations=5,
    quick={"steps": 300, "arms": arms(300), "seeds": 4},
    source=SOURCE,
)
