"""The river valley (Wen et al. 2024, arXiv 2410.05192): a steep noisy hillside above a river that flows slowly.

The loss of a sample z ~ N(0, .09) at (x, y) is exp(-x) + (y - z)^2 / 2: exp(-x) falls like 1 / (rate step).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyak.study import Data, Metric, Study, constant, cosine, inverse_sqrt, wsd
from polyak.study.recipes._arms import USUAL, averages, longer_runs_want_longer_averages

NOISE, STEPS = 0.3, 2000


class Boat(nn.Module):
    """A point that starts at x = 0 on the river and at y = 1 on the hillside."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([0.0, 1.0]))


def samples(split: int) -> Data:
    """A sample of the noise for each step; one row to select and to test, not read."""
    draws = NOISE * torch.randn(STEPS, generator=torch.Generator().manual_seed(split))
    return Data((draws,), *[(torch.zeros(1),)] * 2)


def sampled_loss(model: Boat, rows: Tensor) -> Tensor:
    """The mean loss of samples."""
    x, y = model.place.unbind()
    return (-x).exp() + (y - rows).square().mean() / 2


def excess_loss(model: Boat, _: Tensor) -> Tensor:
    """The exact expectation less Var z / 2, which nothing can take away."""
    x, y = model.place.unbind()
    return (-x).exp() + y.square() / 2


study = Study(
    name="river_valley",
    title="River valley in the plane",
    model=Boat,
    data=samples,
    loss=sampled_loss,
    metrics={"excess": Metric(excess_loss, title="excess loss")},
    optimizer=torch.optim.SGD,
    learning_rates=(0.1, 0.3, 0.9, 1.5),
    schedules={"constant": constant, "inverse_sqrt": inverse_sqrt, "cosine": cosine, "wsd": wsd},
    arms=averages(STEPS),
    claims=(*USUAL, longer_runs_want_longer_averages("excess")),
    steps=STEPS,
    batch_size=1,
    stacked=64,
    quick={"steps": 500, "arms": averages(500), "seeds": 4},
    source="drawn from a Gaussian",
)
