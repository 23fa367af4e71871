"""Makes `tests/peers/`: files by the real packages of libraries that this project does not install.

    python tests/make_peer_files.py tests/peers

It needs mosaicml 0.32.1, mmengine 0.10.7, timm 1.0.31 and the file collections/common/callbacks/ema.py
of nemo-toolkit 3.0.0, whose path is NEMO_EMA in the environment. Beside each file lies a safetensors
file with what the library held when it saved (live/, average/), the live weights of each step after
that (later/), and the average it came to by itself (final/).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from models import snapshot, wander
from peer_files import Net, Recorder, Run, copied, fit

SAVED, STEPS = 40, 80
DTYPE = torch.float64


def main(folder: Path) -> None:
    """Every file anew."""
    folder.mkdir(exist_ok=True)
    for make in (timm, mmengine, composer, nemo):
        torch.manual_seed(0)
        note(make(folder))


def note(run: Run) -> None:
    """What the library held, beside its file."""
    parts: dict[str, Mapping[str, Tensor]] = {
        "live": run.live,
        "average": run.average,
        "final": run.final,
        "later": {name: torch.stack([each[name] for each in run.later]) for name in run.live},
    }
    flat = {f"{part}/{name}": t.clone() for part, held in parts.items() for name, t in held.items()}
    beside = Path(f"{run.path}.safetensors")
    save_file(flat, beside)
    beside.chmod(0o644)


def batches() -> DataLoader[Any]:
    x, y = torch.randn(4 * STEPS, 3, dtype=DTYPE), torch.randn(4 * STEPS, 2, dtype=DTYPE)
    return DataLoader(TensorDataset(x, y), batch_size=4)


class Noted:
    """The weights that a trainer's callback saw, step by step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.live: list[dict[str, Tensor]] = []
        self.average: list[dict[str, Tensor]] = []

    def __call__(self, live: dict[str, Tensor], average: Mapping[str, Tensor]) -> None:
        self.live.append(live)
        self.average.append(copied(average))

    def run(self) -> Run:
        at = SAVED - 1
        return Run(self.path, self.live[at], self.average[at], self.live[SAVED:], self.average[-1])


def timm(folder: Path) -> Run:
    """`CheckpointSaver` with a `ModelEmaV3`, and the arguments that its scripts save."""
    utils = importlib.import_module("timm.utils")
    model = Net().to(DTYPE)
    average = utils.ModelEmaV3(model, decay=0.97)
    noted = Noted(folder / "timm.pth.tar")
    for step in range(1, STEPS + 1):
        wander(model, step)
        average.update(model, step=step)
        noted(snapshot(model), average.module.state_dict())
        if step == SAVED:
            saver = utils.CheckpointSaver(
                model,
                torch.optim.SGD(model.parameters(), 0.1),
                args=argparse.Namespace(model="net", lr=0.1, model_ema_decay=0.97),
                model_ema=average,
                checkpoint_dir=str(folder),
            )
            saver.save_checkpoint(0, metric=1.0)
    (folder / "last.pth.tar").rename(noted.path)
    for left in ("checkpoint-0.pth.tar", "model_best.pth.tar"):
        (folder / left).unlink()
    return noted.run()


def mmengine(folder: Path) -> Run:
    """`Runner.train` with an `EMAHook` that updates at every third step."""
    base: Any = importlib.import_module("mmengine.model").BaseModel
    hooks: Any = importlib.import_module("mmengine.hooks")
    noted = Noted(folder / "mmengine.pth")

    class Model(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().to(DTYPE)

        def forward(self, x: Tensor, y: Tensor, mode: str = "tensor") -> Any:
            out = self.net(x)
            return {"loss": ((out - y) ** 2).mean()} if mode == "loss" else out

    class Note(hooks.Hook):  # type: ignore[misc]
        priority = "LOWEST"

        def after_train_iter(self, runner: Any, *_: object, **__: object) -> None:
            averaging = next(h for h in runner.hooks if isinstance(h, hooks.EMAHook))
            noted(snapshot(runner.model), averaging.ema_model.module.state_dict())

    runner = importlib.import_module("mmengine.runner").Runner(
        Model(),
        work_dir=str(folder / "work"),
        train_dataloader=batches(),
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05}},
        train_cfg={"by_epoch": False, "max_iters": STEPS},
        custom_hooks=[{"type": "EMAHook", "momentum": 0.03, "interval": 3}, Note()],
        default_hooks={
            "checkpoint": {"type": "CheckpointHook", "interval": SAVED, "by_epoch": False},
            "logger": {"type": "LoggerHook", "interval": 10},
        },
        log_level="ERROR",
    )
    runner.train()
    (folder / "work" / f"iter_{SAVED}.pth").rename(noted.path)
    shutil.rmtree(folder / "work")
    return noted.run()


def composer(folder: Path) -> Run:
    """`Trainer.fit` with the algorithm `EMA`."""
    package: Any = importlib.import_module("composer")
    base: Any = importlib.import_module("composer.models").ComposerModel
    averaging = importlib.import_module("composer.algorithms").EMA(half_life="20ba")
    # What machine it ran on is nobody's business.
    setattr(importlib.import_module("composer.core.state"), "get_composer_env_dict", dict)  # noqa: B010
    work = folder / "work"
    noted = Noted(folder / "composer.pt")

    class Model(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().to(DTYPE)

        def forward(self, batch: list[Tensor]) -> Tensor:
            out: Tensor = self.net(batch[0])
            return out

        def loss(self, out: Tensor, batch: list[Tensor]) -> Tensor:
            return ((out - batch[1]) ** 2).mean()

    class Note(package.Callback):  # type: ignore[misc]
        def batch_end(self, state: Any, _: object) -> None:
            held = averaging.ema_model
            noted(snapshot(state.model), {**held.named_parameters_dict, **held.named_buffers_dict})

    model = Model()
    package.Trainer(
        model=model,
        train_dataloader=batches(),
        max_duration=f"{STEPS}ba",
        algorithms=[averaging],
        callbacks=[Note()],
        optimizers=torch.optim.SGD(model.parameters(), 0.05),
        save_folder=str(work),
        save_interval=f"{SAVED}ba",
        save_filename="ba{batch}.pt",
        run_name="net",
        device="cpu",
        progress_bar=False,
        save_overwrite=True,
    ).fit()
    (work / f"ba{SAVED}.pt").rename(noted.path)
    shutil.rmtree(work)
    return noted.run()


def nemo(folder: Path) -> Run:
    """A Lightning `Trainer.fit` with NeMo's `EMA` at every third step, and the twin it saves."""
    spec = importlib.util.spec_from_file_location("nemo_ema", os.environ["NEMO_EMA"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    averaging = module.EMA(decay=0.97, every_n_steps=3)
    trainers: list[Any] = []

    def average() -> dict[str, Tensor]:
        trainer = trainers[0]
        trainer.optimizers[0].join()
        names = [name for name, _ in trainer.lightning_module.named_parameters()]
        return dict(zip(names, trainer.optimizers[0].ema_params, strict=True))

    class Twin(Recorder):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: object) -> None:
            trainers[:] = [trainer]
            super().on_train_batch_end(trainer, pl_module)
            if trainer.global_step == self.saved:
                with averaging.save_ema_model(trainer):
                    trainer.save_checkpoint(self.path.with_stem("nemo-EMA"))

    return fit(
        folder / "nemo.ckpt", [averaging], average, DTYPE, saved=SAVED, steps=STEPS, recorder=Twin
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
