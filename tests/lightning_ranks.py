"""What each rank runs with Lightning: `torchrun lightning_ranks.py <law> <folder>`, or one process that spawns."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # torch's and Lightning's own

import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from integration_contract import EVERY, RULES, STEPS, evaluate, plain  # noqa: E402
from lightning_modules import Module, made, trainer_of  # noqa: E402
from polyak import Averager, load  # noqa: E402
from polyak.integrations.lightning import AveragerCallback  # noqa: E402

OPTIONS: dict[str, Any] = {"devices": 2, "use_distributed_sampler": False}


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t.clone() for n, t in state.items()}


def require_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


class Check(Callback):
    """At the end of the training every rank has the plain loop's averages and metrics."""

    def __init__(self, average: AveragerCallback, steps: int) -> None:
        self.average, self.steps = average, steps

    def on_train_end(self, trainer: Any, module: Any) -> None:
        averager, wanted = self.average.averager, plain(self.steps)
        assert averager is not None and averager.count == self.steps
        require_equal(module.state_dict(), wanted.live)
        for name in RULES:
            require_equal(averager.average(name), wanted.averages[name])
            got = trainer.callback_metrics[f"val_loss/{name}"].item()
            assert abs(got - evaluate(wanted.averages[name])) < 1e-5
        print("checked", flush=True)


def fit(folder: Path, steps: int, strategy: Any, ckpt: Path | None = None) -> AveragerCallback:
    """All ranks train on the same batches, so the gradients are those of one process."""
    average = AveragerCallback(RULES)
    last = ModelCheckpoint(folder, save_last=True, monitor="val_loss/fast", filename="{step}")
    trainer = trainer_of(
        average, Check(average, steps), last, epochs=steps // EVERY, strategy=strategy, **OPTIONS
    )
    trainer.fit(made(), ckpt_path=ckpt, weights_only=True)
    return average


def begins(folder: Path, strategy: str) -> None:
    average = fit(folder, 2 * EVERY, strategy)
    for name in RULES:
        exported = average.exported(folder / "last.ckpt", name)
        require_equal(load_file(exported), plain(2 * EVERY).averages[name])


def replicas(folder: Path) -> None:
    """Every rank has whole averages, the first writes them, and a run resumes."""
    begins(folder, "ddp")
    fit(folder, STEPS, "ddp", folder / "last.ckpt")


def spawned(folder: Path) -> None:
    begins(folder, "ddp_spawn")


class Sharded(Module):
    def configure_model(self) -> None:
        assert self.device_mesh is not None
        fully_shard(self.body, mesh=self.device_mesh["data_parallel"])


def sharded(folder: Path) -> None:
    """Shards go into a folder beside the checkpoint, and a resumed run equals one without a stop."""

    def run(place: Path, epochs: int, ckpt: Path | None = None) -> tuple[Any, Any, dict[str, Any]]:
        average = AveragerCallback(RULES)
        last = ModelCheckpoint(place, save_last=True, monitor="val_loss/fast", filename="{step}")
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        trainer = trainer_of(average, last, epochs=epochs, strategy=strategy, **OPTIONS)
        trainer.fit(module := made(Sharded), ckpt_path=ckpt)
        assert average.averager is not None and average.averager.sharded
        found = {name: whole(average.averager.average(name)) for name in RULES}
        return trainer, last, {"live": whole(module.state_dict()), **found}

    _, _, without = run(folder / "one", 4)
    _, _, half = run(folder / "two", 2)
    parts = folder / "two" / "last.fast-slow.dcp"
    plain_one = Averager(made(), RULES)
    load(parts, plain_one)  # in one process, without Lightning
    for name in RULES:
        exported = AveragerCallback(RULES).exported(folder / "two" / "last.ckpt", name)
        require_equal(load_file(exported), half[name])
        require_equal(plain_one.average(name), half[name])
    trainer, last, resumed = run(folder / "two", 4, folder / "two" / "last.ckpt")
    for key, state in without.items():
        require_equal(resumed[key], state)
    got = trainer.callback_metrics["val_loss/fast"].item()
    assert abs(got - evaluate(resumed["fast"])) < 1e-5
    trainer.strategy.barrier()
    names = {path.name for path in (folder / "two").iterdir()}
    kept = {Path(last.best_model_path).stem, "last"}
    endings = ("ckpt", "fast.safetensors", "slow.safetensors", "fast-slow.dcp")
    assert names == {f"{stem}.{ending}" for stem in kept for ending in endings}, names
    print("checked", flush=True)


LAWS = {law.__name__: law for law in (replicas, spawned, sharded)}

if __name__ == "__main__":
    LAWS[sys.argv[1]](Path(sys.argv[2]))
