"""The laws of exports of sharded averages, run by each rank: `python export_ranks.py FOLDER RANK WORLD`."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's own

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
    zeros,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import polyak
from polyak._ranks.agreement import chosen
from polyak._ranks.shard_geometry import Box, box
from polyak.checkpoints import export
from polyak.checkpoints._safetensors import by_ranks as sharded_export
from sharding_ranks import (
    RULES,
    Sharded,
    Training,
    fsdp,
    grid,
    hybrid,
    raises,
    run_laws,
    square,
    tensor_parallel,
    to_local,
    whole,
)

Shapes = dict[tuple[int, ...], torch.dtype]
MIB = 1 << 20
ALLOWED = 128 * MIB
FILE = "model.safetensors"
EITHER = (ValueError, RuntimeError, OSError, KeyError)


def layouts() -> Sequence[Sharded]:
    return [grid, hybrid] if dist.get_world_size() == 4 else [fsdp, tensor_parallel]


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A new folder that all ranks see."""
    yield Path(chosen("folder", tempfile.mkdtemp))


@contextmanager
def own_folder() -> Iterator[Path]:
    """A path that means another folder on every rank: no rank sees the files of another."""
    before = Path.cwd()
    os.chdir(tempfile.mkdtemp())
    try:
        yield Path("/proc/self/cwd")
        dist.barrier()
        assert dist.get_rank() == 0 or not list(Path.cwd().iterdir())
    finally:
        os.chdir(before)


FOLDERS = (shared_folder, own_folder)


def contents(path: Path) -> dict[str, bytes]:
    """File -> its bytes, of a file or of all in a folder."""
    assert not list(path.parent.glob(".*.part")), "parts are left"
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return {each.name: each.read_bytes() for each in found}


def both(
    live: dict[str, Tensor], rules: dict[str, str], **options: Any
) -> tuple[polyak.Averager, polyak.Averager]:
    """Averagers of spread weights, and of the whole ones in one process."""
    gathered = {name: tensor.clone() for name, tensor in whole(live).items()}
    return polyak.Averager(live, rules, **options), polyak.Averager(gathered, rules, **options)


def trained(
    sharded: Sharded, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[polyak.Averager, polyak.Averager]:
    """Averagers of a sharded model's training, and of the same weights in one process."""
    run = Training(sharded, dtype)
    averager = polyak.Averager(run.model, RULES, **options)
    weights = {name: t.clone() for name, t in whole(dict(run.model.state_dict())).items()}
    one = polyak.Averager(weights, RULES, **options)
    for _ in range(4):
        run.train(1, averager)
        for name, tensor in whole(dict(run.model.state_dict())).items():
            weights[name].copy_(tensor)
        one.update()
    return averager, one


def require_same_files(
    averager: polyak.Averager,
    one: polyak.Averager,
    file: str = FILE,
    pieces: int = 5,
    **options: Any,
) -> None:
    """Bit for bit the files of one process, whether ranks see them or not, in whatever pieces."""
    for folder in FOLDERS:
        for most in (pieces, sharded_export.WINDOW):
            with folder() as place, small_pieces(most):
                export(place / file, averager, **options)
                dist.barrier()
                if dist.get_rank() == 0:
                    alone = Path(tempfile.mkdtemp()) / file
                    export(alone, one, **options)
                    assert contents(place / file) == contents(alone), (folder, most, options)


@contextmanager
def small_pieces(most: int) -> Iterator[None]:
    before, sharded_export.WINDOW = sharded_export.WINDOW, most
    try:
        yield
    finally:
        sharded_export.WINDOW = before


def the_file_is_that_of_one_process() -> None:
    for sharded in layouts():
        averager, one = trained(sharded)
        for name in RULES:
            require_same_files(averager, one, name=name)
            average = whole(averager.average(name))
            with shared_folder() as place:
                export(place / FILE, averager, name)
                with safe_open(place / FILE, framework="pt") as opened:
                    assert set(opened.keys()) == set(average)
                    assert opened.metadata() == {"format": "pt"}
                    for key, tensor in average.items():
                        assert torch.equal(opened.get_tensor(key), tensor), key
                dist.barrier()


def in_another_dtype_and_in_several_files() -> None:
    for sharded in layouts():
        averager, one = trained(sharded, torch.bfloat16)
        require_same_files(averager, one, name="ema")
        averager, one = trained(sharded, torch.float32)
        require_same_files(averager, one, name="bema", dtype=torch.bfloat16)
        require_same_files(averager, one, "many", name="last", shard_bytes=100)
        with shared_folder() as place:
            export(place / "many", averager, "last", shard_bytes=100)
            found = json.loads((place / "many" / "model.safetensors.index.json").read_text())
            average = whole(averager.average("last"))
            assert set(found["weight_map"]) == set(average)
            for key, file in found["weight_map"].items():
                with safe_open(place / "many" / file, framework="pt") as opened:
                    assert torch.equal(opened.get_tensor(key), average[key]), key
            dist.barrier()


def what_is_not_averaged_is_the_models() -> None:
    """Sharded tensors among it; tied ones are there once."""
    for sharded in layouts():
        averager, one = trained(sharded, select=["first.*", "passes"])
        require_same_files(averager, one, name="all")
    tied = nn.Sequential(nn.Linear(3, 5), nn.Linear(3, 5, bias=False))
    tied[1].weight = tied[0].weight
    fully_shard(tied)
    averager = polyak.Averager(tied, "uniform()")
    averager.update()
    with shared_folder() as place:
        export(place / FILE, averager)
        with safe_open(place / FILE, framework="pt") as opened:
            assert set(opened.keys()) == {"0.weight", "0.bias"}
        dist.barrier()


def averages_divided_over_replicas_are_written() -> None:
    run = Training()
    group = dist.group.WORLD
    averager = polyak.Averager(run.model, RULES, shard=group)
    one = polyak.Averager(run.model, RULES)
    run.train(4, averager, one)
    for name in RULES:
        require_same_files(averager, one, name=name)


def spread(shapes: Shapes) -> dict[str, Tensor]:
    """Tensors in every way of spreading them."""
    torch.manual_seed(1)
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    ways: dict[str, tuple[Any, list[Placement]]] = {
        "rows": (line, [Shard(0)]), "columns": (line, [Shard(1)]), "last": (line, [Shard(2)]),
        "same": (line, [Replicate()]),
    }  # fmt: skip
    if world == 4:
        both_ways = square("data", "tensor")
        ways |= {
            "both": (both_ways, [Shard(0), Shard(1)]), "twice": (both_ways, [Shard(0), Shard(0)]),
            "copies": (both_ways, [Replicate(), Shard(1)]), "half": (both_ways, [Shard(1), Replicate()]),
            "some": (both_ways["tensor"], [Shard(1)]), "others": (both_ways["data"], [Shard(0)]),
        }  # fmt: skip
    held: dict[str, Tensor] = {"plain": torch.randn(3), "number": torch.tensor(2.5)}
    for way, (mesh, placements) in ways.items():
        for shape, dtype in shapes.items():
            tensor = torch.randn(shape).to(dtype)
            held[f"{way} {shape}"] = distribute_tensor(tensor, mesh, placements)
    held["turned over"] = distribute_tensor(torch.randn(5, 7).T, line, [Shard(0)])
    return held


def every_layout_is_written() -> None:
    """Narrow tensors and empty ones in small pieces, and such as have long runs of bytes."""
    narrow: Shapes = {
        (7, 5, 3): torch.float64,
        (1, 3, 2): torch.bfloat16,
        (2, 0, 3): torch.complex64,
    }
    write_spread(narrow, pieces=5)
    write_spread({(3, 150_000, 1): torch.float32}, pieces=50_000)


def write_spread(shapes: Shapes, pieces: int) -> None:
    live = spread(shapes)
    averager, one = both(live, {"all": "uniform()", "last": "window(2)"})
    for _ in range(3):
        for tensor in live.values():
            to_local(tensor).mul_(1.3)
        for item in one.tracked:
            item.local().copy_(whole(live)[item.name])
        averager.update()
        one.update()
    for name in ("all", "last"):
        require_same_files(averager, one, name=name, pieces=pieces)


def failing(place: Path, averager: polyak.Averager, *said: str, **options: Any) -> None:
    """An export that fails on all ranks, leaves nothing behind, and does not spoil the next one."""
    old = place / "old.safetensors"
    if dist.get_rank() == 0:
        old.write_bytes(b"as it was")
    dist.barrier()
    for path, overwrite in ((place / FILE, False), (old, True)):
        with raises(EITHER, *said):
            export(path, averager, overwrite=overwrite, **options)
        dist.barrier()
    if dist.get_rank() == 0:
        assert [each.name for each in place.iterdir()] == [old.name]
        assert old.read_bytes() == b"as it was"
        old.unlink()
    export(place / FILE, averager)
    dist.barrier()


def of_rows(rows: int = 8, columns: int = 4) -> polyak.Averager:
    """An average of rows and of columns; the last rank's alone has a value that float16 lacks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    content = torch.ones(rows, columns)
    content[-1, -1] = 1e5
    live: dict[str, Tensor] = {"before": distribute_tensor(torch.ones(3), mesh, [Shard(0)])}
    live["rows"] = distribute_tensor(content, mesh, [Shard(0)])
    live["columns"] = distribute_tensor(content, mesh, [Shard(1)])
    averager = polyak.Averager(live, "uniform()")
    averager.update()
    return averager


def a_value_that_does_not_fit_ends_it_on_all() -> None:
    for folder in FOLDERS:
        with folder() as place:
            failing(place, of_rows(), "rows has a value of 1e+05", dtype=torch.float16)


def a_full_disk_ends_it_on_all() -> None:
    """On the first rank, which makes the file, and on another; a limit of the system stands in."""
    averager = of_rows(rows=1 << 16)
    for folder, full in ((shared_folder, 0), (shared_folder, 1), (own_folder, 0)):
        with folder() as place:
            limit = 1 << 16 if dist.get_rank() == full else None
            with largest_file(limit), raises(EITHER, "File too large", str(place / FILE)):
                export(place / FILE, averager)
            dist.barrier()
            assert not list(place.iterdir())
            export(place / FILE, averager)
            dist.barrier()


def what_fails_while_others_send_ends_it_on_all() -> None:
    def interrupted(done: int, _: int) -> None:
        if done > 12:
            raise KeyError("while it was written")

    for folder in FOLDERS:
        with folder() as place, small_pieces(5):
            failing(place, of_rows(), "while it was written", progress=interrupted)


@contextmanager
def largest_file(size: int | None) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def errors_are_raised_on_all() -> None:
    averager = of_rows()
    rank = dist.get_rank()
    with shared_folder() as place:
        export(place / FILE, averager)
        with raises(
            FileExistsError if rank == 0 else RuntimeError, "already exists; pass overwrite=True"
        ):
            export(place / FILE, averager)
        for path, shard_bytes in ((place / "x.pt", None), (place / FILE, 5)):
            with raises(ValueError, "out is ", "wanted a"):
                export(path, averager, shard_bytes=shard_bytes)
        told = (
            "rank 1: ",
            "rows: (8, 4) torch.float",
            "as (Shard(dim=0))",
            "do not agree with rank 0",
        )
        with raises(ValueError, *told):
            export(place / "a.safetensors", averager, dtype=[torch.float64, None][rank == 0])
        with raises(ValueError, "do not agree", "shard_bytes: 7, wanted 8"):
            export(place / "many", averager, shard_bytes=[7, 8][rank == 0])
        if rank == 0:
            averager.update()
        with raises(ValueError, "n=1", "n=2"):
            export(place / "a.safetensors", averager)
        if rank != 0:
            averager.update()
        with raises(KeyError, "average 'no' is unknown"):
            export(place / "a.safetensors", averager, "no")
        new = polyak.Averager({"w": averager.tracked[0].held()}, "uniform()")
        with raises(RuntimeError, "no average before the first update"):
            export(place / "a.safetensors", new)
        dist.barrier()
        assert [each.name for each in place.iterdir()] == [FILE]
    refuse_sums()


def refuse_sums() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sums = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    averager = polyak.Averager({"w": sums}, "uniform()")
    averager.update()
    with raises(ValueError, "w: it is spread as", "Partial", "redistribute"):
        export("a.safetensors", averager)


def progress_is_told_on_the_first_rank() -> None:
    averager = of_rows()
    for folder in FOLDERS:
        told: list[tuple[int, int]] = []
        with folder() as place:
            export(place / FILE, averager, progress=lambda *now: told.append(now))  # noqa: B023
        total = 4 * (3 + 8 * 4 * 2)
        if dist.get_rank() == 0:
            assert told == sorted(told)
            assert told[-1] == (total, total)
        else:
            assert not told


def parts_that_are_cut_twice_are_where_boxes_say() -> None:
    """As FSDP2 cuts what tensor parallelism has cut, rows that divide by neither number of ranks."""
    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    for rows in (1, 5, 7, 13):
        wanted = torch.arange(2.0 * rows).view(rows, 2)
        linear = nn.Linear(2, rows, bias=False)
        linear.load_state_dict({"weight": wanted})
        model = nn.Sequential(linear)
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        weight: Any = linear.weight
        assert torch.equal(to_local(weight.detach()), wanted[slices(box(weight))]), rows
        averager = polyak.Averager(model, "uniform()")
        averager.update()
        for folder in FOLDERS:
            with folder() as place:
                export(place / FILE, averager)
                dist.barrier()
                if dist.get_rank() == 0:
                    with safe_open(place / FILE, framework="pt") as opened:
                        assert torch.equal(opened.get_tensor("0.weight"), wanted)
                dist.barrier()


def slices(found: Box) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(*found, strict=True))


def peak() -> int:
    """The most memory that was resident since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) << 10


def large() -> polyak.Averager:
    """576 MiB of weights over the ranks, a large tensor and some smaller, by rows and by columns."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    live: dict[str, Tensor] = {}
    for name, mib, placement in (
        ("large", 320, Shard(0)), ("rows", 64, Shard(0)), ("more rows", 64, Shard(0)),
        ("columns", 64, Shard(1)), ("long", 64, Shard(0)),
    ):  # fmt: skip
        shape = (mib * MIB // 4,) if name == "long" else (mib * MIB // 4 // 1024, 1024)
        live[name] = zeros(shape, device_mesh=mesh, placements=[placement])
        to_local(live[name]).normal_()
    averager = polyak.Averager(live, "exponential(0.5)")
    averager.update()
    return averager


def memory_is_bounded() -> None:
    """By the pieces, wherever a rank's parts of 160 MiB are read from and whatever they become."""
    averager = large()
    average = averager.weights()
    for folder in FOLDERS:
        with folder() as place:
            extra = extra_memory(lambda: export(place / FILE, averager, dtype=torch.bfloat16))
            print(f"{folder.__name__}: {extra // MIB} MiB", file=sys.stderr)
            assert extra <= ALLOWED, f"{folder.__name__}: {extra // MIB} MiB"
            dist.barrier()
            for name in average:
                require_written(place, name, average[name])
            dist.barrier()
            if dist.get_rank() == 0:
                (place / FILE).unlink()


def extra_memory(call: Callable[[], object]) -> int:
    """By how much the peak of resident memory rises in a call."""
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    call()
    return peak() - before


def require_written(place: Path, name: str, average: Tensor) -> None:
    """This rank's part is in the file, where the rank sees it."""
    if not (place / FILE).exists():
        return
    with safe_open(place / FILE, framework="pt") as opened:
        part = opened.get_slice(name)[slices(box(average))]  # type: ignore[arg-type]
        assert torch.equal(part, to_local(average).bfloat16()), name


LAWS: list[Callable[[], None]] = [
    the_file_is_that_of_one_process,
    in_another_dtype_and_in_several_files,
    what_is_not_averaged_is_the_models,
    averages_divided_over_replicas_are_written,
    every_layout_is_written,
    a_value_that_does_not_fit_ends_it_on_all,
    a_full_disk_ends_it_on_all,
    what_fails_while_others_send_ends_it_on_all,
    errors_are_raised_on_all,
    progress_is_told_on_the_first_rank,
]


def laws_on(world: int) -> list[Callable[[], None]]:
    if world == 6:
        return [parts_that_are_cut_twice_are_where_boxes_say]
    return LAWS + [memory_is_bounded] * (world == 2)


if __name__ == "__main__":
    run_laws(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), laws_on(int(sys.argv[3])))
