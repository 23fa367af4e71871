"""The article's experiment as one reads it there: one seed, one script, no cleverness.

Run `python benchmarks/plain_article.py 0`. It is the baseline that `study_speed.py` times, and the
oracle that the study's recipe must equal bit for bit (`tests/test_study_article.py`).
It imports nothing of polyak.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field

import torch
from sklearn.datasets import make_regression
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

UPDATE_AFTER_STEP = 100
BETA = 0.999
PATIENCE = 20


@dataclass
class History:
    train_loss: list[float] = field(default_factory=list)
    val_loss_original: list[float] = field(default_factory=list)
    val_loss_ema: list[float] = field(default_factory=list)
    r2_original: list[float] = field(default_factory=list)
    r2_ema: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    history: History
    live: dict[str, float]
    average: dict[str, float]
    live_weights: list[torch.Tensor]
    average_weights: list[torch.Tensor]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(32, 1),
        )  # fmt: skip
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def load_data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y = make_regression(n_samples=2000, n_features=20, noise=0.1, random_state=42)
    x = StandardScaler().fit_transform(x)
    y = StandardScaler().fit_transform(y.reshape(-1, 1))
    parts = train_test_split(x, y, test_size=0.2, random_state=42)
    x_train, x_val, y_train, y_val = (torch.tensor(p, dtype=torch.float32) for p in parts)
    return x_train, x_val, y_train, y_val


def ema_decay(call: int) -> float:
    """The article's warm-up: inv_gamma 1, power 2/3, at most BETA."""
    since = call - UPDATE_AFTER_STEP - 1
    return min(max(1 - (1 + since) ** (-2 / 3), 0.0), BETA) if since > 0 else 0.0


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, call: int) -> None:
    # the article's class copies up to this call, and once more at its first averaging call
    copying = call <= UPDATE_AFTER_STEP + 2
    for average, live in zip(ema.parameters(), model.parameters(), strict=True):
        if copying:
            average.copy_(live)
        else:
            average.lerp_(live, 1 - ema_decay(call))


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    model.eval()
    prediction = model(x)
    loss = nn.functional.mse_loss(prediction, y).item()
    model.train()
    target, guess = y.numpy(), prediction.numpy()
    return {
        "loss": loss,
        "mse": float(mean_squared_error(target, guess)),
        "mae": float(mean_absolute_error(target, guess)),
        "r2": float(r2_score(target, guess)),
    }


def train(
    seed: int,
    max_epochs: int = 500,
    order: torch.Generator | None = None,
    dropout: int | None = None,
) -> Outcome:
    """One run. The article seeds everything at once; `order` and `dropout` seed their draws apart."""
    x_train, x_val, y_train, y_val = load_data()
    torch.manual_seed(seed)
    model = Network()
    ema = copy.deepcopy(model)
    data = TensorDataset(x_train, y_train)
    loader = DataLoader(data, batch_size=32, shuffle=True, generator=order)
    if dropout is not None:
        torch.manual_seed(dropout)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=10)
    criterion = nn.MSELoss()

    history, best, wait, call = History(), float("inf"), 0, 0
    for _ in range(max_epochs):
        model.train()
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            call += 1
            update_ema(ema, model, call)
            total += loss.item()
        live, average = evaluate(model, x_val, y_val), evaluate(ema, x_val, y_val)
        history.train_loss.append(total / len(loader))
        history.val_loss_original.append(live["loss"])
        history.val_loss_ema.append(average["loss"])
        history.r2_original.append(live["r2"])
        history.r2_ema.append(average["r2"])
        scheduler.step(average["loss"])
        if average["loss"] < best:
            best, wait = average["loss"], 0
        else:
            wait += 1
        if wait >= PATIENCE:
            break
    weights = [[p.detach().clone() for p in m.parameters()] for m in (model, ema)]
    return Outcome(history, live, average, *weights)


if __name__ == "__main__":
    outcome = train(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(f"stopped at epoch {len(outcome.history.train_loss)}")
    for name, metrics in (("live", outcome.live), ("EMA", outcome.average)):
        print(name, {key: round(value, 4) for key, value in metrics.items()})
