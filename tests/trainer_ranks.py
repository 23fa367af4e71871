"""Averages in a Trainer on several ranks: `python trainer_ranks.py folder rank world`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

warnings.simplefilter("ignore")  # torch's and accelerate's own

import torch.distributed as dist  # noqa: E402
from accelerate import FullyShardedDataParallelPlugin  # type: ignore[import-untyped]  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import BertForSequenceClassification, PrinterCallback, Trainer  # noqa: E402

import tiny_trainers as tiny  # noqa: E402
from accelerate_ranks import (  # noqa: E402
    forget_accelerators,
    require_close,
    require_same,
    shard,
    shared_folder,
    whole,
)
from polyak import checkpoints  # noqa: E402
from polyak.integrations.transformers import AveragerCallback  # noqa: E402
from sharding_ranks import run_laws  # noqa: E402
from tiny_trainers import Steps, ema  # noqa: E402

DECAY = 0.75
EMA = {"ema": f"exponential({DECAY})"}


class Sharded(Trainer):
    """A Trainer on FSDP2."""

    kind = "FULL_STATE_DICT"

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard(
            self.accelerator,
            FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=self.kind),
        )
        self.is_fsdp_enabled = True


class InShards(Sharded):
    """It saves each rank's shards of the live weights."""

    kind = "SHARDED_STATE_DICT"


class WholeSteps(Steps):
    """The whole weights after each step."""

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:  # type: ignore[override]
        self.taken.append(whole(model.state_dict()))


class Run:
    """A training with averages, and what every step left."""

    def __init__(
        self, kind: type[Trainer], folder: Path, resume: Path | None = None, **options: Any
    ):
        forget_accelerators()
        self.steps = WholeSteps()
        self.trainer = tiny.trainer(folder, kind=kind, callbacks=[self.steps], **options)
        self.trainer.remove_callback(PrinterCallback)
        self.averages = AveragerCallback(EMA).attach(self.trainer)
        self.trainer.train(None if resume is None else str(resume))
        dist.barrier()

    def average(self) -> Mapping[str, Tensor]:
        assert self.averages.averager is not None
        return whole(self.averages.averager.average("ema"))

    def weights(self) -> Mapping[str, Tensor]:
        return whole(cast(nn.Module, self.trainer.model).state_dict())


def _follows(kind: type[Trainer], made: set[str]) -> None:
    """Averages are right, resumed exactly, exported as a model, and best by their own metric."""
    folder = shared_folder()
    run = Run(kind, folder)
    require_close(run.average(), ema(run.steps.taken, DECAY))
    last = folder / f"checkpoint-{tiny.STEPS}" / "averages"
    assert {path.name for path in last.iterdir()} == made
    if "ema" in made:
        loaded = BertForSequenceClassification.from_pretrained(last / "ema").state_dict()
    else:
        one = shared_folder() / f"rank{dist.get_rank()}.safetensors"
        checkpoints.export(one, checkpoints.read(last / "ema.dcp"), "ema")
        loaded = load_file(one)
    require_same(loaded, run.average())
    again = Run(kind, shared_folder(), folder / f"checkpoint-{tiny.EVERY}")
    require_close(again.average(), run.average())
    best = Run(
        kind,
        shared_folder(),
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_loss",
        greater_is_better=True,  # the loss falls, so an early step counts as the best
    )
    step = best.trainer.state.best_global_step
    assert step is not None and step < tiny.STEPS
    require_close(best.average(), ema(best.steps.taken[:step], DECAY))
    require_same(best.weights(), best.average())


def ddp() -> None:
    _follows(Trainer, {"ema", "ema.safetensors"})


def fsdp2() -> None:
    _follows(Sharded, {"ema", "ema.dcp"})


def fsdp2_with_live_weights_in_shards() -> None:
    _follows(InShards, {"ema.dcp"})


LAWS: list[Callable[[], None]] = [ddp, fsdp2, fsdp2_with_live_weights_in_shards]


if __name__ == "__main__":
    rank, world = sys.argv[2:4]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    run_laws(Path(sys.argv[1]), int(rank), int(world), LAWS)
