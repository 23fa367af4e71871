"""Laws of averages of a model split into stages, run by each rank: `python pipeline_ranks.py FOLDER RANK WORLD`."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's own

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Shard, distribute_tensor

import polyak
from polyak import checkpoints
from polyak._ranks.agreement import chosen
from sharding_ranks import raises, require_same, run_laws, square, whole

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


def a_sharded_stage_is_saved_by_its_own_ranks() -> None:
    """Each stage, sharded over two ranks: its file, its snapshots, its export, none of the other's."""
    mesh = square("stage", "data")
    number, group = mesh.get_local_rank("stage"), mesh.get_group("data")
    model = stages()[number]
    fully_shard(model, mesh=mesh["data"])
    averager = polyak.Averager(model, RULES)
    folder = Path(chosen("folder", tempfile.mkdtemp)) / f"stage-{number}"
    recorder = polyak.Recorder(averager, folder / "run", every=2, group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        given = torch.randn(4, 4 if number else 5, dtype=torch.float64)
        model(given).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averager.update()
        if number == 0 or step < 3:  # a stage goes on when another is done
            recorder.update()
    average = whole(averager.average("ema"))
    file = folder / "model.safetensors"
    polyak.save(folder / "average", averager, group=group)
    checkpoints.export(file, averager, "ema", group=group)
    checkpoints.export(folder / "many", averager, "ema", group=group, shard_bytes=100)
    fresh = polyak.Averager(model, RULES)
    polyak.load(folder / "average", fresh)
    require_same(whole(fresh.average("ema")), average)
    dist.barrier(group=group)
    require_same(load_file(file), {name: average[name] for name in load_file(file)})
    assert set(load_file(file)) == set(average)
    assert len(list((folder / "many").iterdir())) > 2
    found = checkpoints.read(folder / "average")
    assert sorted(found.average("ema")) == sorted(average)
    times = [1, 2, 4] if number == 0 else [1, 2]
    assert [int(path.name[-10:]) for path in sorted((folder / "run").iterdir())] == times
    dist.barrier()
    refuse_other_groups(averager, folder, mesh.get_group("stage"))


def refuse_other_groups(averager: polyak.Averager, folder: Path, across: dist.ProcessGroup) -> None:
    """Ranks of two stages lack the other parts of either, and all ranks have two averages."""
    path = folder / "new.safetensors"
    for group in (across, None):
        with raises(ValueError, "save: ranks do not agree", "tensor 0.weight", "`group=`"):
            polyak.save(path, averager, group=group)
    with raises((ValueError, RuntimeError), "are only on the ranks", "give the group of all ranks"):
        checkpoints.export(path, averager, "ema", group=across)
    with raises(ValueError, "export: ranks do not agree", "0.weight", "`group=`"):
        checkpoints.export(path, averager, "ema")
    assert not path.exists()
    dist.barrier()


def stages_of_equal_shapes_are_not_taken_for_copies() -> None:
    """Nor copies for stages: tensors spread over two meshes, each of which has all of them."""
    mesh = square("stage", "data")
    number, group = mesh.get_local_rank("stage"), mesh.get_group("data")
    for sharded in (False, True):
        folder = Path(chosen("folder", tempfile.mkdtemp)) / "it"
        own = Path(f"{folder}-{number}")
        torch.manual_seed(number)
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        if sharded:
            fully_shard(model, mesh=mesh["data"])
        averager = polyak.Averager(model, "uniform()")
        averager.update()
        told = ("ranks 0 and 2 have the same shard of ", "0.weight", "`group=`")
        with raises(ValueError, *told):
            checkpoints.save_distributed(folder, {"average": averager})
        if sharded:
            with raises(ValueError, *told):
                polyak.save(folder, averager)
            with raises(ValueError, *told):
                checkpoints.export(folder.with_suffix(".safetensors"), averager)
            recorder = polyak.Recorder(averager, folder, every=1)
            with raises(ValueError, *told):
                recorder.update()
            with raises(ValueError, "ranks do not agree", "rank 2: ", "folder: "):
                polyak.Recorder(averager, own, every=1)
        checkpoints.save_distributed(own, {"average": averager}, group=group)
        later = Path(f"{own}-later")
        checkpoints.save_distributed_async(later, {"average": averager}, group=group).result(60)
        alone, together = (polyak.Averager(model, "uniform()") for _ in range(2))
        polyak.load(own, alone)
        checkpoints.load_distributed(later, {"average": together}, group=group)
        for fresh in (alone, together):
            require_same(whole(fresh.average()), whole(averager.average()))
    copies = {"w": distribute_tensor(torch.arange(6.0), mesh["data"], [Shard(0)])}
    averager = polyak.Averager(copies, "uniform()")
    averager.update()
    folder = Path(chosen("folder", tempfile.mkdtemp))
    polyak.save(folder / "copies", averager)
    checkpoints.export(folder / "copies.safetensors", averager)
    with raises(ValueError, "ranks do not agree", "rank 2: ", "path: "):
        checkpoints.export(folder / f"{number}.safetensors", averager)
    assert torch.equal(load_file(folder / "copies.safetensors")["w"], torch.arange(6.0))
    dist.barrier()


def laws_on(world: int) -> Sequence[Callable[[], None]]:
    if world == 2:
        return [each_stage_has_the_average_of_its_part]
    return [
        a_sharded_stage_is_saved_by_its_own_ranks,
        stages_of_equal_shapes_are_not_taken_for_copies,
    ]


if __name__ == "__main__":
    run_laws(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), laws_on(int(sys.argv[3])))
