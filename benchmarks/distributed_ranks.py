"""What each rank does: a contender alone in its process, or all of them in turns against the floor."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing import parent_process
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_contenders import FLOOR, Averaging, Build, contenders, foreach, rows_of_this_rank
from distributed_models import LARGE, SMALL, Run, Size, local
from engine_measure import Call, resident_bytes, seconds, status_bytes

WARM_UP, CHECKED = 3, 5
SHORTEST = 0.01
"""Seconds that a timing should take at least: updates are repeated until then."""
MOST_CALLS = 100
Time = tuple[float, float]
"""Seconds of an update: by the clock, of processor time."""


@dataclass(frozen=True)
class Alone:
    """One contender, alone in the process: what happens, what it costs at first, and its memory."""

    setting: str
    name: str
    growth: int
    """Updates over which resident memory may grow; 0 leaves that out."""

    def work(self) -> dict[str, object]:
        """What this rank finds."""
        return asdict(_alone(self))


@dataclass(frozen=True)
class Race:
    """Contenders in turns, each right after the floor."""

    setting: str
    size: Size
    names: tuple[str, ...]
    changing: bool
    rounds: int

    def work(self) -> dict[str, object]:
        """What this rank finds: name -> in each round, the time of the floor's update and its own."""
        return dict(_race(self))


@dataclass(frozen=True)
class Found:
    """What a rank finds out about a contender; `refused` is what it said if it does not run.

    `first` are seconds of the first two updates: with some, the first only copies. `differences`
    are the largest to the floor, relative to the largest weight, with a decay that stays and with
    one that changes. `refused_later` is what an update says that follows a forward pass without a
    backward pass, and `difference_later` the one after such an update.
    Memory is of the large model but for `grown`, bytes of resident memory over many updates.
    """

    refused: str = ""
    first: float = 0.0
    differences: tuple[float, float] = (0.0, 0.0)
    refused_later: str = ""
    difference_later: float = 0.0
    grown: int | None = None
    held: int = 0
    resident: int = 0
    extra: int = 0


def rank_main(job: Alone | Race, folder: Path, rank: int, world: int, limit: int) -> None:
    """One rank's whole life, as a process; what it finds is written to a file, what it says too."""
    threading.Thread(target=_end_with_starter, daemon=True).start()
    said = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    code = 1
    try:
        wait = timedelta(seconds=limit)
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=wait)
        found = job.work()
        (folder / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may not let go


def _end_with_starter() -> None:
    """Ends this process once the one that started it is gone, however that ended."""
    starter = parent_process()
    if starter is not None:
        starter.join()
        os._exit(1)


def _alone(job: Alone) -> Found:
    build = contenders(job.setting)[job.name]
    run = Run(job.setting, SMALL)
    first = _first(build, run)
    if isinstance(first, str):
        return Found(refused=first)
    differences = _difference(build, run, False), _difference(build, run, True)
    grown = _grown(build(run, True).update, job.growth) if job.growth else None
    later = _after_evaluation(build, run)
    del run
    return Found("", first, differences, *later, grown, *_memory(build, job.setting))


def _first(build: Build, run: Run) -> float | str:
    """Seconds of the first two updates, or what a contender that does not run says."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            update = build(run, False).update
            dist.barrier()
            return seconds(update, 2)
    except (Exception, SystemExit) as error:
        return _report(error, said.getvalue())


def _report(error: BaseException, printed: str = "") -> str:
    """An exception in one line, after what was printed before it."""
    call = " calls exit()" if isinstance(error, SystemExit) else ""
    lines = [*printed.splitlines()[:1], f"{type(error).__name__}{call}: {error}".splitlines()[0]]
    return "; ".join(lines)


def _difference(build: Build, run: Run, changing: bool) -> float:
    """The largest difference to the floor after some updates of changing weights."""
    averaging, floor = build(run, changing), foreach(run.parts, changing)
    for update in range(CHECKED):
        if update > 0:
            run.drift()
        averaging.update()
        floor.update()
    return _largest(averaging, floor)


def _after_evaluation(build: Build, run: Run) -> tuple[str, float]:
    """What an update says after an evaluation, or the difference to the floor then."""
    averaging, floor = build(run, False), foreach(run.parts, False)
    for _ in range(2):
        averaging.update()
        floor.update()
    run.drift()
    run.evaluate()
    try:
        averaging.update()
    except Exception as error:
        return _report(error), 0.0
    floor.update()
    return "", _largest(averaging, floor)


def _largest(averaging: Averaging, floor: Averaging) -> float:
    """The largest difference of an average to the floor's, whole or this rank's rows of it."""
    held = [local(tensor.detach()) for tensor in averaging.held()]
    wanted = list(floor.held())
    if [tensor.shape for tensor in held] != [tensor.shape for tensor in wanted]:
        wanted = rows_of_this_rank(wanted)
    pairs = [(a, b) for a, b in zip(held, wanted, strict=True) if a.numel()]
    largest = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def _grown(update: Call, updates: int) -> int:
    """Bytes by which resident memory grows over so many updates, after a twentieth as many."""
    seconds(update, updates // 20 + WARM_UP)
    before = _resident()
    seconds(update, updates)
    return _resident() - before


def _memory(build: Build, setting: str) -> tuple[int, int, int]:
    """Bytes of the large model's average: of its tensors, resident, and more during an update."""
    run = Run(setting, LARGE)
    before = _resident()
    averaging = build(run, False)
    seconds(averaging.update, WARM_UP)
    resident = _resident() - before
    return _bytes(averaging.held()), resident, resident_bytes(averaging.update)


def _resident() -> int:
    """Resident memory, once what is free has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status_bytes("VmRSS")


def _bytes(held: Iterable[Tensor]) -> int:
    parts = [local(tensor.detach()) for tensor in held]
    return sum(part.numel() * part.element_size() for part in parts)


def _race(job: Race) -> dict[str, list[list[Time]]]:
    run = Run(job.setting, job.size)
    builds = contenders(job.setting)
    updates = {name: builds[name](run, job.changing).update for name in (FLOOR, *job.names)}
    for update in updates.values():
        seconds(update, WARM_UP)
    calls = {name: _calls(update) for name, update in updates.items()}
    found: dict[str, list[list[Time]]] = {name: [] for name in job.names}
    for _ in range(job.rounds):
        run.drift()
        for name in job.names:
            found[name].append([_together(updates[each], calls[each]) for each in (FLOOR, name)])
    return found


def _together(update: Call, calls: int) -> Time:
    """What an update takes this rank, begun by all at once: by the clock, and of processor time."""
    dist.barrier()
    processor = time.thread_time()
    clock = seconds(update, calls)
    return clock / calls, (time.thread_time() - processor) / calls


def _calls(update: Call) -> int:
    """How many updates make a timing, the same on every rank."""
    took = torch.tensor(min(_together(update, 1)[1] for _ in range(WARM_UP)))
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return min(MOST_CALLS, 1 + int(SHORTEST / took.item()))
