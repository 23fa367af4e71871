"""A denoiser in the plane with the scaling, loss and noise levels of EDM (Karras et al. 2022, arXiv 2206.00364)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from polyak.study import Data

MODES, DEVIATION = 8, 0.1
VARIANCE = 0.5 + DEVIATION**2  # of the data along each axis
LOWEST, HIGHEST, LEVELS, DRAWN = 0.02, 4.0, 16, 400


class Denoiser(nn.Module):
    """Predicts the clean point (n x 2) from a noisy one and its noise level (n x 1)."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 64), (64, 64), (64, 64))
        hidden = [layer for sizes in widths for layer in (nn.Linear(*sizes), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(64, 2))

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        total = level.square() + VARIANCE
        inputs = torch.cat([noisy * total.rsqrt(), level.log() / 4], 1)
        scale = level * (VARIANCE / total).sqrt()
        learned: Tensor = self.layers(inputs)
        return noisy * VARIANCE / total + scale * learned


def denoising_loss(model: nn.Module, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """The mean squared error of the clean points, weighted so that each level counts alike at first."""
    weight = 1 / level.square() + 1 / VARIANCE
    guess: Tensor = model(clean + level * noise, level)
    return (weight * (guess - clean).square()).mean()


@torch.no_grad()
def draw(model: nn.Module) -> Tensor:
    """DRAWN points: Euler's method from the highest noise level to 0, from the same noise each time."""
    levels = torch.logspace(math.log10(HIGHEST), math.log10(LOWEST), LEVELS).tolist()
    points = HIGHEST * torch.randn(DRAWN, 2, generator=torch.Generator().manual_seed(0))
    for now, then in zip(levels, [*levels[1:], 0.0], strict=True):
        clean = model(points, torch.full((DRAWN, 1), now))
        points = clean + (points - clean) * (then / now)
    return points


def of_samples(metric: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The metric of drawn points against the clean points of a part."""

    def judged(model: nn.Module, clean: Tensor, *_: Tensor) -> Tensor:
        return metric(draw(model), clean)

    return judged


def mixture(rows: int) -> Callable[[int], Data]:
    """Data of `rows` points to train and 400 each to select and to test: (clean, noise, level).

    Noise and levels are data, so that the loss draws no random number and every part has one loss.
    """

    def parts(split: int) -> Data:
        draws = torch.Generator().manual_seed(split)
        return Data(*(_points(n, draws) for n in (rows, 400, 400)))

    return parts


def _points(rows: int, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    angle = torch.randint(MODES, (rows, 1), generator=draws) * (2 * math.pi / MODES)
    centre = torch.cat([angle.cos(), angle.sin()], 1)
    clean = centre + DEVIATION * torch.randn(rows, 2, generator=draws)
    noise = torch.randn(rows, 2, generator=draws)
    level = (1.2 * torch.randn(rows, 1, generator=draws) - 1.2).exp()
    return clean, noise, level
