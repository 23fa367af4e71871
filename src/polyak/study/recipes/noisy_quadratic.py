"""The noisy quadratic model (Zhang et al. 2019, arXiv 1907.04164): every expectation is known.

With curvatures h_i = 1 / i, the loss of a sample z_i ~ N(0, 1 / h_i) is sum_i h_i (w_i - z_i)^2 / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyak.study import Data, Metric, Study, constant, cosine, inverse_sqrt, wsd
from polyak.study.recipes._arms import USUAL, averages, longer_runs_want_longer_averages

CURVATURES = 1 / torch.arange(1, 101)
STEPS, BATCH = 1000, 10


class Point(nn.Module):
    """A point that starts at (1, ..., 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(len(CURVATURES)))


def samples(split: int) -> Data:
    """Samples of the noise, as many to train as a run needs; one row to select and to test, not read."""
    seeded = torch.Generator().manual_seed(split)
    draws = torch.randn(STEPS * BATCH, len(CURVATURES), generator=seeded)
    return Data((draws / CURVATURES.sqrt(),), *[(torch.zeros(1),)] * 2)


def sampled_loss(model: Point, rows: Tensor) -> Tensor:
    """The mean loss of samples."""
    return (CURVATURES * (model.weights - rows).square()).sum(1).mean() / 2


def excess_loss(model: Point, _: Tensor) -> Tensor:
    """The exact expectation less its minimum, sum_i h_i w_i^2 / 2."""
    return (CURVATURES * model.weights.square()).sum() / 2


study = Study(
    name="noisy_quadratic",
    title="Noisy quadratic model of 100 directions",
    model=Point,
    data=samples,
    loss=sampled_loss,
    metrics={"excess": Metric(excess_loss, title="excess loss")},
    optimizer=torch.optim.SGD,
    learning_rates=(0.1, 0.2, 0.4, 0.8, 1.6),
    schedules={"constant": constant, "inverse_sqrt": inverse_sqrt, "cosine": cosine, "wsd": wsd},
    arms=averages(STEPS),
    claims=(*USUAL, longer_runs_want_longer_averages("excess")),
    steps=STEPS,
    batch_size=BATCH,
    stacked=64,
    quick={"steps": 300, "arms": averages(300), "seeds": 4},
    source="drawn from Gaussians",
)
