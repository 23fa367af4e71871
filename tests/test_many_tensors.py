"""Many tensors: the work of every call grows in proportion to their number.

A mixture of experts has tens of thousands of small tensors. Work is counted in Python instructions,
not in seconds, so that a busy machine changes nothing.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import polyak
from polyak import Averager, checkpoints, offline, recalibrate

LAYERS = 30
MOST = 1.05
"""Each further batch of layers costs as much as the one before; quadratic work gives up to 1.67."""


@dataclass
class Case:
    """A model of `2 * count` tensors and its averager, after two updates; a folder of its own."""

    count: int
    folder: Path

    def __post_init__(self) -> None:
        self.model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(self.count)))
        self.averager = self.make()
        for _ in range(2):
            self.averager.update()
        polyak.save(self.path("saved"), self.averager)
        checkpoints.export(self.path("exported"), self.averager, "ema")
        torch.save(self.model.state_dict(), self.folder / "live.pt")
        self.state = self.averager.state_dict()

    def make(self) -> Averager:
        """An averager of two rules; the second reads three terms out, the live weights among them."""
        return Averager(self.model, {"ema": "exponential(0.9)", "bema": "bema()"})

    def path(self, name: str) -> Path:
        """A safetensors file in the folder."""
        return self.folder / f"{name}.safetensors"

    def applied(self) -> None:
        """In and out."""
        with self.averager.applied("ema"):
            pass

    def replaced(self) -> None:
        """An update after every parameter was replaced."""
        for layer in self.model:
            layer.weight = nn.Parameter(torch.ones(1, 1))
        self.averager.update()

    def recalibrated(self) -> None:
        """Running statistics of as many norms."""
        model = nn.Sequential(*(nn.BatchNorm1d(1) for _ in range(self.count)))
        recalibrate(model, [torch.ones(2, 1)])

    def averaged(self, file: str) -> None:
        """The mean of a file with itself, every tensor of it computed."""
        dict(offline.average([self.folder / file] * 2))

    def compared(self) -> None:
        """A file against itself."""
        both = [checkpoints.read(self.path("exported")).weights() for _ in range(2)]
        assert offline.compare(*both).equal


CALLS: dict[str, Callable[[Case], object]] = {
    "Averager": lambda case: case.make(),
    "EMA": lambda case: polyak.EMA(case.model),
    "update": lambda case: case.averager.update(),
    "update, all replaced": Case.replaced,
    "tracked": lambda case: case.averager.tracked,
    "average": lambda case: case.averager.average("ema"),
    "average of several terms": lambda case: case.averager.average("bema"),
    "weights": lambda case: dict(case.averager.weights("bema")),
    "applied": Case.applied,
    "copy_to": lambda case: case.averager.copy_to(case.model, "ema"),
    "summary": lambda case: str(case.averager.summary()),
    "state_dict": lambda case: case.averager.state_dict(),
    "load_state_dict": lambda case: case.averager.load_state_dict(case.state),
    "save": lambda case: polyak.save(case.path("again"), case.averager),
    "load": lambda case: polyak.load(case.path("saved"), case.averager),
    "export": lambda case: checkpoints.export(case.path("e"), case.averager, "ema"),
    "read": lambda case: dict(checkpoints.read(case.path("exported")).weights()),
    "read, torch": lambda case: dict(checkpoints.read(case.folder / "live.pt").weights()),
    "offline.average": lambda case: case.averaged("exported.safetensors"),
    "offline.average, torch": lambda case: case.averaged("live.pt"),
    "offline.compare": Case.compared,
    "recalibrate": Case.recalibrated,
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_work_grows_in_proportion(call: str, tmp_path: Path) -> None:
    CALLS[call](Case(2, fresh(tmp_path, 2)))  # what is imported and cached once does not count
    work = []
    for count in (LAYERS, 2 * LAYERS, 3 * LAYERS):
        case = Case(count, fresh(tmp_path, count))
        work.append(instructions(lambda case=case: CALLS[call](case)))  # type: ignore[misc]
    first, second = work[1] - work[0], work[2] - work[1]
    assert first > 0
    assert second < MOST * first, work


def fresh(folder: Path, count: int) -> Path:
    """An empty folder."""
    made = folder / str(count)
    made.mkdir()
    return made


def instructions(call: Callable[[], object]) -> int:
    """How many bytecode instructions a call runs, in this thread."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.collect()
    gc.disable()  # the finalizers of another test's objects would count
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return count
