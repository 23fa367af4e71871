"""Averages in a loop of Accelerate on several ranks: `python accelerate_ranks.py folder rank world`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

warnings.simplefilter("ignore")  # torch's and accelerate's own

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin  # type: ignore[import-untyped]  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from polyak import Averager, checkpoints  # noqa: E402
from polyak.integrations.accelerate import register  # noqa: E402
from sharding_ranks import run_laws  # noqa: E402

RULE = "exponential(0.75)"
STEPS = 4


def network() -> nn.Module:
    """A network whose weights have rows that 2 ranks cannot share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + rank))


def forget_accelerators() -> None:
    """Let the next Accelerator choose anew how it distributes."""
    for state in (AcceleratorState, PartialState):
        state._reset_state()


def shard(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Let an Accelerator shard: it can on CPUs as on GPUs, but does not choose to."""
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


class Run:
    """A training of the network by a fresh Accelerator; `fsdp` shards it."""

    def __init__(
        self,
        *,
        fsdp: bool,
        averaged: bool = True,
        early: bool = False,
        attached: bool = True,
        **options: Any,
    ) -> None:
        forget_accelerators()
        self.accelerator = Accelerator(cpu=True)
        if fsdp:
            shard(self.accelerator, FullyShardedDataParallelPlugin(fsdp_version=2))
        model = network()
        if early:
            self.averager = Averager(model, RULE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if averaged and not early:
            self.averager = Averager(self.model, RULE)
        if averaged:
            register(self.accelerator, self.averager, **options)
        if averaged and attached:
            self.averager.attach(self.optimizer)

    def train(self, first: int, last: int) -> Run:
        for step in range(first, last):
            out = self.model(batch(step, dist.get_rank()))
            self.accelerator.backward((out - 1).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def average(self) -> dict[str, Tensor]:
        return whole(self.averager.average())


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without their wrappers, gathered."""
    return {
        name.removeprefix("module."): t.full_tensor() if isinstance(t, DTensor) else t.clone()
        for name, t in tensors.items()
    }


def plain() -> dict[str, Tensor]:
    """The average of one process that sees the batches of all ranks."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    averager = Averager(model, RULE)
    for step in range(STEPS):
        out = model(torch.cat([batch(step, rank) for rank in range(dist.get_world_size())]))
        (out - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averager.update()
    return averager.average()


def shared_folder() -> Path:
    """A new folder that all ranks know."""
    told: list[Any] = [mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told)
    return Path(told[0])


def require_close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor)


def require_same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def _carried(*, fsdp: bool) -> None:
    folder, run = shared_folder(), Run(fsdp=fsdp).train(0, STEPS // 2)
    run.accelerator.save_state(str(folder))
    dist.barrier()
    names = {path.name for path in (folder / "averages").iterdir()}
    assert names == {"average.dcp" if fsdp else "average.safetensors"}
    run.train(STEPS // 2, STEPS)
    require_close(run.average(), plain())
    again = Run(fsdp=fsdp)
    again.accelerator.load_state(str(folder))
    assert again.averager.count == STEPS // 2
    require_same(again.train(STEPS // 2, STEPS).average(), run.average())
    assert again.averager.count == STEPS
    Run(fsdp=fsdp, averaged=False).accelerator.load_state(str(folder))  # and out of averages
    alone = Averager(network(), RULE)  # one process has the shards of all
    saved = checkpoints.read(folder / "averages" / next(iter(names))).average("average")
    assert saved.keys() == alone.slot_specs()["average"].keys()


def ddp_carries_averages() -> None:
    _carried(fsdp=False)


def fsdp2_carries_all_shards() -> None:
    _carried(fsdp=True)


def a_folder_without_averages_is_refused_on_all_ranks_or_passed_over() -> None:
    folder = shared_folder()
    Run(fsdp=True, averaged=False).train(0, 1).accelerator.save_state(str(folder))
    dist.barrier()
    try:
        Run(fsdp=True).accelerator.load_state(str(folder))
        raise AssertionError("it was loaded")
    except FileNotFoundError as error:
        assert "missing_ok=True" in str(error)
    joined = Run(fsdp=True, attached=False, missing_ok=True)
    joined.accelerator.load_state(str(folder))
    joined.averager.attach(joined.optimizer)
    assert joined.averager.count == 0
    joined.train(1, 2)
    assert joined.averager.count == 1


def an_averager_made_before_prepare_follows_ddp_and_refuses_fsdp2() -> None:
    require_close(Run(fsdp=False, early=True).train(0, STEPS).average(), plain())
    try:
        Run(fsdp=True, early=True).train(0, 1)
        raise AssertionError("it averaged weights that no one trains")
    except RuntimeError as error:
        assert "shard the model" in str(error)


LAWS: list[Callable[[], None]] = [
    ddp_carries_averages,
    fsdp2_carries_all_shards,
    a_folder_without_averages_is_refused_on_all_ranks_or_passed_over,
    an_averager_made_before_prepare_follows_ddp_and_refuses_fsdp2,
]


if __name__ == "__main__":
    rank, world = sys.argv[2:4]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    run_laws(Path(sys.argv[1]), int(rank), int(world), LAWS)
