"""`polyak study`: experiments."""

from __future__ import annotations

import shlex
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from polyak.cli._commands import YOURS, fail
from polyak.cli._output import print_table, say

SOURCES = "init,order,dropout,split"
Jobs = Annotated[int, typer.Option(help="Processes; -1 is one per core.")]


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="NAME_OR_FILE", help="A name of `polyak study list`, or a file with a `study`."
        ),
    ],
    seeds: Annotated[
        int | None, typer.Option(help="Number of seeds.", show_default="the study's")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run the study's small form.")] = False,
    jobs: Jobs = -1,
    vary: Annotated[str, typer.Option(help="What differs between seeds.")] = SOURCES,
    stacked: Annotated[
        int | None,
        typer.Option(
            help="Runs that a process trains at once; 0: the plain loop.",
            show_default="the study's",
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(help="loky: this machine; ray: the cluster at RAY_ADDRESS, or a local one."),
    ] = "loky",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the study.", show_default="study-NAME[-quick]"),
    ] = None,
) -> None:
    """Run a study over seeds, schedules and learning rates.

    An interrupted study continues where it was. The folder's report.html opens offline.
    """
    from rich.console import Console

    from polyak.study import run as run_study
    from polyak.study._recipes import opened_recipe
    from polyak.study._terminal import Seeds

    # The end of the command restores it. A warning about a study has no line of code to show.
    warnings.showwarning = lambda message, *_, **__: say(f"polyak: warning: {message}", err=True)
    with opened_recipe(recipe) as study:
        study = study.quickly() if quick else study
        study = study if stacked is None else replace(study, stacked=stacked)
        folder = out or Path(f"study-{study.name}{'-quick' if quick else ''}")
        sources = tuple(word.strip() for word in vary.split(",") if word.strip())
        with Seeds(Console(stderr=True), "runs") as progress:
            result = run_study(
                study,
                folder,
                seeds=seeds,
                jobs=jobs,
                vary=sources,
                backend=backend,
                progress=progress,
            )
        _report(result, folder, _command(recipe, seeds, quick, vary, stacked, out))
        for failure in result.failures:
            where = f"seed {failure['seed']}, {failure['schedule']}, {failure['learning_rate']:g}"
            say(f"failed: {where}: {failure['failed']}", err=True)
        if result.failures:
            fail(f"{len(result.failures)} runs failed; run again to try them again", YOURS)


def article(
    seeds: Annotated[int, typer.Option(help="Runs, each with its own seed.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("study-article"),
    jobs: Jobs = -1,
) -> None:
    """Repeat the founding article's experiment, and judge its claims.

    The same as `polyak study run article`.
    """
    run("article", seeds=seeds, jobs=jobs, out=out)


def _report(result: Any, folder: Path, command: str) -> None:
    """Writes the report, and prints its summary, its verdicts and its path."""
    from polyak.study._report import write

    written = write(result, folder, command)
    for sentence in written.summary:
        say(sentence)
    for each in written.judged:
        said = "; ".join(f"{part.figure}, wanted {part.wanted}" for part in each.parts)
        say(f"{each.verdict}: {each.sentence} {said}")
    say(f"Report: {written.page}")


def _command(
    recipe: str, seeds: int | None, quick: bool, vary: str, stacked: int | None, out: Path | None
) -> str:
    """The command of a run, without its processes, which change nothing."""
    words = ["polyak", "study", "run", recipe]
    words += ["--seeds", str(seeds)] if seeds is not None else []
    words += ["--quick"] if quick else []
    words += ["--vary", vary] if vary != SOURCES else []
    words += ["--stacked", str(stacked)] if stacked is not None else []
    words += ["--out", str(out)] if out else []
    return shlex.join(words)


def listed() -> None:
    """List polyak's studies."""
    from polyak.study import recipes

    rows = [
        (name, study.title, f"{study.steps} steps, {len(study.arms)} arms, {study.seeds} seeds")
        for name, study in recipes().items()
    ]
    print_table(("name", "title", "size"), rows, left=3)


def compare(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of two or more studies.", metavar="FOLDERS...")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("study-compared"),
) -> None:
    """Compare studies arm by arm.

    Each study is compared with the first, in the arms that all have, paired by seed. The page lists
    the studies' other differences.
    """
    from polyak.study import _compare, _compare_page

    compared = _compare.compare(folders)
    for each in compared.comparisons:
        if each.pairings:
            table = _compare_page.table(compared, each)
            print_table(table.header, table.rows, left=2)
        else:
            say(_compare_page.said(each, compared.metric))
        for line in each.differences:
            say(f"study {each.number} differs: {line}")
    command = shlex.join(["polyak", "study", "compare", *map(str, folders), "--out", str(out)])
    say(f"Report: {_compare_page.write(compared, out, command)}")


def reproduce(
    studies: Annotated[
        bool, typer.Option("--studies", help="Train small models too (minutes).")
    ] = False,
    jobs: Jobs = -1,
    out: Annotated[Path, typer.Option(help="Folder for the table and the runs.")] = Path(
        "study-reproduced"
    ),
) -> None:
    """Compute published figures again, and say which hold.

    Without --studies it takes half a minute.
    """
    from rich.console import Console

    from polyak._files import making_folder
    from polyak.study import _reproduce_decisions as decisions
    from polyak.study import _reproduce_engine as engine
    from polyak.study import _reproduce_exact as exact
    from polyak.study import _reproduce_trained as trained
    from polyak.study._reproduce import reproduce
    from polyak.study._terminal import Seeds

    lines = [*exact.lines(), *decisions.lines(), *engine.lines()]
    if studies:
        lines += trained.lines(out, jobs=jobs)
    with making_folder(out), Seeds(Console(stderr=True), "lines") as progress:
        found = reproduce(lines, progress=progress)
    table = found.table()
    print_table(("verdict", "expected", "got", "what"), [_short(row) for row in table.rows], left=4)
    say(f"{table.note}\nsources and conditions: {out}/reproduced.md, .json")
    found.write(out)
    if found.missed:
        fail(f"{len(found.missed)} of {len(found.outcomes)} lines do not hold", YOURS)


def _short(row: tuple[str, ...]) -> tuple[str, ...]:
    """A row without its topic and source, for a terminal."""
    _, what, expected, got, verdict, _ = row
    return verdict, expected, got, what
