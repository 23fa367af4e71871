"""Terminal: the progress of a study, and its main tables."""

from __future__ import annotations

import re
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from polyak._shown import Table as TextTable
from polyak._shown import every_character
from polyak.study._article_report import Report
from polyak.study._text import Table

COLOURS = {"holds": "green", "does not hold": "red", "undecided": "yellow"}
LINES = 8


class Seeds:
    """Progress over seeds, or over other `units`: a bar on a terminal, else about eight plain lines."""

    def __init__(self, console: Console, units: str = "seeds") -> None:
        self._units = units
        self._console = console
        self._began = time.monotonic()
        self._ran = 0
        self._bar = Progress(
            TextColumn(units),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(show_speed=True),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(units, total=None, rate="")

    def __enter__(self) -> Seeds:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, wanted: int, ran: bool) -> None:
        """Shows that `done` of `wanted` are done; `ran` tells whether one was just run."""
        self._ran += ran
        pace = (time.monotonic() - self._began) / max(self._ran, 1)
        rate = f"{pace:.2f} s each" if self._ran else ""
        self._bar.update(self._task, completed=done, total=wanted, rate=rate)
        if not self._console.is_terminal and done % max(wanted // LINES, 1) == 0:
            left = f", {rate}, {pace * (wanted - done):.0f} s left" if self._ran else ""
            self._console.print(f"{self._units} {done}/{wanted}{left}")


def show(console: Console, report: Report, seconds: float) -> None:
    """Print the main tables, and the path of the report."""
    with every_character():
        for name, columns, left in (
            ("verdicts", (0, 1, 2), 3),
            ("final", (0, 1, 2, 3), 1),
            ("arms", (0, 2, 5, 7, 8), 1),
        ):
            _print(console, report.tables[name], columns, left)
        console.print(f"{seconds:.0f} s. Report: {report.page.resolve()}", highlight=False)


def _print(console: Console, table: Table, columns: tuple[int, ...], left: int) -> None:
    """Some columns of a table, with verdicts in colour on a terminal; the first `left` are words."""
    header, *rows = ([row[column] for column in columns] for row in (table.header, *table.rows))
    console.print(f"\n{table.title}", highlight=False, markup=False)
    width = console.width if console.is_terminal else None
    for line in TextTable(header, rows, left).lines(width):
        console.print(_coloured(line), highlight=False, soft_wrap=True)


def _coloured(line: str) -> str:
    line = line.replace("[", r"\[")
    for verdict, colour in COLOURS.items():
        line = re.sub(rf"(?<=  ){verdict}(?=  |$)", f"[{colour}]{verdict}[/]", line)
    return line
