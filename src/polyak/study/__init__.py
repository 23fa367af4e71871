"""Study: the founding article's experiment over many seeds, with a verdict on each of its claims.

    run_article(seeds=64, out=Path("study-article"))

Needs the extra `study`: `pip install polyak[study]`. What is run, what is in the folder and how the
verdicts are decided: docs/study.md.
"""

from __future__ import annotations

import time
from pathlib import Path

from polyak._checks import is_integer, require
from polyak.study._settings import Settings

__all__ = ["Settings", "run_article"]


def run_article(
    seeds: int = 64,
    out: Path = Path("study-article"),
    jobs: int | None = None,
    settings: Settings | None = None,
) -> Path:
    """Runs the article's experiment for seeds 0 to seeds - 1 and writes the report; its path.

    Seeds that `out` already holds are not run again. `jobs` is the number of processes as joblib
    counts them (-1, the default: one a processor); `settings` are the article's unless given.

    Raises `ValueError` for seeds < 1, and for a folder of records made under other conditions;
    `BlockingIOError` while another study writes to the folder.
    """
    require(is_integer(seeds, 1), "seeds", seeds, "at least 1")
    require(jobs != 0, "jobs", jobs, "a number of processes, or -1 for one per core")
    from rich.console import Console

    from polyak.study import _costs as costs
    from polyak.study import _report as report
    from polyak.study import _runner as runner
    from polyak.study import _terminal as terminal
    from polyak.study._arms import all_arms
    from polyak.study._data import make_data

    settings, console, began = settings or Settings(), Console(), time.monotonic()
    with terminal.Seeds(console) as progress:
        records = runner.run_study(
            seeds, out / "results.jsonl", settings, jobs=jobs, progress=progress
        )
    measured = costs.measure(settings, make_data(settings), all_arms(settings))
    command = f"polyak study article --seeds {seeds} --out {out}"
    made = report.write_report(records, settings, measured, out, command)
    terminal.show(console, made, time.monotonic() - began)
    return made.page
