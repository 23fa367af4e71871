"""Modules and Trainers for the tests of the Lightning callback."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from integration_contract import (
    EVERY,
    LR,
    MOMENTUM,
    STEPS,
    Net,
    batches,
    held_out,
    loss,
    net,
    optimizer,
)

WARNINGS = (
    r"ignore:`isinstance\(treespec, LeafSpec\)`",  # Lightning's own, on this torch
    r"ignore:(?s).*does not have many workers",
    r"ignore:(?s)Be aware that when using `ckpt_path`",
    r"ignore:(?s).*Checkpoint directory .* exists and is not empty",
)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def loader(found: Any) -> DataLoader[Any]:
    """Batches that exist already, in their order."""
    return DataLoader(found, batch_size=None)


class Module(Net, LightningModule):
    """The contract's network and data: an epoch ends where an evaluation is due."""

    skip = False

    def training_step(self, batch: Any, _: int) -> Any:
        with torch.autocast("cpu", enabled=False):
            return loss(self, batch)

    def validation_step(self, batch: Any, _: int) -> None:
        with torch.autocast("cpu", enabled=False):
            self.log("val_loss", loss(self, batch))

    def test_step(self, batch: Any, _: int) -> None:
        self.log("test_loss", loss(self, batch))

    def configure_optimizers(self) -> Any:
        return optimizer(self)

    def train_dataloader(self) -> Any:
        done = self.current_epoch * EVERY % STEPS
        return loader(batches(skip=self.skip)[done : done + EVERY])

    def val_dataloader(self) -> Any:
        return loader(held_out())

    test_dataloader = val_dataloader


class Fused(Module):
    """The optimizer's hooks run even where a GradScaler skips its step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), LR, MOMENTUM, fused=True)


def made(kind: type[Any] = Module, *args: Any) -> Any:
    """A module with the first weights of the contract."""
    module = kind(*args)
    module.load_state_dict(net().state_dict())
    return module


def trainer_of(*callbacks: Any, epochs: int = 4, **options: Any) -> Trainer:
    """A Trainer of the contract's module: one epoch for each evaluation."""
    settings = {"max_epochs": epochs, "reload_dataloaders_every_n_epochs": 1, **QUIET, **options}
    return Trainer(callbacks=list(callbacks), **settings)


class Busy(LightningModule):
    """A module that logs in every way: two loaders, lists, metrics that accumulate, dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1)
        )
        self.mean, self.all, self.highest = MeanMetric(), CatMetric(), MaxMetric()
        self.group = MetricCollection([MeanSquaredError(), MeanAbsoluteError(), R2Score()])
        self.outputs: list[Tensor] = []
        self.lengths: list[int] = []

    def training_step(self, batch: Any, _: int) -> Any:
        value = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", value, on_step=False, on_epoch=True)
        return value

    def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> None:
        out = self.net(batch[0])
        each = (out - batch[1]).square()
        self.outputs.append(each)
        self.log("loss", each.mean(), prog_bar=True)
        self.log_dict({"max": each.max(), "min": each.min()}, reduce_fx="max")
        self.log("sum", each.sum(), on_step=True, on_epoch=True)
        if dataloader_idx == 0:
            self.mean.update(each)
            self.all.update(each.flatten())
            self.group.update(out, batch[1])
            self.log("metric", self.mean, add_dataloader_idx=False)
            self.log_dict(self.group, add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        self.log("list", torch.cat(self.outputs).mean())
        self.highest.update(torch.cat(self.outputs).mean())
        self.log(
            "highest", self.highest.compute()
        )  # this and the next are of all evaluations so far
        self.log("cat", self.all.compute().mean())
        self.lengths.append(len(self.outputs))
        self.outputs.clear()

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)

    def train_dataloader(self) -> Any:
        found: Any = [(x[0], y[0]) for x, y in batches()] * 4
        return DataLoader(found, batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return [loader(data) for data in LOADERS]

    test_dataloader = val_dataloader


LOADERS = [held_out(), batches()[:3]]


@torch.no_grad()
def expected(state: dict[str, Tensor]) -> dict[str, float]:
    """What `Busy` must log of these weights at its first evaluation, by plain arithmetic."""
    plain = Busy()
    plain.load_state_dict(state)
    plain.eval()
    found: dict[str, float] = {}
    errors = [[plain.net(x) - y for x, y in data] for data in LOADERS]
    for i, data in enumerate(errors):
        squares = [error.square() for error in data]
        end = f"/dataloader_idx_{i}"
        found["loss" + end] = torch.cat(squares).mean().item()
        found["max" + end] = max(each.max().item() for each in squares)
        found["min" + end] = max(each.min().item() for each in squares)
        sums = sum(each.sum().item() for each in squares) / len(squares)
        found |= {"sum" + end: sums, "sum_epoch" + end: sums}
    first = torch.cat(errors[0])
    targets = torch.cat([y for _, y in LOADERS[0]])
    square = first.square().mean().item()
    found |= {"metric": square, "cat": square, "MeanSquaredError": square}
    found["MeanAbsoluteError"] = first.abs().mean().item()
    found["R2Score"] = 1 - square / targets.var(correction=0).item()
    found["list"] = torch.cat([*errors[0], *errors[1]]).square().mean().item()
    return found
