"""Study: train over many seeds with averages beside the live weights, and judge claims about them.

    report(run(recipes()["digits_mlp"]), "out")          # any study: yours, or one that ships
    run_article(seeds=64, out=Path("study-article"))     # the founding article's experiment

It needs the extra `study`. docs/own-study.md writes a study; docs/study.md tells what the article's
study runs, what its folder holds, and how the verdicts are decided.
"""

from __future__ import annotations

import time
from pathlib import Path

from polyak._checks import is_integer, require
from polyak.study._recipes import recipes
from polyak.study._region import Region
from polyak.study._result import Result, Seed, difference, gain, log_ratio
from polyak.study._run import read, run
from polyak.study._schedules import (
    Plateau,
    Schedule,
    constant,
    cosine,
    inverse_sqrt,
    linear,
    wsd,
)
from polyak.study._settings import Settings
from polyak.study._study import (
    Arm,
    Claim,
    Data,
    Ensemble,
    Metric,
    Published,
    Study,
    mean_probability,
)

__all__ = [
    "Arm",
    "Claim",
    "Data",
    "Ensemble",
    "Metric",
    "Plateau",
    "Published",
    "Region",
    "Result",
    "Schedule",
    "Seed",
    "Settings",
    "Study",
    "compare",
    "constant",
    "cosine",
    "difference",
    "gain",
    "inverse_sqrt",
    "linear",
    "log_ratio",
    "mean_probability",
    "read",
    "recipes",
    "report",
    "run",
    "run_article",
    "wsd",
]


def report(result: Result, out: Path | str, command: str = "polyak.study.report") -> Path:
    """Write the report of a result into a folder, and return the path of its page, report.html.

    Beside it are verdicts.json, the tables as Markdown and the charts as PNG and SVG. `command` is
    what the page says about how it was made. Files of the same names are replaced.
    """
    from polyak.study._report import write

    return write(result, Path(out), command).page


def compare(first: Path | str, second: Path | str, out: Path | str) -> Path:
    """Compare the results of two folders within the seeds that both have, and return the path of the page.

    The folder `out` gets report.html, the table as Markdown and the charts. The main metric of the first
    study counts; each arm has the learning rate that is best for it in its study.

    Raises `FileNotFoundError` for a folder without results.jsonl; `ValueError` for a line that is not a
    record of a study, and for studies that have no seed, metric, or arm under a schedule in common.
    """
    from polyak.study import _compare

    command = f"polyak.study.compare({str(first)!r}, {str(second)!r})"
    return _compare.write(_compare.compare(Path(first), Path(second)), Path(out), command)


def run_article(
    seeds: int = 64,
    out: Path = Path("study-article"),
    jobs: int | None = None,
    settings: Settings | None = None,
) -> Path:
    """Run the article's experiment for seeds 0 to seeds - 1, write the report and return its path.

    Seeds whose records are in `out` already are not run again. `jobs` is the number of processes as
    joblib counts them (default -1: one per processor); `settings` are the article's by default.

    Raises `ValueError` for seeds < 1 and jobs = 0, and for a line of `out / "results.jsonl"` that is
    not a record of these settings, naming the line; `BlockingIOError` while another study writes
    there.
    """
    require(is_integer(seeds, 1), "seeds", seeds, "at least 1")
    require(jobs != 0, "jobs", jobs, "a number of processes, or -1 for one per core")
    from rich.console import Console

    from polyak.study import _article_report
    from polyak.study import _costs as costs
    from polyak.study import _runner as runner
    from polyak.study import _terminal as terminal
    from polyak.study._arms import all_arms
    from polyak.study._data import make_data

    settings, began = settings or Settings(), time.monotonic()
    with terminal.Seeds(Console(stderr=True)) as progress:
        records = runner.run_study(
            seeds, out / "results.jsonl", settings, jobs=jobs, progress=progress
        )
    measured = costs.measure(settings, make_data(settings), all_arms(settings))
    command = f"polyak study article --seeds {seeds} --out {out}"
    made = _article_report.write_report(records, settings, measured, out, command)
    terminal.show(Console(), made, time.monotonic() - began)
    return made.page
