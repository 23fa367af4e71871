"""Seconds per call for models of many small tensors, as an unfused mixture of experts has them.

Run: python benchmarks/many_tensors.py [--counts 5000 20000 50000] [--quick]

It prints a table and writes it to `benchmarks/results/many_tensors.md`; `--quick` counts to 20 000
and writes nothing. Growth is the time of a tensor in the largest model over its time in the
smallest: 1.0 is linear, and quadratic work would give 10 here. `CALLS` is also the table of the law
in `tests/test_many_tensors.py`, which counts instructions: a new call is one line.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import polyak
from polyak import Averager, checkpoints, offline, recalibrate
from sections import Section, machine, wide_console

RESULT = Path(__file__).parent / "results" / "many_tensors.md"
WIDTH = 4
LIMIT_COUNT, LIMIT_SECONDS = 20_000, 1.0
"""A call takes at most so many seconds for so many tensors, on a core that does nothing else."""


@dataclass
class Case:
    """A model of `count` tensors, two averagers after two updates, and files of both in a folder.

    The second average is read out as three terms, and the live weights are one of them.
    """

    count: int
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(self.count // 2)))
        self.norms = nn.Sequential(*(nn.BatchNorm1d(WIDTH) for _ in range(self.count // 5)))
        self.averager = self.make()
        self.bema = Averager(self.model, "bema()")
        for averager in (self.averager, self.bema) * 2:
            averager.update()
        polyak.save(self.path("saved"), self.averager)
        checkpoints.export(self.path("exported"), self.averager)
        torch.save(self.model.state_dict(), self.folder / "live.pt")
        self.state = self.averager.state_dict()

    def make(self) -> Averager:
        """An averager of the model."""
        return Averager(self.model, "exponential(0.9)")

    def path(self, name: str) -> Path:
        """A safetensors file in the folder."""
        return self.folder / f"{name}.safetensors"

    def applied(self) -> None:
        """Into the block and out of it."""
        with self.averager.applied():
            pass

    def replaced(self) -> None:
        """An update after every weight was replaced."""
        for layer in self.model:
            layer.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))
        self.averager.update()

    def averaged(self, file: str) -> None:
        """The mean of a file with itself, every tensor computed."""
        dict(offline.average([self.folder / file] * 2))

    def compared(self) -> None:
        """A file against itself."""
        both = [checkpoints.read(self.path("exported")).weights() for _ in range(2)]
        assert offline.compare(*both).equal


CALLS: dict[str, Callable[[Case], object]] = {
    "Averager(model)": lambda case: case.make(),
    "EMA(model)": lambda case: polyak.EMA(case.model),
    "update()": lambda case: case.averager.update(),
    "update(), weights replaced": Case.replaced,
    "tracked": lambda case: case.averager.tracked,
    "average()": lambda case: case.averager.average(),
    "average() of three terms": lambda case: case.bema.average(),
    "weights(), each read": lambda case: dict(case.bema.weights()),
    "applied(), in and out": Case.applied,
    "copy_to()": lambda case: case.averager.copy_to(case.model),
    "summary(), printed": lambda case: str(case.averager.summary()),
    "state_dict()": lambda case: case.averager.state_dict(),
    "load_state_dict()": lambda case: case.averager.load_state_dict(case.state),
    "save()": lambda case: polyak.save(case.path("again"), case.averager, overwrite=True),
    "load()": lambda case: polyak.load(case.path("saved"), case.averager),
    "checkpoints.export()": lambda case: checkpoints.export(
        case.path("anew"), case.averager, overwrite=True
    ),
    "checkpoints.read(safetensors)": lambda case: dict(
        checkpoints.read(case.path("exported")).weights()
    ),
    "checkpoints.read(torch.save)": lambda case: dict(
        checkpoints.read(case.folder / "live.pt").weights()
    ),
    "offline.average(2 safetensors)": lambda case: case.averaged("exported.safetensors"),
    "offline.average(2 torch.save)": lambda case: case.averaged("live.pt"),
    "offline.compare(2 safetensors)": Case.compared,
    "recalibrate(), as many norms": lambda case: recalibrate(
        case.norms, [torch.ones(2, WIDTH)]
    ),
}  # fmt: skip


def seconds(call: Callable[[], object]) -> float:
    """The shorter of two calls."""
    taken = []
    for _ in range(2):
        gc.collect()
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken)


def measured(counts: Sequence[int], folder: Path, console: Console) -> Section:
    """Seconds of every call for every number of tensors, and how the time of a tensor grows."""
    found: dict[str, list[float]] = {name: [] for name in CALLS}
    for count in (10, *counts):  # the first makes all imports
        case = Case(count, folder / str(count))
        for name, call in CALLS.items():
            console.print(f"[dim]{count} tensors, {name} ...[/dim]")
            found[name].append(seconds(lambda call=call, case=case: call(case)))  # type: ignore[misc]
    rows = []
    for name, (_, *taken) in found.items():
        growth = taken[-1] / taken[0] / (counts[-1] / counts[0])
        rows.append((name, *(f"{each:.3f}" for each in taken), f"{growth:.2f}"))
    header = ("call", *(f"{count:,} tensors, s" for count in counts), "growth per tensor")
    note = f"Wanted: at most {LIMIT_SECONDS:g} s for {LIMIT_COUNT:,} tensors. {machine()}"
    return Section("Seconds per call for many small tensors", header, rows, note)


def main() -> None:
    """Measures, prints, and writes the table unless in a hurry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--counts", type=int, nargs="+", default=[5_000, LIMIT_COUNT, 50_000])
    parser.add_argument("--quick", action="store_true", help="up to 20 000; writes nothing")
    options = parser.parse_args()
    counts = options.counts[:2] if options.quick else options.counts
    console = wide_console()
    with tempfile.TemporaryDirectory() as folder:
        section = measured(counts, Path(folder), console)
    section.print(console)
    if not options.quick:
        text = (
            f"# Many small tensors\n\n`python benchmarks/many_tensors.py`\n\n{section.markdown()}"
        )
        RESULT.write_text(text)
        console.print(f"written: {RESULT}")


if __name__ == "__main__":
    main()
