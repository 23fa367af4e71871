"""An exception at any line of the way into a block, or out of it, loses nothing.

Ctrl-C, a time-out set from another thread and a lack of memory can arrive anywhere. Here a trace
function raises at the n-th line that runs inside `polyak`, for every n.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import polyak
from models import assert_same, everything, snapshot, wander
from polyak import Averager, Exponential, Window
from polyak._engine import open_swaps
from quick import first_quick

HOME = str(Path(polyak.__file__).parent)


class RaisesAt:
    """A trace function that raises at the n-th line inside the library. `lines` lists them."""

    def __init__(
        self, n: int | None = None, error: type[BaseException] = KeyboardInterrupt
    ) -> None:
        self.n, self.error = n, error
        self.lines: list[str] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if event == "line":
            self.lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            if len(self.lines) - 1 == self.n:
                raise self.error
        return self


def moments(lines: list[str]) -> list[int]:
    """The first two times and the last time that each line runs: more would repeat a loop."""
    times: dict[str, list[int]] = {}
    for n, line in enumerate(lines):
        times.setdefault(line, []).append(n)
    return sorted({n for of_line in times.values() for n in (*of_line[:2], of_line[-1])})


@contextmanager
def tracing(trace: RaisesAt) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        # A trace function can raise between the last line of a `with` and the release of its lock, and
        # before the only line of a `finally` that sets torch's grad mode. No signal and no exception
        # from another thread arrives there, so both are set back here.
        while open_swaps.TURN._is_owned():  # type: ignore[attr-defined]
            open_swaps.TURN.release()
        torch.set_grad_enabled(True)


class Situation:
    """A small model of all kinds and its averagers after some updates, and a graph that was recorded before the block."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = everything()
        self.averagers = [
            Averager(self.model, {"ema": Exponential(0.9), "window": Window(2)}),
            Averager(self.model.body, Exponential(0.5), dtype=torch.float64),
        ]
        for step in range(3):
            wander(self.model, step)
            for averager in self.averagers:
                averager.update()
        wander(self.model, 9)
        self.live = snapshot(self.model)
        self.averages = self.read()
        self.inputs = torch.randn(3, 4, requires_grad=True)
        self.loss = self.model.body(self.inputs).square().sum()

    def read(self) -> list[dict[str, Tensor]]:
        a, b = self.averagers
        return [a.average("ema"), a.average("window"), b.average()]

    def require_intact(self) -> None:
        assert_same(snapshot(self.model), self.live)
        for now, before in zip(self.read(), self.averages, strict=True):
            assert_same(now, before)
        (gradient,) = torch.autograd.grad(self.loss, self.inputs, retain_graph=True)
        weight, bias = self.live["body.weight"], self.live["body.bias"]
        expected = 2 * (self.inputs @ weight.T + bias) @ weight
        torch.testing.assert_close(gradient, expected.detach())
        assert open_swaps.OPEN == []
        self.averagers[0].check_state(self.averagers[0].state_dict())


def alone(situation: Situation, trace: RaisesAt) -> None:
    block = situation.averagers[0].applied("ema")
    with tracing(trace):
        block.__enter__()
        block.__exit__(None, None, None)


def beside(situation: Situation, trace: RaisesAt) -> None:
    block = situation.averagers[0].applied("window")
    with tracing(trace):
        block.__enter__()
        block.__exit__(None, None, None)


def in_the_order_of_entering(situation: Situation, trace: RaisesAt) -> None:
    first, second = (
        averager.applied(name)
        for averager, name in zip(situation.averagers, ("ema", None), strict=True)
    )
    first.__enter__()
    second.__enter__()
    try:
        with tracing(trace):
            first.__exit__(None, None, None)
    finally:
        second.__exit__(None, None, None)


def after_an_exception(situation: Situation, trace: RaisesAt) -> None:
    block = situation.averagers[0].applied("ema")
    with tracing(trace):
        block.__enter__()
        block.__exit__(ValueError, ValueError("of the block"), None)


PROGRAMS = [alone, beside, in_the_order_of_entering, after_an_exception]
ERRORS = [KeyboardInterrupt, MemoryError, RuntimeError]


@pytest.mark.parametrize(
    ("program", "error", "every"),
    first_quick([(alone, KeyboardInterrupt, 3), *product(PROGRAMS, ERRORS, [1])]),
)
def test_an_exception_at_any_line_loses_nothing(
    program: Callable[[Situation, RaisesAt], None], error: type[BaseException], every: int
) -> None:
    """The quick tests try every third line."""
    situation, undisturbed = Situation(), RaisesAt()
    program(situation, RaisesAt())
    program(situation, undisturbed)
    tried = moments(undisturbed.lines)
    assert len(tried) > 200
    for n in tried[::every]:
        trace, raised = RaisesAt(n, error), False
        try:
            program(situation, trace)
        except error:
            raised = True
        try:
            situation.require_intact()
            assert raised or error is not KeyboardInterrupt
        except BaseException as found:
            raise AssertionError(f"raised at {trace.lines[n]}, the {n}-th line") from found
