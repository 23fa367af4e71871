"""Exports of sharded averages: extra memory of each rank and seconds, by size, layout and way.

Run: python benchmarks/export_memory.py [--ranks 2] [--megabytes 512 2048]

Each row is a run of so many processes (gloo, one thread each). A third of the bytes is one tensor, the rest
are tensors of 64 MB; "a folder of its own" makes files that the other ranks do not see, as on hosts
without a common disk. Memory is the rise of the peak of resident memory (VmHWM) during the call,
the most of all ranks; seconds include forcing the file to the disk. The last row is what
one does without: `full_tensor()` of all on every rank, then safetensors' `save_file`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

if "--case" in sys.argv:
    warnings.simplefilter("ignore")  # torch's own

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros

import polyak
from polyak._ranks.agreement import chosen
from polyak.checkpoints import export
from sections import Section, machine

LIMIT = 300
MEGABYTE = 10**6
COLUMNS = 1024


@dataclass(frozen=True)
class Case:
    """What is exported, and how."""

    megabytes: int
    layout: str = "rows"
    seen: bool = True
    narrow: bool = False
    gathered: bool = False

    def told(self) -> tuple[str, ...]:
        way = "one folder" if self.seen else "a folder of its own each"
        way = "full_tensor() of all, save_file" if self.gathered else way
        return f"{self.megabytes} MB", self.layout, "bfloat16" if self.narrow else "float32", way


def cases(sizes: list[int]) -> list[Case]:
    found = []
    for size in sizes:
        found += [Case(size), Case(size, narrow=True), Case(size, "columns")]
        found += [Case(size, seen=False), Case(size, narrow=True, seen=False)]
    return [*found, Case(sizes[0], gathered=True)]


def averager(case: Case) -> polyak.Averager:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placement = Shard(0 if case.layout == "rows" else 1)
    sizes = [case.megabytes // 3] + [64] * (case.megabytes * 2 // 3 // 64)
    live: dict[str, Tensor] = {}
    for i, size in enumerate(sizes):
        shape = (size * MEGABYTE // 4 // COLUMNS, COLUMNS)
        weight = zeros(shape, device_mesh=mesh, placements=[placement])
        weight.to_local().normal_()
        live[f"layer.{i}.weight"] = weight
    held = polyak.Averager(live, "exponential(0.999)")
    held.update()
    return held


def write(case: Case, held: polyak.Averager, place: Path) -> None:
    if not case.gathered:
        export(place, held, dtype=torch.bfloat16 if case.narrow else None)
        return
    whole = {n: t.full_tensor() for n, t in held.average().items() if isinstance(t, DTensor)}
    if dist.get_rank() == 0:
        save_file(whole, place)
        with place.open("rb") as file:
            os.fsync(file.fileno())
    dist.barrier()


def peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024


def run_rank(case: Case, folder: Path, rank: int, ranks: int) -> None:
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    held = averager(case)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        os.chdir(own)
        common = chosen("place", lambda: own)
        place = Path(common if case.seen else "/proc/self/cwd") / "model.safetensors"
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")
        before, start = peak(), time.perf_counter()
        write(case, held, place)
        found = {"seconds": time.perf_counter() - start, "extra": peak() - before}
        (folder / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
        os.chdir(folder)
    sys.stdout.flush()


def measured(case: Case, ranks: int) -> tuple[str, ...]:
    """The row of a case."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        described = json.dumps(asdict(case))
        commands = [
            [sys.executable, __file__, "--case", described, name, str(rank), str(ranks)]
            for rank in range(ranks)
        ]
        processes = [subprocess.Popen(command, env=environment) for command in commands]
        try:
            codes = [process.wait(LIMIT) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            raise RuntimeError(f"{case}: the ranks ended with {codes}")
        found = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(ranks)]
    extra = max(each["extra"] for each in found) / MEGABYTE
    seconds = max(each["seconds"] for each in found)
    return *case.told(), f"{extra:.0f} MB", f"{seconds:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[512, 2048])
    options = parser.parse_args()
    section = Section(
        f"Export of a sharded average, {options.ranks} ranks",
        ("average", "sharded by", "written as", "the ranks see", "extra memory", "time"),
        [measured(case, options.ranks) for case in cases(options.megabytes)],
        machine(),
    )
    section.print(Console())


if __name__ == "__main__":
    if "--case" in sys.argv:
        _, _, described, folder, rank, ranks = sys.argv
        code = 1
        try:
            run_rank(Case(**json.loads(described)), Path(folder), int(rank), int(ranks))
            code = 0
        finally:
            os._exit(code)  # gloo's threads may not let go
    main()
