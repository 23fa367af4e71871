"""The progress of a study on the terminal."""

from __future__ import annotations

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
