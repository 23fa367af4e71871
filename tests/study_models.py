"""A small study that the tests of the study share: an MLP with dropout, and a CNN with BatchNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyak.rules import Uniform, Window
from polyak.study import Arm, Data, Ensemble, Metric, Study, constant, cosine, mean_probability

CLASSES = 3


def images(seed: int) -> Data:
    """Three classes of noisy 6 x 6 images; 90 rows for training, 45 for each other part."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(180) % CLASSES
    patterns = torch.randn(CLASSES, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    x = patterns[y] + 2 * torch.randn(180, 1, 6, 6, generator=generator)
    rows = torch.randperm(180, generator=generator).split([90, 45, 45])
    train, validation, test = ((x[r], y[r]) for r in rows)
    return Data(train, validation, test)


def mlp(dropout: float = 0.2) -> nn.Module:
    """36-16-3 with dropout."""
    hidden = nn.Sequential(nn.Linear(36, 16), nn.ReLU(), nn.Dropout(dropout))
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(16, CLASSES))


def cnn() -> nn.Module:
    """A convolution, BatchNorm, and a linear layer."""
    block = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*block, nn.Flatten(), nn.Linear(16, CLASSES))


class Scaled(nn.Module):
    """Logits times a parameter without a dimension, as contrastive models have."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = mlp(0.0), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.body(x)
        return logits


class Turned(Scaled):
    """Logits times a complex parameter's absolute value."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.6 + 0.8j] * CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale.abs() * self.body(x)
        return logits


class Twice(nn.Module):
    """One layer under two names, one matrix in two layers, and one parameter that is a buffer, too."""

    def __init__(self) -> None:
        super().__init__()
        same = nn.Linear(36, 36)
        self.layers = nn.ModuleList([nn.Flatten(), same, nn.Tanh(), same, nn.Linear(36, 36), nn.Linear(36, CLASSES)])  # fmt: skip
        self.layers[4].weight = same.weight
        self.register_buffer("seen", self.layers[-1].get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x + self.get_buffer("seen").sum(1)


class Dimmed(Scaled):
    """The first operation is in place, or it is not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.dim = Tensor.mul_ if inplace else Tensor.mul

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dim(x, 0.9))


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of logits."""
    return functional.cross_entropy(model(x), y)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The share of right classes."""
    right: Tensor = model(x).argmax(-1) == y
    return right.float().mean()


def sgd(parameters: Any, learning_rate: float) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay."""
    return torch.optim.SGD(parameters, learning_rate, momentum=0.9, weight_decay=1e-3)


def arms(steps: int) -> dict[str, Any]:
    """Averages that a run of so many steps is long enough for."""
    every = max(steps // 8, 1)
    return {
        "ema": "exponential(0.9)" if steps > 7 else "exponential(0.5)",
        "sma": f"window({min(7, steps)})",
        "lawa": Arm(Window(min(3, steps)), every=every),
        "tail": Arm(Uniform(), start=0.5 if steps > 3 else 0),
        "ensemble": Ensemble(min(3, steps), every=every, combine=mean_probability),
    }


def study(**changes: Any) -> Study:
    """The study, with some of its fields changed."""
    fields: dict[str, Any] = {
        "name": "images",
        "model": mlp,
        "data": images,
        "loss": cross_entropy,
        "metrics": {
            "loss": Metric(cross_entropy),
            "accuracy": Metric(accuracy, lower_is_better=False),
        },
        "optimizer": sgd,
        "learning_rates": (0.05,),
        "schedules": {"constant": constant, "cosine": cosine},
        "arms": arms(max(changes.get("steps", 40), 1)),
        "steps": 40,
        "batch_size": 20,
        "evaluations": 4,
        "seeds": 2,
    }
    return Study(**{**fields, **changes})
