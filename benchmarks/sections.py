"""Reports: titled tables that print on the terminal and are written as Markdown."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Section:
    """A table with a title above it and a note below it."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str

    def print(self, console: Console) -> None:
        """Prints it as a table on the terminal."""
        table = Table(*self.header, title=self.title, caption=self.note, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        console.print()

    def markdown(self) -> str:
        """Returns it as a Markdown section."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{table}\n\n{self.note}\n"


def wide_console() -> Console:
    """A console for tables: as wide as the terminal, and wide enough for all columns in a file."""
    return Console(width=None if Console().is_terminal else 160)


def machine() -> str:
    """The machine and the versions of a measurement."""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}."
    )
