"""Random programs against polyak: `python benchmarks/stress.py --minutes 10`.

Every program draws a small model, averagers with random rules and options, and 5 to 30 operations:
training, updates, nested and interleaved blocks, exceptions, signals, threads, saving and loading,
moved, replaced, tied and resized tensors. After every operation

- the live weights are those of a twin that no averager has seen, bit for bit;
- every average is profile @ trajectory, and every copied tensor that of the last update;
- what polyak has refused it may refuse there, and nothing has changed by it; what it must refuse it did;
- no call hangs.

A failing program is made smaller and printed as the command that runs it again.

    python benchmarks/stress.py --seed 17            # one program, and if it fails its smallest form
    python benchmarks/stress.py --seed 17 --ops 3,5  # those of its operations alone
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import stress_rules
from stress_models import KINDS
from stress_operations import OPERATIONS
from stress_programs import Outcome, Program, Totals, run, shrink

LIMIT = 600.0
"""Seconds that a program may take, on a machine that is busy with twenty others too."""

BATCH = 20
Signature = tuple[str, str]


@dataclass
class Failure:
    """A fault: its signature, the program that shows it, what was seen, and what the program does."""

    signature: Signature
    program: Program
    seen: str
    model: str
    story: tuple[str, ...] = ()
    smallest: bool = False


def failure_of(program: Program, outcome: Outcome) -> Failure:
    return Failure(outcome.signature, program, str(outcome.fault), outcome.model, outcome.story)


def guarded(program: Program, limit: float = LIMIT) -> Outcome:
    """Runs a program; a process that hangs says where, and ends."""
    faulthandler.dump_traceback_later(limit, exit=True)
    try:
        return run(program)
    finally:
        faulthandler.cancel_dump_traceback_later()


def work(pipe: Connection, seeds: Iterator[int], base: Program, plain: bool) -> None:
    """A worker: sends the seed that it begins, and after some programs what they came to."""
    torch.set_num_threads(1)
    stress_rules.PLAIN = plain
    known: set[Signature] = set()
    totals = Totals()
    for seed in seeds:
        pipe.send(("begin", seed))
        program = Program(seed, None, base.kinds, base.without)
        outcome = guarded(program)
        totals.add(program, outcome)
        if outcome.fault is not None:
            pipe.send(("fault", f"{program}\n{''.join(traceback.format_exception(outcome.fault))}"))
            smallest = failure_of(program, outcome)
            if outcome.signature not in known:
                known.add(outcome.signature)
                smallest = failure_of(*shrink(program, outcome, guarded))
                smallest.signature, smallest.smallest = outcome.signature, True
        if outcome.fault is not None or totals.programs >= BATCH:
            pipe.send(("totals", totals))
            totals = Totals()
        if outcome.fault is not None:
            pipe.send(("failure", smallest))


@dataclass
class Worker:
    """A process that runs every so-manieth seed."""

    process: Any
    pipe: Connection
    seed: int


class Run:
    """Many programs in several processes, until the time is over."""

    def __init__(self, base: Program, processes: int, plain: bool) -> None:
        self.totals = Totals()
        self.failures: dict[Signature, list[Failure]] = {}
        self._base, self._processes, self._plain = base, processes, plain
        self._workers = [self._start(base.seed + i) for i in range(processes)]

    def _start(self, seed: int) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        seeds = _Seeds(seed, self._processes)
        process = context.Process(
            target=work, args=(theirs, seeds, self._base, self._plain), daemon=True
        )
        process.start()
        theirs.close()
        return Worker(process, ours, seed)

    def listen(self, seconds: float) -> None:
        """Takes what workers have to say; one that has ended in the midst of a program is replaced."""
        pipes = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(pipes), timeout=seconds):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                what, said = worker.pipe.recv()
            except EOFError:
                self._replace(worker)
                continue
            if what == "begin":
                worker.seed = said
            elif what == "totals":
                self.totals.join(said)
            elif what == "fault":
                print(said, flush=True)  # at once: it may not come again, and the run may be ended
            else:
                self.failures.setdefault(said.signature, []).append(said)

    def _replace(self, worker: Worker) -> None:
        worker.process.join()
        program = Program(worker.seed, None, self._base.kinds, self._base.without)
        seen = (
            f"the process ended with {worker.process.exitcode}: it hung for {LIMIT:g} s, or crashed"
        )
        print(f"{program}\n{seen}", flush=True)
        self.failures.setdefault(("hang", ""), []).append(Failure(("hang", ""), program, seen, ""))
        self._workers.remove(worker)
        self._workers.append(self._start(worker.seed + self._processes))

    def stop(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
            worker.process.join()


@dataclass
class _Seeds:
    """Every so-manieth seed, without an end."""

    first: int
    step: int

    def __iter__(self) -> Iterator[int]:
        seed = self.first
        while True:
            yield seed
            seed += self.step


def many(base: Program, options: argparse.Namespace) -> int:
    """Runs programs until the time is over or there were enough; the number of different faults."""
    console, began = Console(), time.monotonic()
    seconds = 60 * options.minutes
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    running = Run(base, options.processes, options.plain_numbers)

    def over() -> bool:
        done = 0 < options.programs <= running.totals.programs
        found = 0 < options.faults <= len(running.failures)
        return bool(done or found or time.monotonic() - began > seconds)

    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=seconds)
            while not over():
                running.listen(1.0)
                faults = sum(map(len, running.failures.values()))
                said = f"{running.totals.programs} programs, {faults} faults"
                progress.update(task, completed=time.monotonic() - began, description=said)
    finally:
        running.stop()
    for failure in running.failures.get(("hang", ""), [])[:1]:
        failure.program = shrink_hang(failure.program)
    report(console, running, base, time.monotonic() - began)
    return len(running.failures)


def report(console: Console, running: Run, base: Program, seconds: float) -> None:
    totals = running.totals
    for signature, same in sorted(running.failures.items(), key=lambda each: -len(each[1])):
        first = min(same, key=lambda failure: len(failure.story) or 99)
        console.print(f"[red]{len(same)} times: {escape(signature[0])}, at {signature[1]}[/]")
        console.print(
            escape(f"  {first.seen}\n  model: {first.model}\n  {first.program}"), soft_wrap=True
        )
        for line in first.story:
            console.print(escape(f"    {line}"), soft_wrap=True)
    done = ", ".join(f"{name} {n}" for name, n in totals.done.most_common())
    models = ", ".join(f"{name} {n}" for name, n in totals.models.most_common())
    console.print(
        f"{totals.programs} programs from seed {base.seed}, {totals.done.total()} operations "
        f"({totals.refused} refused with reason) in {seconds:.0f} s; "
        f"{len(running.failures)} different faults\noperations: {done}\nmodels: {models}",
        soft_wrap=True,
    )


def single(program: Program, limit: float) -> int:
    """Runs one program; a failing one is made smaller unless its operations are given."""
    console = Console()
    outcome = guarded(program, limit)
    if outcome.fault is not None and program.only is None:
        program, outcome = shrink(program, outcome, guarded)
    console.print(escape(f"{program}\nmodel: {outcome.model}"), soft_wrap=True)
    for line in outcome.story:
        console.print(escape(f"  {line}"), soft_wrap=True)
    console.print(escape(str(outcome.fault or "no fault")), soft_wrap=True)
    return int(outcome.fault is not None)


def shrink_hang(program: Program) -> Program:
    """A smaller program that still hangs or crashes, each tried in a process of its own."""

    def hangs(candidate: Program) -> bool:
        command = [sys.executable, __file__, *shlex.split(str(candidate))[2:], "--limit", "60"]
        done = subprocess.run(command, capture_output=True)
        return done.returncode not in (0, 1)

    numbers = [number for number, _, _ in program.operations()]
    for number in list(numbers):
        rest = tuple(n for n in numbers if n != number)
        if hangs(Program(program.seed, rest, program.kinds)):
            numbers = list(rest)
    return Program(program.seed, tuple(numbers), program.kinds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--programs", type=int, default=0, help="stop after so many")
    parser.add_argument("--faults", type=int, default=0, help="stop after so many different faults")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--first", type=int, default=None, help="the first seed; by default the time"
    )
    parser.add_argument("--seed", type=int, help="run this one program")
    parser.add_argument("--ops", help="the numbers of its operations to run, such as 3,5; or none")
    parser.add_argument("--kind", action="append", default=[], choices=[k.name for k in KINDS])
    parser.add_argument("--without", action="append", default=[], choices=list(OPERATIONS))
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one program")
    parser.add_argument("--plain-numbers", action="store_true", help="numbers are Python's own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stress_rules.PLAIN = options.plain_numbers
    kinds, without = tuple(options.kind), tuple(options.without)
    if options.seed is not None:
        only = None
        if options.ops is not None:
            only = tuple(int(n) for n in options.ops.split(",") if n.isdigit())
        return single(Program(options.seed, only, kinds, without), options.limit)
    first = int(time.time()) % 10**6 * 1000 if options.first is None else options.first
    base = Program(first, None, kinds, without)
    return int(many(base, options) > 0)


if __name__ == "__main__":
    sys.exit(main())
