"""Instruments: ratios of times from interleaved runs; memory from torch's allocator and the kernel."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler says on stderr that it starts


@dataclass(frozen=True)
class Timing:
    """Medians: seconds of a call, its ratio to the yardstick run right before it, and the yardstick's."""

    seconds: float
    ratio: float
    yardstick: float


def interleaved(
    yardstick: Call, calls: Mapping[str, Call], rounds: int, times: int = 1
) -> dict[str, Timing]:
    """Times the calls in turns, `rounds` times each, and each time right after the yardstick.

    If something slows the machine for a while, it slows both sides of a ratio.
    """
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    units: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            unit = seconds(yardstick, times)
            took = seconds(call, times)
            ratios[name].append(took / unit)
            spent[name].append(took / times)
            units[name].append(unit / times)
    columns = (spent, ratios, units)
    return {name: Timing(*(statistics.median(each[name]) for each in columns)) for name in calls}


def seconds(call: Call, times: int = 1) -> float:
    """Seconds that `times` calls take."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - began


def extra_bytes(call: Call) -> int:
    """The most bytes that a call allocates at one time, by torch's CPU allocator.

    So temporaries inside an operator count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    roots = recorded.profiler.kineto_results.experimental_event_tree()
    events = [event for event in _walk(roots) if event.tag == _EventType.Allocation]
    held = peak = 0
    for event in sorted(events, key=lambda event: int(event.start_time_ns)):
        held += event.extra_fields.alloc_size
        peak = max(peak, held)
    return peak


def _walk(events: list[Any]) -> Iterator[Any]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        yield event


def resident_bytes(call: Call) -> int:
    """How far a call raises the peak of the process's resident memory, by the kernel's figures."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_bytes("VmRSS")
    call()
    return max(0, status_bytes("VmHWM") - before)


def available_bytes() -> int:
    """Memory that can be allocated without swapping."""
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def status_bytes(field: str) -> int:
    """The kernel's figure for this process's memory: `VmRSS` is now, `VmHWM` is the peak."""
    return _kibibytes(Path("/proc/self/status"), field)


def _kibibytes(file: Path, field: str) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
