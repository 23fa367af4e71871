"""Metrics of samples: points that a model drew against points of the true distribution, both n x d."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_mmd(samples: Tensor, points: Tensor, bandwidth: float = 0.2) -> Tensor:
    """The squared maximum mean discrepancy under the kernel exp(-|x - y|^2 / (2 bandwidth^2)).

    It is the mean kernel within each set less twice the mean between them (Gretton et al. 2012,
    eq. 5), at least 0, in units of the kernel; `bandwidth` in units of the points.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.cdist(a, b).square() / (2 * bandwidth**2)).exp().mean()

    return kernel(samples, samples) + kernel(points, points) - 2 * kernel(samples, points)


def precision(samples: Tensor, points: Tensor, neighbours: int = 5) -> Tensor:
    """The share of samples inside the support of the points (Kynkäänniemi et al. 2019).

    The support is the union of balls, one around each point, each reaching to the point's
    `neighbours`-th nearest other point.
    """
    return _inside(samples, points, neighbours)


def recall(samples: Tensor, points: Tensor, neighbours: int = 5) -> Tensor:
    """The share of points inside the support of the samples: `precision` with the roles exchanged."""
    return _inside(points, samples, neighbours)


def _inside(these: Tensor, support: Tensor, neighbours: int) -> Tensor:
    # The nearest is the point itself, so the k-th nearest other one is the (k + 1)-th smallest.
    radius = torch.cdist(support, support).kthvalue(neighbours + 1, dim=1).values
    return (torch.cdist(these, support) <= radius).any(1).float().mean()
