"""scikit-learn's digits: 1797 images of 8 x 8 grey pixels (UCI's optical digits test set; BSD-3, in the package)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyak.study import Claim, Data, Metric, Region, gain

SOURCE = "scikit-learn's load_digits (BSD-3): 1000 images to train, 397 to select, 400 to test"


def digits(split: int, noise: float = 0.0) -> Data:
    """The digits as (images 1 x 8 x 8 in [0, 1], labels), split and spoilt by the seed `split`.

    A share `noise` of the training labels, exactly, is replaced by another label drawn uniformly;
    validation and test labels are as they are.
    """
    from sklearn.datasets import load_digits

    found, draw = load_digits(), torch.Generator().manual_seed(split)
    order = torch.randperm(len(found.target), generator=draw)
    images = torch.tensor(found.data, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(found.target)[order]
    train, validation, test = labels.split([1000, 397, 400])
    spoilt = round(noise * len(train))  # the order is random already: the first are any
    train = train.clone()
    train[:spoilt] += torch.randint(1, 10, (spoilt,), generator=draw)
    parts = images.split([1000, 397, 400])
    return Data((parts[0], train % 10), (parts[1], validation), (parts[2], test))


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy in nats."""
    return nn.functional.cross_entropy(model(images), labels)


def error(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The share of images that the model names wrongly."""
    scores: Tensor = model(images)
    return (scores.argmax(1) != labels).float().mean()


METRICS = {
    "loss": Metric(cross_entropy, title="cross entropy (nats)"),
    "error": Metric(error, title="share of wrong labels"),
}

FEWER_ERRORS = Claim(
    "At a constant learning rate the EMA over 10 % of the run names at least 10 % fewer images wrongly "
    "than the live weights.",
    gain("ema_10%", metric="error", schedule="constant"),
    Region.above(0.10),
    "the sign, under label noise: Morales-Brotons et al. 2024 (arXiv 2411.18704); the bound is ours",
)
