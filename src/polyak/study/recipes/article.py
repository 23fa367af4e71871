"""The founding article: a small regression, with an EMA whose validation loss sets the rate and the stop."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sklearn.datasets import make_regression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from polyak import ArticleEMA, Uniform, Window
from polyak.study import Arm, Data, Ensemble, Metric, Plateau, Study
from polyak.study.recipes._article_claims import CLAIMS, EMA

EPOCH = 50  # steps: 1600 rows in batches of 32


def network() -> nn.Module:
    """20-64-32-1 with dropout, weights by Xavier."""
    first = [
        nn.Linear(20, 64),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Dropout(0.2),
    ]
    layers = nn.Sequential(*first, nn.Linear(32, 1))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return layers


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


def adam(parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """Adam with the article's weight decay."""
    return torch.optim.Adam(parameters, learning_rate, weight_decay=1e-5)


study = Study(
    name="article",
    title="The founding article's regression",
    model=network,
    data=data,
    loss=mse,
    metrics={"mse": Metric(mse), "mae": Metric(mae), "r2": Metric(r2, lower_is_better=False)},
    optimizer=adam,
    learning_rates=(1e-3,),
    schedules={"plateau": Plateau(EMA, factor=0.5, patience=10, stop=20, after=25)},
    arms={
        EMA: Arm(ArticleEMA(beta=0.999, update_after_step=100, power=2 / 3)),
        **{f"ema_{decay}": f"exponential({decay})" for decay in (0.9, 0.99, 0.995, 0.999)},
        "ema_0.999_debiased": "exponential(0.999, debias=True)",
        **{f"sma_{size}": f"window({size})" for size in (100, 500, 1000)},
        **{f"lawa_{size}": Arm(Window(size), every=EPOCH) for size in (5, 10, 20)},
        "swa_75": Arm(Uniform(), every=EPOCH, start=75 / 500),
        **{f"ensemble_{size}": Ensemble(size, every=EPOCH) for size in (5, 10, 20)},
    },
    claims=CLAIMS,
    steps=500 * EPOCH,
    evaluations=500,
    batch_size=32,
    seeds=64,
    stacked=32,
    quick={"seeds": 8},
    source="scikit-learn's make_regression (BSD-3)",
)
