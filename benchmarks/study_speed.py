"""What the article's 64 seeds take: plain scripts one after another against one command of the study.

Run `python benchmarks/study_speed.py`; it writes `benchmarks/results/study_speed.md`.
Half of the plain scripts run before the study and half after it, since other programs may use the machine too.
Processor time counts all processes of a command, so it stays right on such a machine.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

SCRIPTS, JOBS = 4, 2
HERE = Path(__file__).parent
RESULT = HERE / "results" / "study_speed.md"


class Spent(NamedTuple):
    """Seconds by the clock and of processor time, and the epochs that were trained."""

    clock: float
    processor: float
    epochs: int

    def __add__(self, other: object) -> Spent:
        assert isinstance(other, Spent)
        processor = self.processor + other.processor
        return Spent(self.clock + other.clock, processor, self.epochs + other.epochs)

    def for_epochs(self, epochs: int) -> Spent:
        """The same for another number of epochs, in proportion."""
        share = epochs / self.epochs
        return Spent(self.clock * share, self.processor * share, epochs)


def spent(*command: str) -> tuple[Spent, str]:
    """What a command takes on one thread a process, and what it prints."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True, env=alone
    )
    clock, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(clock, processor, 0), done.stdout


def plain(seed: int) -> Spent:
    """One plain script."""
    took, said = spent(str(HERE / "plain_article.py"), str(seed))
    return took._replace(epochs=int(re.findall(r"stopped at epoch (\d+)", said)[0]))


def study(folder: Path) -> tuple[Spent, list[dict[str, float]]]:
    """The command of the study, and the seconds of a step in each of its runs."""
    took, _ = spent(
        *("-m", "polyak", "study", "run", "article", "--jobs", str(JOBS), "--out", str(folder))
    )
    runs = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return took._replace(epochs=sum(len(run["steps"]) for run in runs)), [
        r["seconds"] for r in runs
    ]


def text(scripts: Spent, whole: Spent, seconds: list[dict[str, float]]) -> str:
    """The result as Markdown."""
    all_scripts = scripts.for_epochs(whole.epochs)
    times = all_scripts.processor / whole.processor
    share = statistics.median(run["average"] / run["train"] for run in seconds)
    return "\n".join([
        "# Speed of the study", "",
        "`python benchmarks/study_speed.py`", "",
        f"| {len(seconds)} seeds of the article, {whole.epochs} epochs | processor s | s by the clock |",
        "|---|---|---|",
        f"| plain scripts, one after another: {2 * SCRIPTS} were run, scaled to these epochs | {all_scripts.processor:.0f} | {all_scripts.clock:.0f} |",
        f"| `polyak study run article`, {JOBS} processes | {whole.processor:.0f} | {whole.clock:.0f} |", "",
        f"The study takes {times:.1f} times less processor time, and so {JOBS * times:.1f} times less time on {JOBS} processors of which each "
        f"script uses one; by this clock it was {all_scripts.clock / whole.clock:.1f} times. The update of its averages takes {100 * share:.0f} % of "
        "the time of a training step. A plain script has one average. The study has 16, judges all of them each epoch, trains on for 25 "
        "epochs after each stop, and writes the report. All processes have one thread; starting Python is part of both.",
        "", f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}.", "",
    ])  # fmt: skip


def main() -> None:
    """Measures, prints and writes the result."""
    scripts = sum((plain(seed) for seed in range(SCRIPTS)), Spent(0, 0, 0))
    with tempfile.TemporaryDirectory() as folder:
        whole, seconds = study(Path(folder))
    scripts += sum((plain(seed) for seed in range(SCRIPTS, 2 * SCRIPTS)), Spent(0, 0, 0))
    said = text(scripts, whole, seconds)
    RESULT.write_text(said, encoding="utf-8")
    sys.stdout.write(said)


if __name__ == "__main__":
    main()
