"""`polyak study`: experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def article(
    seeds: Annotated[int, typer.Option(help="Runs, each with its own seed.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("study-article"),
    jobs: Annotated[int, typer.Option(help="Processes; -1 is one per core.")] = -1,
) -> None:
    """Repeat the founding article's experiment, and judge its claims."""
    from polyak.study import run_article

    run_article(seeds=seeds, out=out, jobs=jobs)
