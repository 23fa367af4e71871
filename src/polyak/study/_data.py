"""Data: the article's regression problem, standardised and split as in the article."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polyak.study._settings import Settings


class Data(NamedTuple):
    """Inputs (rows, features) and targets (rows, 1), float32, for training and validation."""

    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor


def make_data(settings: Settings) -> Data:
    """Make the data set; X and y are standardised over all rows, as in the article."""
    from sklearn.datasets import make_regression
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    x, y = make_regression(
        n_samples=settings.rows,
        n_features=settings.features,
        noise=settings.noise,
        random_state=settings.data_seed,
    )
    x = StandardScaler().fit_transform(x)
    y = StandardScaler().fit_transform(y.reshape(-1, 1))
    train_x, valid_x, train_y, valid_y = (
        torch.tensor(part, dtype=torch.float32)
        for part in train_test_split(
            x, y, test_size=settings.validation_share, random_state=settings.data_seed
        )
    )
    return Data(train_x, train_y, valid_x, valid_y)


def shuffled(data: Data, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """The batches of one epoch, drawn from torch's global generator as DataLoader(shuffle=True) does.

    The loader's iterator draws a seed for workers, even without workers; RandomSampler then draws the
    seed of its own generator. Both draws are needed to get the same dropout masks.
    """
    torch.empty((), dtype=torch.int64).random_()
    sampler_seed = int(torch.empty((), dtype=torch.int64).random_().item())
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(sampler_seed))
    inputs, targets = data.train_x[order], data.train_y[order]
    return list(zip(torch.split(inputs, batch_size), torch.split(targets, batch_size), strict=True))
