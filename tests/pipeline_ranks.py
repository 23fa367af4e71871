"""Laws of averages of a model split into stages, run by each rank: `python pipeline_ranks.py FOLDER RANK WORLD`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's own

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import polyak
from sharding_ranks import require_same, run_laws

RULES = {"ema": "exponential(0.9)", "last": "window(3)"}
ROWS, MICRO = 8, 2


def stages() -> list[nn.Module]:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    return [first.double(), nn.Sequential(nn.Tanh(), nn.Linear(4, 3)).double()]


def rows(step: int) -> Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def trained(model: nn.Module, step: Callable[[int], None]) -> polyak.Averager:
    averager = polyak.Averager(model, RULES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager.attach(optimizer)
    for i in range(6):
        step(i)
        optimizer.step()
        optimizer.zero_grad()
    return averager


def each_stage_has_the_average_of_its_part() -> None:
    """The average of a model trained whole, the gradient being the mean over the same microbatches."""
    rank, target = dist.get_rank(), torch.ones(ROWS, 3, dtype=torch.float64)
    stage = PipelineStage(stages()[rank], rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, MICRO, loss_fn=loss)

    def piped(step: int) -> None:
        schedule.step(*([rows(step)] if rank == 0 else []), target=target if rank else None)

    averager = trained(stage.submod, piped)
    model = nn.Sequential(*stages())
    whole = trained(model, lambda i: loss(model(rows(i)), target).backward())
    for name in RULES:
        wanted = {
            key.removeprefix(f"{rank}."): tensor
            for key, tensor in whole.average(name).items()
            if key.startswith(f"{rank}.")
        }
        got = averager.average(name)
        assert list(got) == list(wanted)
        for key, tensor in wanted.items():
            assert torch.allclose(got[key], tensor, rtol=0, atol=1e-15), key
    live = {key: tensor.clone() for key, tensor in stage.submod.state_dict().items()}
    average = averager.average("ema")
    with averager.applied("ema"):
        require_same(dict(stage.submod.state_dict()), average)
    require_same(dict(stage.submod.state_dict()), live)


LAWS: list[Callable[[], None]] = [each_stage_has_the_average_of_its_part]


if __name__ == "__main__":
    run_laws(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), LAWS)
