"""polyak's callback beside Lightning's own EMAWeightAveraging, in the same training: prints a table.

    python benchmarks/lightning_averages.py

Each row is measured: the time of a step, the bytes held, and what is left of the live weights after an
exception, a resume, a checkpoint of weights alone, and a whole training.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # Lightning's own

import torch  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from in_training import State, furthest, held, in_turns  # noqa: E402
from polyak.integrations.lightning import AveragerCallback  # noqa: E402

DECAY, STEPS, EVERY, ROUNDS = 0.9, 60, 10, 5


class Module(LightningModule):
    """A network of 2.1 M weights; its third validation can fail."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
        self.fails = fails

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.net(batch).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor, _: int) -> None:
        if self.fails and self.trainer.global_step == 3 * EVERY:
            raise KeyError("in the validation")
        self.log("val_loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(self.current_epoch)
        found: Any = list(torch.randn(EVERY, 32, 512, generator=generator))
        return DataLoader(found, batch_size=None)

    def val_dataloader(self) -> Any:
        found: Any = [torch.ones(32, 512)]
        return DataLoader(found, batch_size=None)


class Start(Callback):
    """Notes when a step begins: the first callback."""

    def __init__(self) -> None:
        self.since = 0.0
        self.steps: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.since = time.perf_counter()


class Stop(Callback):
    """Notes when a step and what follows it have ended: the last callback."""

    def __init__(self, start: Start) -> None:
        self.start = start

    def on_train_batch_end(self, *_: Any) -> None:
        self.start.steps.append(1e3 * (time.perf_counter() - self.start.since))


def fit(*callbacks: Any, steps: int = STEPS, fails: bool = False, ckpt: Path | None = None) -> Any:
    """The trained module and the last metrics."""
    module, found = Module(fails=fails), [each for each in callbacks if each is not None]
    trainer = Trainer(
        max_epochs=steps // EVERY, callbacks=found, logger=False, enable_progress_bar=False,
        reload_dataloaders_every_n_epochs=1, enable_model_summary=False, accelerator="cpu",
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in found),
    )  # fmt: skip
    try:
        trainer.fit(module, ckpt_path=ckpt)
    except KeyError:
        assert fails
    return module, {name: value.item() for name, value in trainer.callback_metrics.items()}


def state(module: LightningModule) -> State:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def told(got: State, steps: int) -> str:
    """Which weights of the training after so many steps these are."""
    module, _ = fit(average := MAKE["polyak"](), steps=steps)
    found = {"live": state(module), "the average": average.averager.average("ema")}
    return next((name for name, each in found.items() if furthest(got, each) < 1e-6), "neither")


MAKE: dict[str, Callable[[], Any]] = {
    "no average": lambda: None,
    "polyak": lambda: AveragerCallback({"ema": f"exponential({DECAY})"}),
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=DECAY),
}


def resumed(make: Callable[[], Any], folder: Path) -> float:
    """How far the weights of a resumed run are from those of one without a stop, at most."""
    whole, _ = fit(one := make())
    fit(make(), ModelCheckpoint(folder, save_last=True), steps=STEPS // 2)
    module, _ = fit(two := make(), ckpt=folder / "last.ckpt")
    far = furthest(state(module), state(whole))
    if isinstance(one, AveragerCallback):
        assert one.averager is not None and two.averager is not None
        far = max(far, furthest(two.averager.average(), one.averager.average()))
    return far


def rows(name: str, folder: Path) -> list[str]:
    """What a callback leaves, in the order of `TITLES`."""
    make = MAKE[name]
    failed, _ = fit(make(), fails=True)
    module, metrics = fit(make(), ModelCheckpoint(folder / "whole", save_last=True))
    fit(make(), ModelCheckpoint(folder / "weights", save_last=True, save_weights_only=True))
    beside = folder / "weights" / "last.ema.safetensors"
    files = [
        torch.load(folder / kind / "last.ckpt", weights_only=True)["state_dict"]
        for kind in ("whole", "weights")
    ]
    exported = f"; beside it: {told(load_file(beside), STEPS)}" if beside.exists() else ""
    return [
        ", ".join(sorted(metrics)),
        told(state(failed), 3 * EVERY),
        told(state(module), STEPS),
        told(files[0], STEPS),
        told(files[1], STEPS) + exported,
        f"{resumed(make, folder / 'resumed'):.1g}",
    ]


TITLES = (
    "metrics of a validation",
    "an exception in a validation leaves in the module",
    "after the training the module has",
    "`state_dict` of a checkpoint",
    "`save_weights_only=True` keeps",
    "a resumed run differs by at most",
)


def step_times(make: Callable[[], Any]) -> list[float]:
    """The milliseconds of the steps of a training, but the first."""
    start = Start()
    fit(start, make(), Stop(start))
    return start.steps[EVERY:]


def trained(make: Callable[[], Any]) -> object:
    """What there is after a training: module, trainer and callback."""
    return fit(average := make()), average


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seconds = in_turns(MAKE, ROUNDS, step_times)
    mebibytes = {name: held(partial(trained, make)) / 2**20 for name, make in MAKE.items()}
    print(f"| | {' | '.join(MAKE)} |\n|---|{'---|' * len(MAKE)}")
    print(f"| time of a step, ms | {' | '.join(f'{t:.2f}' for t in seconds.values())} |")
    print(f"| tensors held, MiB | {' | '.join(f'{m:.1f}' for m in mebibytes.values())} |")
    with tempfile.TemporaryDirectory() as folder:
        columns = [rows(name, Path(folder) / name) for name in list(MAKE)[1:]]
    for title, *cells in zip(TITLES, *columns, strict=True):
        print(f"| {title} | | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
