"""How results look: tables of text that fit a width, tables of HTML, and charts in a notebook."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from html import escape
from importlib import import_module
from typing import Any, NamedTuple

# What stays on one line: a word, or an interval with the word before it.
_TOKEN = re.compile(r"(?:\S+ )?\[[^\[\]]*\d[^\[\]]*\]\S*|\S+")
_GAP = 2
_MOST = 200  # rows in a notebook


class Table(NamedTuple):
    """Cells of text under a header; the first `left` columns are words, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def lines(self, width: int | None = None) -> list[str]:
        """Aligned columns, one line a row; in `width` columns of text, words go on in the next line.

        If numbers alone are too wide, each row becomes a paragraph. Numbers and intervals never break.

        >>> table = Table(("what", "loss"), [("the mean of all", "1.25 [1, 1.5]")])
        >>> print(*table.lines(), sep="\\n")
        what                      loss
        the mean of all  1.25 [1, 1.5]
        >>> print(*table.lines(width=25), sep="\\n")
        what                 loss
        the mean    1.25 [1, 1.5]
        of all
        """
        cells = [[cell.replace("\n", "\\n") for cell in row] for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        if width is None:
            return [self._line(row, widths) for row in cells]
        fitted = self._fitted(cells, widths, width)
        if fitted is None:
            return [line for row in cells[1:] for line in _paragraph(self, row, width)]
        return [line for row in cells for line in self._folded(row, fitted)]

    def html(self) -> str:
        """The table as HTML, everything escaped; of many rows the first."""
        rows = [_html_row("th", self.header, self.left)]
        rows += [_html_row("td", row, self.left) for row in self.rows[:_MOST]]
        if (more := len(self.rows) - _MOST) > 0:
            rows.append(_html_row("td", (f"and {more} more",), 1))
        return f"<table>{''.join(rows)}</table>"

    def _fitted(self, cells: list[list[str]], widths: list[int], width: int) -> list[int] | None:
        """The widths with the widest columns narrowed to fit; None if they cannot."""
        fitted, excess = list(widths), sum(widths) + _GAP * (len(widths) - 1) - width
        least = [
            max(len(part) for row in rows for part in row)
            for rows in zip(*(self._parts(row, [0] * len(row)) for row in cells), strict=True)
        ]
        for _ in range(excess):
            column = max(range(len(fitted)), key=lambda i: (fitted[i] > least[i], fitted[i]))
            if fitted[column] <= least[column]:
                return None
            fitted[column] -= 1
        return fitted

    def _parts(self, row: Sequence[str], widths: list[int]) -> list[list[str]]:
        """Each cell of a row in lines of at most a width; numbers stay whole, the header is words."""
        words = len(row) if list(row) == list(self.header) else self.left
        return [
            _broken(cell, width) if i < words else [cell]
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]

    def _folded(self, row: list[str], widths: list[int]) -> list[str]:
        """The lines of a row whose words go on in the next line."""
        parts = self._parts(row, widths)
        count = max(map(len, parts))
        filled = [part + [""] * (count - len(part)) for part in parts]
        return [self._line(line, widths) for line in zip(*filled, strict=True)]

    def _line(self, row: Sequence[str], widths: list[int]) -> str:
        aligned = [
            cell.ljust(width) if i < self.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return (" " * _GAP).join(aligned).rstrip()


def _broken(text: str, width: int) -> list[str]:
    """Lines of at most `width`, broken between tokens."""
    return _laid(_TOKEN.findall(text), width)


def _laid(tokens: Sequence[str], width: int, indents: tuple[str, str] = ("", "")) -> list[str]:
    """Tokens in lines of at most `width`, with indents of the first and of later lines."""
    lines: list[str] = []
    for token in tokens:
        if lines and len(lines[-1]) + 1 + len(token) <= width:
            lines[-1] += f" {token}"
        else:
            lines.append(indents[bool(lines)] + token)
    return lines or [""]


def _paragraph(table: Table, row: list[str], width: int) -> list[str]:
    """A row as lines: its first cell, and below it each other cell with the name of its column."""
    lines = _broken(row[0], width)
    for i, (name, cell) in enumerate(zip(table.header, row, strict=True)):
        if cell and i:
            words = _TOKEN.findall(cell) if i < table.left else [cell]
            named = [*_TOKEN.findall(f"{name}:"), *words] if name else words
            lines += _laid(named, width, ("  ", "    "))
    return lines


def _html_row(tag: str, row: Sequence[str], left: int) -> str:
    sides = ("left" if i < left else "right" for i in range(len(row)))
    cells = (
        f'<{tag} style="text-align:{s}">{escape(c)}</{tag}>'
        for c, s in zip(row, sides, strict=True)
    )
    return f"<tr>{''.join(cells)}</tr>"


def terminal_width() -> int | None:
    """The columns of the terminal to which the process prints; None if it prints to a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@contextmanager
def every_character() -> Iterator[None]:
    """Print what the encoding of stdout lacks as Python's escapes: a pipe on Windows has no minus sign."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper) or out.closed or out.errors != "strict":
        yield
        return
    out.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with suppress(ValueError, OSError):  # it is closed, or nothing reads it any more
            out.reconfigure(errors="strict")


def number_text(value: float | None) -> str:
    """A number to six digits, or a dash for None."""
    return "-" if value is None else f"{value:.6g}"


def size_text(count: int) -> str:
    """A number of bytes to three digits, in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"


class Tabled:
    """A result that is tables: as text in a terminal, as HTML in a notebook."""

    def heading(self) -> list[str]:
        """The lines above the tables."""
        return []

    def tables(self) -> list[Table]:
        """The tables; without any, a notebook shows the text."""
        return []

    def __str__(self) -> str:
        return "\n".join([*self.heading(), *self.tables()[0].lines()])

    def _repr_html_(self) -> str:
        lines = [f"<p>{'<br>'.join(map(escape, self.heading()))}</p>"]
        lines += [table.html() for table in self.tables()]
        return "".join(lines) if len(lines) > 1 else f"<pre>{escape(str(self))}</pre>"


class Charted(Tabled):
    """A result with a chart, which `polyak.charts` draws.

    The rooms of results may not import `charts`, so it is imported by name at the first chart.
    """

    def chart(self) -> Any:
        """The altair chart.

        Raises `ModuleNotFoundError` without altair (the extra `study`), `LookupError` if there is nothing
        to draw.
        """
        return import_module("polyak.charts").chart_of(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Formats for a notebook: the chart where altair is installed, else the tables; and the text."""
        formats = {"text/plain": str(self), "text/html": self._repr_html_()}
        try:
            chart = self.chart()
        except (ModuleNotFoundError, LookupError):
            return formats
        bundle = chart._repr_mimebundle_(include, exclude)
        drawn = bundle[0] if isinstance(bundle, tuple) else bundle
        return {**formats, **drawn}
