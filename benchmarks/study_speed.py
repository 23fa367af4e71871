"""How long 64 seeds of the article's experiment take: the plain script against the study.

Run `python benchmarks/study_speed.py`; it writes `benchmarks/results/study_speed.md`.
Plain runs are timed before and after the study, in turns with the study that trains one seed after
another. They stop where the study's runs stop, so 64 of them take (seconds an epoch) x (epochs of 64
seeds). Processor time is given beside the clock's: it stays right on a machine that others use as well.
"""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import joblib
import torch
from joblib.externals.loky import get_reusable_executor

import plain_article
from polyak.study import Result, recipes, report, run
from polyak.study._loop import Run, train

SEEDS = 64
ARTICLE = recipes()["article"]
PLAIN_SEEDS = (0, 1, 2)
RESULT = Path(__file__).parent / "results" / "study_speed.md"


class Spent(NamedTuple):
    """Seconds by the clock and of processor time."""

    clock: float
    processor: float

    def times(self, factor: float) -> Spent:
        """What this many times as much takes."""
        return Spent(self.clock * factor, self.processor * factor)


def spent(action: Callable[[], int]) -> Spent:
    """What each epoch of an action takes that returns its number of epochs."""
    clock, processor = time.perf_counter(), time.process_time()
    epochs = action()
    used = Spent(time.perf_counter() - clock, time.process_time() - processor)
    return used.times(1 / epochs)


def plain(seed: int, threads: int) -> int:
    """One run of the plain script; its epochs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    outcome = plain_article.train(seed)
    torch.set_num_threads(before)
    return len(outcome.history.train_loss)


def alone(seed: int) -> int:
    """One seed of the study, with every arm and the epochs after the stop; its epochs to the stop."""
    return len(train(ARTICLE, Run(seed, "plateau", 1e-3))["steps"])


def one_process() -> dict[str, list[Spent]]:
    """What an epoch takes, plain and in the study in turns."""
    threads = torch.get_num_threads()
    found: dict[str, list[Spent]] = {"default": [], "one": [], "alone": []}
    for seed in PLAIN_SEEDS:
        found["default"].append(spent(partial(plain, seed, threads)))
        found["one"].append(spent(partial(plain, seed, 1)))
        found["alone"].append(spent(partial(alone, seed)))
    return found


def whole(folder: Path) -> tuple[Spent, Result]:
    """What the whole study takes, its processes' start and end included, and its result."""
    began, before = time.perf_counter(), time.process_time() + children()
    result = run(ARTICLE, folder, seeds=SEEDS)
    clock = time.perf_counter() - began
    get_reusable_executor().shutdown(wait=True)  # a child's time is known once it has ended
    return Spent(clock, time.process_time() + children() - before), result


def written(result: Result, folder: Path) -> int:
    """The report, counted as one epoch."""
    report(result, folder)
    return 1


def children() -> float:
    """Processor seconds of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def median(found: list[Spent]) -> Spent:
    """The median of each of the two times."""
    return Spent(*(statistics.median(times) for times in zip(*found, strict=True)))


def text(found: dict[str, list[Spent]], study: Spent, page: Spent, epochs: int) -> str:
    """The result as Markdown."""
    default, single, one_by_one = (
        median(found[n]).times(epochs) for n in ("default", "one", "alone")
    )
    threads, jobs = torch.get_num_threads(), joblib.cpu_count()
    rows = (
        (f"{SEEDS} plain runs, torch's default threads ({threads})", default),
        (f"{SEEDS} plain runs, one thread", single),
        (f"study, {SEEDS} seeds one after another in one process", one_by_one),
        (f"study, {SEEDS} seeds, {ARTICLE.stacked} stacked, {jobs} processes, start-up included (measured whole)", study),
        (f"the same, were its {jobs} processors free", Spent(study.processor / jobs, study.processor)),
        ("its report", page),
    )  # fmt: skip
    lines = [
        f"| {name} | {took.clock:.0f} | {took.processor:.0f} | {single.clock / took.clock:.1f} |"
        for name, took in rows
    ]
    return "\n".join([
        "# Speed of the study", "",
        "`python benchmarks/study_speed.py`", "",
        "| what | seconds | processor seconds | times faster than plain on one thread |",
        "|---|---|---|---|", *lines, "",
        f"{SEEDS} seeds run {epochs} epochs to their stops. The plain script and the study in one "
        f"process were timed in turns, seeds {PLAIN_SEEDS} before and again after the study of "
        f"{SEEDS}; median seconds an epoch times {epochs} epochs. The study tracks {len(ARTICLE.arms)} arms and goes "
        "on for 25 epochs after each stop; the plain script does neither. "
            "With more threads the plain script also waits for processors that others use.",
        "", f"{platform.machine()}, {joblib.cpu_count()} processors, torch {torch.__version__}, "
        f"Python {platform.python_version()}.", "",
    ])  # fmt: skip


def main() -> None:
    """Measures, prints and writes the result."""
    alone(0)  # imports that torch makes at its first optimizer
    found = one_process()
    with tempfile.TemporaryDirectory() as folder:
        study, result = whole(Path(folder))
        page = spent(partial(written, result, Path(folder)))
    for name, more in one_process().items():
        found[name] += more
    said = text(found, study, page, sum(len(record["steps"]) for record in result.records))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(said, encoding="utf-8")
    sys.stdout.write(said)


if __name__ == "__main__":
    main()
