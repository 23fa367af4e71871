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


METRICS = {
    "mse": Metric(mse, title="MSE"),
    "mae": Metric(mae, title="MAE"),
    "r2": Metric(r2, lower_is_better=False, title="R²"),
}
CAVEATS = (
    "As in the article there is no test part: the validation part sets the learning rate and the stop, and judges the models.",
    "X and y are standardised over all rows, the validation rows included, as in the article.",
    "There is one data set and one split, so seeds vary only the first weights, the order of batches and the dropout masks.",
    "The article's decay of .999 is a limit that its warm-up does not reach: 1 − (1 + n)^(−2/3) is .9965 after 4 800 steps. The arm ema_0.999 has it from the first step.",
    "swa_75 is the mean of the epoch ends from epoch 75, three quarters of about 100 epochs; a run that stops before has its live weights there. SWA's own learning rate is not used.",
)
