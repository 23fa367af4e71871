"""The Lightning callback with the real Trainer, against a plain loop and against Lightning without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from integration_contract import (
    EVERY,
    IN_AN_AVERAGE,
    LAWS,
    MONITORED,
    RULES,
    STEPS,
    EvaluationError,
    Host,
    Net,
    Outcome,
    batches,
    held_out,
    loss,
    net,
    optimizer,
)  # fmt: skip
from polyak.integrations.lightning import AveragerCallback

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        r"`isinstance\(treespec, LeafSpec\)`",  # of Lightning on this torch
        r"(?s).*does not have many workers",
        r".*Checkpoint directory .* exists and is not empty",
    )
]


def loader(found: Any) -> DataLoader[Any]:
    """Batches that exist already, in their order."""
    return DataLoader(found, batch_size=None)


class Module(Net, LightningModule):
    """The contract's network and data."""

    skip = False

    def training_step(self, batch: Any, _: int) -> Any:
        with torch.autocast("cpu", enabled=False):
            return loss(self, batch)

    def validation_step(self, batch: Any, _: int) -> None:
        with torch.autocast("cpu", enabled=False):
            self.log("val_loss", loss(self, batch))

    def configure_optimizers(self) -> Any:
        return optimizer(self)

    def train_dataloader(self) -> Any:
        done = self.current_epoch * EVERY
        return loader(batches(skip=self.skip)[done : done + EVERY])

    def val_dataloader(self) -> Any:
        return loader(held_out())


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def made(kind: type[Any] = Module, *args: Any) -> Any:
    """A module with the first weights of the contract."""
    module = kind(*args)
    module.load_state_dict(net().state_dict(), strict=False)
    return module


def host(
    folder: Path,
    *,
    until: int = STEPS,
    resume: bool = False,
    skip: bool = False,
    fails: bool = False,
) -> Outcome:
    module = made(Module, IN_AN_AVERAGE if fails else math.inf)
    module.skip = skip
    metrics: list[dict[str, float]] = []

    def look(trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            found = {k: v.item() for k, v in trainer.callback_metrics.items()}
            names = ["live", *RULES]
            metrics.append({n: found["val_loss" + f"/{n}" * (n != "live")] for n in names})

    average = AveragerCallback(RULES)
    best = ModelCheckpoint(
        folder, monitor=f"val_loss/{MONITORED}", filename="{step}", save_last=True
    )
    amp = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    trainer = Trainer(
        max_epochs=until // EVERY,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[average, best, LambdaCallback(on_validation_end=look)],
        plugins=[amp] if skip else [],
        **QUIET,
    )
    try:
        trainer.fit(module, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    except EvaluationError:
        assert fails
    assert average.averager is not None
    return Outcome(
        live=module.state_dict(),
        averages={name: average.averager.average(name) for name in RULES},
        count=average.averager.count,
        metrics=metrics,
        best=average.exported(best.best_model_path, MONITORED),
    )


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_contract(law: Callable[[Host, Path], None], tmp_path: Path) -> None:
    law(host, tmp_path)
