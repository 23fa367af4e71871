"""Many tensors: the work of every call grows in proportion to their number.

A mixture of experts has tens of thousands of small tensors. Work is counted in Python instructions,
not in seconds, so that a busy machine changes nothing.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from many_tensors import CALLS, Case

TENSORS = 20
MOST = 1.05
"""Each further batch of tensors costs as much as the one before; quadratic work gives up to 1.67."""


@pytest.mark.parametrize("call", CALLS)
def test_work_grows_in_proportion(call: str, tmp_path: Path) -> None:
    CALLS[call](Case(10, tmp_path / "first"))  # what is imported and cached once does not count
    work = []
    for count in (TENSORS, 2 * TENSORS, 3 * TENSORS):
        case = Case(count, tmp_path / str(count))
        work.append(instructions(lambda case=case: CALLS[call](case)))  # type: ignore[misc]
    first, second = work[1] - work[0], work[2] - work[1]
    assert first > 0
    assert second < MOST * first, work


def instructions(call: Callable[[], object]) -> int:
    """How many bytecode instructions a call runs, in this thread."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.disable()  # else the finalizers of objects of other tests would count
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return count
