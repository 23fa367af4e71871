"""What an epoch of a seed of the article's experiment takes: the plain script against the study.

Run `python benchmarks/study_speed.py`; it writes `benchmarks/results/study_speed.md`.
The three are timed in turns, each for 20 epochs on one thread, and the median of the rounds counts. Processor
time is given beside the clock's: it stays right on a machine that others use as well.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

import plain_article
from polyak.study import Plateau, recipes
from polyak.study._loop import Run, train
from polyak.study._stacked import train_stacked

EPOCHS, ROUNDS = 20, 3
ARTICLE = recipes()["article"]
PLATEAU = replace(cast(Plateau, ARTICLE.schedules["plateau"]), after=0)  # no epochs after the last
SHORT = replace(ARTICLE, steps=50 * EPOCHS, evaluations=EPOCHS, schedules={"plateau": PLATEAU})
RUNS = [Run(seed, "plateau", 1e-3) for seed in range(ARTICLE.stacked)]
RESULT = Path(__file__).parent / "results" / "study_speed.md"

WAYS: dict[str, tuple[Callable[[], object], int]] = {
    "plain script": (lambda: plain_article.train(0, max_epochs=EPOCHS), 1),
    "study, one seed after another": (lambda: train(SHORT, RUNS[0]), 1),
    f"study, {len(RUNS)} seeds stacked": (lambda: train_stacked(SHORT, RUNS), len(RUNS)),
}
"""way -> a function that trains with it, and the seeds that it trains"""


def spent(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - clock, time.process_time() - processor


def measured() -> dict[str, tuple[float, float]]:
    """way -> milliseconds an epoch of a seed, by the clock and of processor time."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, (action, seeds) in WAYS.items():
            clock, processor = (1e3 * s / EPOCHS / seeds for s in spent(action))
            times[name].append((clock, processor))
    middle = statistics.median
    return {n: (middle(c for c, _ in t), middle(p for _, p in t)) for n, t in times.items()}


def text(found: dict[str, tuple[float, float]]) -> str:
    """The result as Markdown."""
    _, plain = found["plain script"]
    rows = [
        f"| {name} | {clock:.1f} | {processor:.1f} | {plain / processor:.1f} |"
        for name, (clock, processor) in found.items()
    ]
    return "\n".join([
        "# Speed of the study", "",
        "`python benchmarks/study_speed.py`", "",
        "| what | ms an epoch of a seed | processor ms | times faster than plain, by processor time |",
        "|---|---|---|---|", *rows, "",
        f"One thread, {EPOCHS} epochs, median of {ROUNDS} rounds in turns. The study tracks {len(ARTICLE.arms)} arms and "
        "judges all of them each epoch; the plain script has one average. Stacks run in a process of their own each, "
        "so two processors halve the time of 64 seeds.",
        "", f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}.", "",
    ])  # fmt: skip


def main() -> None:
    """Measures, prints and writes the result."""
    torch.set_num_threads(1)
    train(replace(SHORT, steps=50, evaluations=1), RUNS[0])  # imports of torch's first optimizer
    said = text(measured())
    RESULT.write_text(said, encoding="utf-8")
    sys.stdout.write(said)


if __name__ == "__main__":
    main()
