"""Metrics of samples against independent formulas, and the sampler against a perfect denoiser."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from polyak.study.recipes import _diffusion as diffusion
from polyak.study.recipes._samples import precision, recall, squared_mmd


def clouds(seed: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(60, 2, generator=draws), 1.5 * torch.randn(80, 2, generator=draws) + 0.3


@pytest.mark.parametrize("seed", range(3))
def test_mmd_is_scikit_learns_kernel_summed(seed: int) -> None:
    samples, points = clouds(seed)
    gamma = 1 / (2 * 0.7**2)
    wanted = (
        rbf_kernel(samples, samples, gamma).mean()
        + rbf_kernel(points, points, gamma).mean()
        - 2 * rbf_kernel(samples, points, gamma).mean()
    )
    assert float(squared_mmd(samples, points, 0.7)) == pytest.approx(wanted, abs=1e-5)
    assert float(squared_mmd(points, points, 0.7)) == pytest.approx(0, abs=1e-6)


def inside(these: Tensor, support: Tensor, neighbours: int) -> float:
    """The share of rows within the ball of a point of the support, row by row."""
    distances, _ = NearestNeighbors(n_neighbors=neighbours + 1).fit(support).kneighbors(support)
    balls = list(zip(support.numpy(), distances[:, -1], strict=True))
    hits = [any(np.linalg.norm(x - c) <= r for c, r in balls) for x in these.numpy()]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("neighbours", [1, 5])
def test_precision_and_recall_are_those_of_scikit_learns_neighbours(
    seed: int, neighbours: int
) -> None:
    samples, points = (cloud.double() for cloud in clouds(seed))
    assert float(precision(samples, points, neighbours)) == pytest.approx(
        inside(samples, points, neighbours)
    )
    assert float(recall(samples, points, neighbours)) == pytest.approx(
        inside(points, samples, neighbours)
    )


def test_a_dropped_mode_costs_recall_and_stray_points_cost_precision() -> None:
    draws = torch.Generator().manual_seed(0)
    left, right = (torch.randn(200, 2, generator=draws) + c for c in (-20.0, 20.0))
    both = torch.cat([left[:100], right[:100]])
    assert float(recall(left[100:], both)) == pytest.approx(0.5, abs=0.05)
    assert float(precision(left[100:], both)) > 0.9
    stray = torch.cat([left[100:150], right[100:150], 300 + torch.randn(100, 2, generator=draws)])
    assert float(precision(stray, both)) == pytest.approx(0.5, abs=0.05)


class Perfect(nn.Module):
    """The posterior mean of the mixture, in closed form."""

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        angles = torch.arange(diffusion.MODES) * (2 * math.pi / diffusion.MODES)
        centres = torch.stack([angles.cos(), angles.sin()], 1)
        data, noise = diffusion.DEVIATION**2, level.square()
        weights = (-torch.cdist(noisy, centres).square() / (2 * (data + noise))).softmax(1)
        means = (data * noisy[:, None] + noise[:, None] * centres) / (data + noise)[:, None]
        return (weights[:, :, None] * means).sum(1)


def test_a_perfect_denoiser_draws_the_mixture() -> None:
    drawn, other = diffusion.draw(Perfect()), diffusion.mixture(400)(7).test[0]
    assert torch.equal(drawn, diffusion.draw(Perfect()))
    assert float(precision(drawn, other)) > 0.95
    assert float(recall(drawn, other)) > 0.95
    real = squared_mmd(diffusion.mixture(400)(8).test[0], other)
    assert float(squared_mmd(drawn, other)) < 2 * float(real)


def test_the_points_are_the_stated_mixture() -> None:
    clean, noise, level = diffusion.mixture(20_000)(0).train
    radius = clean.norm(dim=1)
    assert float(radius.square().mean()) == pytest.approx(1 + 2 * 0.1**2, rel=0.02)
    assert float(clean.square().mean()) == pytest.approx(diffusion.VARIANCE, rel=0.02)
    assert float(noise.var()) == pytest.approx(1, rel=0.05)
    assert float(level.log().mean()) == pytest.approx(-1.2, abs=0.05)


def test_an_untrained_denoiser_with_output_0_is_the_best_linear_one() -> None:
    model = diffusion.Denoiser()
    for parameter in model.layers[-1].parameters():
        nn.init.zeros_(parameter)
    noisy, level = torch.randn(50, 2), torch.rand(50, 1) + 0.1
    shrunk = noisy * 0.51 / (0.51 + level**2)  # the variance of a coordinate is (1 + 2 * .01) / 2
    torch.testing.assert_close(model(noisy, level), shrunk)
