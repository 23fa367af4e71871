"""Study: train over many seeds with averages beside the live weights, and judge claims about them.

    result = run(recipes()["article"], "study-article")  # a study that ships, or yours
    report(result, "study-article")

It needs the extra `study`. docs/own-study.md writes a study; docs/study.md says what the founding
article's study runs, and docs/study-reports.md how verdicts are decided.
"""

from __future__ import annotations

from pathlib import Path

from polyak.study._claims import Claim, Published
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
from polyak.study._study import (
    Arm,
    Data,
    Ensemble,
    Metric,
    Study,
    mean_probability,
)

__all__ = [
    "Arm", "Claim", "Data", "Ensemble", "Metric", "Plateau", "Published", "Region", "Result",
    "Schedule", "Seed", "Study", "compare", "constant", "cosine", "difference", "gain",
    "inverse_sqrt", "linear", "log_ratio", "mean_probability", "read", "recipes", "report",
    "run", "wsd",
]  # fmt: skip


def report(result: Result, out: Path | str, command: str = "polyak.study.report") -> Path:
    """Write the report of a result into a folder, and return the path of its page, report.html.

    Beside it are verdicts.json, the tables as Markdown and the charts as PNG and SVG. `command` is
    what the page says about how it was made. Files of the same names are replaced.
    """
    from polyak.study._report import write

    return write(result, Path(out), command).page


def compare(*folders: Path | str, out: Path | str) -> Path:
    """Compare the results of two folders or more, each with the first one's, and return the path of the page.

    Two studies are compared within the seeds that both have. The folder `out` gets report.html, the tables as
    Markdown and the charts. The main metric of the first study counts; each arm has the learning rate that is
    best for it in its study. Performance profiles put the arms that all studies have side by side.

    Raises `FileNotFoundError` for a folder without results.jsonl; `ValueError` for fewer than two folders, a
    line that is not a record of a study, and for studies that have nothing in common.
    """
    from polyak.study import _compare, _compare_page

    command = f"polyak.study.compare({', '.join(repr(str(folder)) for folder in folders)}, out={str(out)!r})"
    return _compare_page.write(_compare.compare([*map(Path, folders)]), Path(out), command)
