"""Files of other libraries, made by their own packages as installed.

A `Run` follows a library for 300 steps of a model and saves what the library saves after step 150.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import ema_pytorch
import lightning
import torch
import torch_ema
from ema_pytorch import post_hoc_ema
from lightning.pytorch import callbacks
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.data import DataLoader, TensorDataset

import polyak
from models import snapshot, wander

SAVED, STEPS = 150, 300
State = dict[str, Tensor]


class Net(nn.Module):
    """Parameters and the buffers of a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.body(x))
        return y


class Peer(NamedTuple):
    """A library's average of a model: its update, what it saves, its tensors by the model's names."""

    update: Callable[[], object]
    state: Callable[[], object]
    average: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Run:
    """A library's file after step 150, what was in it, and how the library itself went on."""

    path: Path
    live: State
    average: State
    later: list[State]
    final: State


def follow(path: Path, peer: Peer, model: nn.Module) -> Run:
    """A random walk of a model under a peer, which saves to `path` half-way."""
    for step in range(SAVED):
        wander(model, step)
        peer.update()
    torch.save(peer.state(), path)
    live, average = snapshot(model), copied(peer.average())
    later = []
    for step in range(SAVED, STEPS):
        wander(model, step)
        peer.update()
        later.append(snapshot(model))
    return Run(path, live, average, later, copied(peer.average()))


def copied(tensors: Mapping[str, Tensor]) -> State:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def by_position(model: nn.Module, shadows: list[Tensor]) -> State:
    return dict(zip((name for name, _ in model.named_parameters()), shadows, strict=True))


def of_module(
    average: Any, inner: Callable[[Any], nn.Module], update: Callable[[], object]
) -> Peer:
    return Peer(update, average.state_dict, lambda: inner(average).state_dict())


def ema(model: nn.Module, **options: Any) -> Peer:
    average = ema_pytorch.EMA(model, **options)
    return of_module(average, lambda a: a.ema_model, average.update)


def polyak_ema(model: nn.Module, **options: Any) -> Peer:
    average = polyak.EMA(model, **options)
    return of_module(average, lambda a: a.ema_model, average.update)


def karras(model: nn.Module, **options: Any) -> Peer:
    average = post_hoc_ema.KarrasEMA(model, **options)
    return of_module(average, lambda a: a.ema_model, average.update)


def torch_ema_average(model: nn.Module, **options: Any) -> Peer:
    average = torch_ema.ExponentialMovingAverage(model.parameters(), **options)
    shadows = average.shadow_params
    return Peer(average.update, average.state_dict, lambda: by_position(model, shadows))


def averaged_model(model: nn.Module, **options: Any) -> Peer:
    average = swa_utils.AveragedModel(model, **options)
    update = lambda: average.update_parameters(model)  # noqa: E731
    return of_module(average, lambda a: a.module, update)


def diffusers_average(model: nn.Module, **options: Any) -> Peer:
    average = diffusers.training_utils.EMAModel(model.parameters(), **options)
    update = lambda: average.step(model.parameters())  # noqa: E731
    return Peer(update, average.state_dict, lambda: by_position(model, average.shadow_params))


class Module(lightning.LightningModule):
    """The net, trained on noise."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = Net().to(dtype)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        loss: Tensor = ((self.net(x) - y) ** 2).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Recorder(callbacks.Callback):
    """Saves a checkpoint after a step (or the epoch that ends with it); notes the live weights."""

    def __init__(self, path: Path, saved: int, average: Callable[[], Mapping[str, Tensor]]) -> None:
        self.path, self.saved, self.average = path, saved, average
        self.live: State = {}
        self.held: State = {}
        self.later: list[State] = []
        self.final: State = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: object) -> None:
        if trainer.global_step > self.saved:
            self.later.append(snapshot(pl_module))
        if trainer.global_step == self.saved:
            self.live, self.held = snapshot(pl_module), copied(self.average())
            trainer.save_checkpoint(self.path)
        self.final = copied(self.average())


class EpochRecorder(Recorder):
    """As `StochasticWeightAveraging` looks at the weights: when an epoch begins."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step >= self.saved:
            self.later.append(snapshot(pl_module))
        self.final = copied(self.average())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: object) -> None:
        if trainer.global_step == self.saved:
            self.live, self.held = snapshot(pl_module), copied(self.average())
            trainer.save_checkpoint(self.path)


def fit(
    path: Path,
    averaging: list[callbacks.Callback],
    average: Callable[[], Mapping[str, Tensor]],
    dtype: torch.dtype,
    *,
    saved: int = SAVED,
    steps: int = STEPS,
    recorder: type[Recorder] = Recorder,
) -> Run:
    """A real `Trainer.fit` in epochs of ten steps, with averaging callbacks."""
    noted = recorder(path, saved, average)
    data = TensorDataset(torch.randn(40, 3, dtype=dtype), torch.randn(40, 2, dtype=dtype))
    trainer = lightning.Trainer(
        max_epochs=steps // 10,
        accelerator="cpu",
        callbacks=[*averaging, noted],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
    )
    trainer.fit(Module(dtype), DataLoader(data, batch_size=4))
    return Run(path, noted.live, noted.held, noted.later, noted.final)


def averaged_by(callback: Any) -> Callable[[], Mapping[str, Tensor]]:
    """The tensors of a `WeightAveraging` callback's average by the module's names."""
    return lambda: dict(callback._average_model.module.state_dict())
