"""How long 64 seeds of the article's experiment take: the plain script against the study.

Run `python benchmarks/study_speed.py`; it writes `benchmarks/results/study_speed.md`.
Plain runs are timed before and after the study, in turns with the study in one process. They stop
where the study's runs stop, so 64 of them take (seconds an epoch) x (epochs of 64 seeds). Processor
time is given beside the clock's: it stays right on a machine that others use as well.
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
from polyak.study._data import make_data
from polyak.study._runner import run_study
from polyak.study._settings import Settings
from polyak.study._trainer import run_seed

SEEDS = 64
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


def fast(seed: int) -> int:
    """One seed of the study, with every arm and the epochs after the stop; its epochs to the stop."""
    settings = Settings()
    return int(run_seed(seed, settings, make_data(settings))["stop_epoch"])


def one_process() -> dict[str, list[Spent]]:
    """What an epoch takes, plain and fast in turns."""
    threads = torch.get_num_threads()
    found: dict[str, list[Spent]] = {"default": [], "one": [], "fast": []}
    for seed in PLAIN_SEEDS:
        found["default"].append(spent(partial(plain, seed, threads)))
        found["one"].append(spent(partial(plain, seed, 1)))
        found["fast"].append(spent(partial(fast, seed)))
    return found


def processes(jobs: int) -> tuple[Spent, int]:
    """What the whole study takes, its processes' start and end included, and its epochs."""
    began, before = time.perf_counter(), time.process_time() + children()
    with tempfile.TemporaryDirectory() as folder:
        records = run_study(SEEDS, Path(folder) / "results.jsonl", Settings(), jobs=jobs)
    clock = time.perf_counter() - began
    get_reusable_executor().shutdown(wait=True)  # a child's time is known once it has ended
    used = Spent(clock, time.process_time() + children() - before)
    return used, sum(record["stop_epoch"] for record in records)


def children() -> float:
    """Processor seconds of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def median(found: list[Spent]) -> Spent:
    """The median of each of the two times."""
    return Spent(*(statistics.median(times) for times in zip(*found, strict=True)))


def report(found: dict[str, list[Spent]], study: Spent, epochs: int, jobs: int) -> str:
    """The result as Markdown."""
    default, single, alone = (median(found[n]).times(epochs) for n in ("default", "one", "fast"))
    threads = torch.get_num_threads()
    rows = (
        (f"{SEEDS} plain runs, torch's default threads ({threads})", default),
        (f"{SEEDS} plain runs, one thread", single),
        (f"study, {SEEDS} seeds in one process", alone),
        (f"study, {SEEDS} seeds on {jobs} processes, start-up included (measured whole)", study),
        (f"the same, were its {jobs} processors free", Spent(study.processor / jobs, study.processor)),
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
        f"{SEEDS}; median seconds an epoch times {epochs} epochs. The study tracks 16 arms and goes "
        f"on for {Settings().epochs_after_stop} epochs after each stop; the plain script does neither. "
            "With more threads the plain script also waits for processors that others use.",
        "", f"{platform.machine()}, {joblib.cpu_count()} processors, torch {torch.__version__}, "
        f"Python {platform.python_version()}.", "",
    ])  # fmt: skip


def main() -> None:
    """Measures, prints and writes the result."""
    jobs = joblib.cpu_count()
    fast(0)  # imports that torch makes at its first optimizer
    found = one_process()
    study, epochs = processes(jobs)
    for name, more in one_process().items():
        found[name] += more
    text = report(found, study, epochs, jobs)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
