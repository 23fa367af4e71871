"""Lightning on sklearn's digits: a convolutional network, its EMA, and the best checkpoint of the EMA.

    python examples/digits_lightning.py --out run

Validation has `val_loss` of the live weights and `val_loss/ema` of the average in every epoch. At the end
the checkpoint that was best by `val_loss/ema` is tested, with both weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from polyak.integrations.lightning import AveragerCallback


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 16, 10),
        )  # fmt: skip

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def evaluate(self, batch: list[Tensor], stage: str) -> None:
        scores = self.net(batch[0])
        self.log(f"{stage}_loss", nn.functional.cross_entropy(scores, batch[1]))
        self.log(f"{stage}_accuracy", (scores.argmax(1) == batch[1]).float().mean())

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: list[Tensor], _: int) -> None:
        self.evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(out: Path, epochs: int, seed: int) -> None:
    """Train, test the best checkpoint, and print what both weights reach."""
    seed_everything(seed, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float().view(-1, 1, 8, 8), torch.tensor(labels))
    train, val, test = random_split(data, [0.4, 0.2, 0.4])
    average = AveragerCallback({"ema": "exponential(half_life=15)"})
    best = ModelCheckpoint(out, monitor="val_loss/ema", filename="best")
    trainer = Trainer(
        max_epochs=epochs, callbacks=[average, best], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model := Digits(), DataLoader(train, 32, shuffle=True), DataLoader(val, 512))
    (found,) = trainer.test(model, DataLoader(test, 1024), ckpt_path="best", verbose=False)
    for weights, suffix in (("live", ""), ("ema", "/ema")):
        loss, accuracy = found[f"test_loss{suffix}"], found[f"test_accuracy{suffix}"]
        print(f"{weights}: test loss {loss:.4f}, accuracy {accuracy:.4f}")
    print(f"exported: {average.exported(best.best_model_path, 'ema')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("digits"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.out, arguments.epochs, arguments.seed)
