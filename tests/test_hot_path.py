"""The hot path: a plain `update()` passes through few functions, whatever the averager can do besides.

Guards, couriers, shards, masks, roundings and blocks are looked for where something changes, and not
at every update.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
from polyak import Averager, Exponential

SOURCES = str(Path(polyak.__file__).parent)
MOST_FILES, MOST_FUNCTIONS = 6, 17
MOST_WITH_COPIES = 8, 24


def passed_through(call: Callable[[], object]) -> set[tuple[str, str]]:
    """(file, function) of the library's functions that a call runs, in this thread."""
    found = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(SOURCES):
            found.add((code.co_filename, code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def test_a_plain_update_is_short() -> None:
    assert_short(nn.BatchNorm1d(3, track_running_stats=False), MOST_FILES, MOST_FUNCTIONS)


def test_an_update_that_copies_buffers_too_is_short() -> None:
    assert_short(nn.BatchNorm1d(3), *MOST_WITH_COPIES)


def assert_short(layer: nn.Module, files: int, functions: int) -> None:
    averager = Averager(nn.Sequential(nn.Linear(3, 3), layer), Exponential(0.999))
    for _ in range(2):  # the first allocates, the second looks for infinities
        averager.update()
    passed = passed_through(averager.update)
    assert len(passed) > 5
    assert len({file for file, _ in passed}) <= files, sorted(passed)
    assert len(passed) <= functions, sorted(passed)


def test_a_call_between_updates_is_shorter() -> None:
    averager = Averager(nn.Linear(3, 3), Exponential(0.999), every=100)
    for _ in range(102):
        averager.update()
    passed = passed_through(averager.update)
    assert 2 < len(passed) <= MOST_FUNCTIONS // 2, sorted(passed)


class Operations(TorchDispatchMode):
    """The names of all tensor operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


WANTED = {
    torch.float32: ["aten::_foreach_lerp_.Scalar"],
    torch.bfloat16: ["aten::_foreach_copy_", "aten::_foreach_lerp_.Scalar"],
}


@pytest.mark.parametrize("dtype", WANTED)
@pytest.mark.parametrize("count", [3, 300])
def test_an_update_takes_as_many_operations_for_any_number_of_tensors(
    dtype: torch.dtype, count: int
) -> None:
    averager = Averager(
        nn.ParameterList(torch.ones(4, dtype=dtype) for _ in range(count)), "uniform()"
    )
    for _ in range(3):
        averager.update()
    with Operations() as ran:
        averager.update()
    assert ran.names == WANTED[dtype]


@pytest.mark.parametrize("dtype", WANTED)
@pytest.mark.parametrize("elements", [4, 300_000])
def test_autograd_sees_an_update_of_what_a_graph_has_saved(
    dtype: torch.dtype, elements: int
) -> None:
    """Slots stay ordinary tensors, whose versions count, in one piece and in several."""
    live = {"w": torch.ones(elements, dtype=dtype)}
    averager = Averager(live, "exponential(0.5)")
    averager.update()
    slot = averager.state_dict()["averages"]["average"]["slots"]["average"]["w"]
    x = torch.ones(elements, requires_grad=True)
    product = (x * slot).sum()
    before = slot._version
    averager.update()
    assert slot._version > before and not slot.is_inference()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("elements", [4, 300_000])
def test_an_update_leaves_the_graphs_of_the_weights_alone(elements: int) -> None:
    weight = nn.Parameter(torch.ones(elements, dtype=torch.bfloat16))
    averager = Averager({"w": weight}, "exponential(0.5)")
    averager.update()
    loss = weight.square().sum()
    averager.update()
    loss.backward()
    assert weight.grad is not None and torch.equal(weight.grad, 2 * torch.ones_like(weight))
