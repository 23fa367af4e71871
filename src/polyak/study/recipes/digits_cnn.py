"""Digits by a convolutional network with BatchNorm: are its averages better with statistics re-estimated?"""

from __future__ import annotations

from torch import nn

from polyak.rules import Uniform
from polyak.study import Arm, Claim, Region, Study, constant, cosine, gain
from polyak.study.recipes._arms import AFTER_ANNEALING, AT_A_CONSTANT_RATE, averages
from polyak.study.recipes._digits import FEWER_ERRORS, METRICS, SOURCE, cross_entropy, digits
from polyak.study.recipes.digits_mlp import nesterov


def cnn() -> nn.Module:
    """Two blocks of convolution, BatchNorm and pooling, then one linear layer; 6 138 weights."""
    blocks = [_block(1, 16), _block(16, 32)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32 * 2 * 2, 10))


def _block(inputs: int, outputs: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


def arms(steps: int) -> dict[str, Arm]:
    """The usual averages, and the mean of the last half with statistics re-estimated."""
    return {**averages(steps), RECALIBRATED: Arm(Uniform(), start=0.5, recalibrate=True)}


RECALIBRATED, STEPS = "mean_50%_recalibrated", 600  # 19 epochs

study = Study(
    name="digits_cnn",
    title="Digits, convolutions with BatchNorm",
    model=cnn,
    data=digits,
    loss=cross_entropy,
    metrics=METRICS,
    optimizer=nesterov,
    learning_rates=(0.01, 0.03, 0.1),
    schedules={"constant": constant, "cosine": cosine},
    arms=arms(STEPS),
    claims=(
        AT_A_CONSTANT_RATE,
        AFTER_ANNEALING,
        FEWER_ERRORS,
        Claim(
            "The mean of the last half has a lower loss if BatchNorm's statistics are re-estimated.",
            gain(RECALIBRATED, against="mean_50%", schedule="constant"),
            Region.above(0),
            "Izmailov et al. 2018 (arXiv 1803.05407)",
        ),
    ),
    steps=STEPS,
    batch_size=32,
    evaluations=5,
    quick={"steps": 200, "arms": arms(200), "seeds": 3},
    source=SOURCE,
)
