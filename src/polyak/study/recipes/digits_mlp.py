"""Digits by an MLP that can learn all 1000 training images by heart."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from polyak.study import Study, constant, cosine, inverse_sqrt
from polyak.study.recipes._arms import USUAL, averages
from polyak.study.recipes._digits import METRICS, SOURCE, cross_entropy, digits


def mlp() -> nn.Module:
    """64 pixels, two hidden layers of 256, 10 digits."""
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def nesterov(parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum .9."""
    return torch.optim.SGD(parameters, learning_rate, momentum=0.9, nesterov=True)


STEPS = 1000  # 31 epochs

study = Study(
    name="digits_mlp",
    title="Digits, MLP 64-256-256-10",
    model=mlp,
    data=digits,
    loss=cross_entropy,
    metrics=METRICS,
    optimizer=nesterov,
    learning_rates=(0.01, 0.03, 0.1),
    schedules={"constant": constant, "inverse_sqrt": inverse_sqrt, "cosine": cosine},
    arms=averages(STEPS),
    claims=USUAL,
    steps=STEPS,
    batch_size=32,
    evaluations=10,
    quick={"steps": 300, "arms": averages(300), "seeds": 4},
    source=SOURCE,
)
