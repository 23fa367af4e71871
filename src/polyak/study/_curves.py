"""A figure of lines with its caption and the table of its data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

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


def spread(x: float, curve: str, values: Sequence[float]) -> dict[str, Any]:
    """A row of a curve at `x`: the median of values, and the ends of their middle 80 %."""
    low, high = (float(np.quantile(values, share)) for share in (0.1, 0.9))
    return {"x": x, "curve": curve, "middle": float(np.median(values)), "low": low, "high": high}


def spreads(first: int, curve: str, columns: Iterable[Sequence[float]]) -> charts.Rows:
    """The rows of a curve at `first`, `first + 1`, ..., one for each column of values."""
    return [spread(first + i, curve, column) for i, column in enumerate(columns)]


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
