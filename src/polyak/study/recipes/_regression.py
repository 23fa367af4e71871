"""The article's regression problem: one data set and split, and its metrics."""

from __future__ import annotations

import torch
from sklearn.datasets import make_regression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from polyak.study import Data, Metric

SOURCE = "scikit-learn's make_regression (BSD-3)"


def data(_: int) -> Data:
    """The article's one data set and split; it has no test part, so the validation part is both."""
    x, y = make_regression(n_samples=2000, n_features=20, noise=0.1, random_state=42)
    scaled = (StandardScaler().fit_transform(column) for column in (x, y.reshape(-1, 1)))
    parts = train_test_split(*scaled, test_size=0.2, random_state=42)
    train_x, x, train_y, y = (torch.tensor(part, dtype=torch.float32) for part in parts)
    return Data((train_x, train_y), (x, y), (x, y))


def mse(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean squared error."""
    return functional.mse_loss(model(x), y)


def mae(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean absolute error."""
    return functional.l1_loss(model(x), y)


def r2(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`1 - MSE / variance`."""
    return 1 - mse(model, x, y) / y.var(correction=0)


METRICS = {"mse": Metric(mse), "mae": Metric(mae), "r2": Metric(r2, lower_is_better=False)}
