"""Curves: a figure of lines with its words and the table of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polyak.study import _figures as charts
from polyak.study._page import Figure
from polyak.study._text import Table, significant


def lines(
    name: str, rows: charts.Rows, title: str, caption: str, x: str, *, log: bool = False,
    domain: Sequence[float] = (),
) -> Figure:  # fmt: skip
    """A figure of a line for each curve; `title` says what the vertical axis is, `x` the other one."""
    ends = {row["curve"]: row["middle"] for row in rows}
    said = ", ".join(f"{curve} {significant(value, 3)}" for curve, value in ends.items())
    words = f"At the right end ({x}: {max(row['x'] for row in rows):g}): {said}."
    chart = charts.bands(rows, x, title, log=log, domain=domain)
    return Figure(name, chart, caption, words, _wide(name, title, x, rows))


def _wide(name: str, title: str, x: str, rows: charts.Rows) -> Table:
    """The rows of a chart of lines as a table with a column for each curve."""
    labels = list(dict.fromkeys(row["curve"] for row in rows))
    cells: dict[float, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row["x"], {})[row["curve"]] = _cell(row)
    body = tuple(
        (significant(at, 6), *(found.get(label, "—") for label in labels))
        for at, found in sorted(cells.items())
    )
    return Table(name, title[:1].upper() + title[1:], (x, *labels), body)


def _cell(row: Mapping[str, float]) -> str:
    middle = significant(row["middle"])
    if "low" not in row:
        return middle
    return f"{middle} [{significant(row['low'])}, {significant(row['high'])}]"
