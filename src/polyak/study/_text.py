"""Tables of text cells, and numbers with their intervals as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from polyak.study._statistics import Interval


@dataclass(frozen=True)
class Table:
    """A table of text with a title, and a note for its reader; a page lets its reader sort it or not."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    sortable: bool = False

    def markdown(self) -> str:
        """The table as Markdown, with title and note."""
        rows = [tuple(map(_markdown, row)) for row in (self.header, *self.rows)]
        cells = [rows[0], tuple("---" for _ in self.header), *rows[1:]]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        return "\n".join([f"# {self.title}", "", *lines, "", self.note]).rstrip() + "\n"


def _markdown(cell: str) -> str:
    """A cell in one line; a bar in it would begin another cell."""
    return " ".join(cell.split()).replace("|", r"\|")


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def file_name(name: str) -> str:
    """A name as part of a file's name and of an id: other characters than letters, digits, - and _ as code.

    >>> file_name("inverse_sqrt"), file_name("1/sqrt")
    ('inverse_sqrt', '1-2f-sqrt')
    """
    return re.sub(r"[^A-Za-z0-9_-]", lambda found: f"-{ord(found[0]):x}-", name)


def number(value: float, digits: int = 4) -> str:
    """A decimal number with a real minus sign, without a sign on zero."""
    text = f"{value:.{digits}f}"
    text = text.removeprefix("-") if not float(text) else text
    return text.replace("-", "−")


def significant(value: float, digits: int = 4) -> str:
    """A number with this many significant digits, and a real minus sign; words for NaN and infinity.

    >>> significant(11_254.3), significant(-0.00001), significant(1e12)
    ('11250', '−1e−05', '1e+12')
    """
    if math.isnan(value):
        return "—"
    if math.isinf(value):
        return "never" if value > 0 else "−∞"
    text = f"{value:.{digits}g}"
    text = f"{float(text):.0f}" if 1 <= abs(value) < 1e9 and "e" in text else text
    return ("0" if not float(text) else text).replace("-", "−")


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{number(100 * value, digits)} %"


FORMS: dict[str, Callable[[float], str]] = {
    "share": percent,
    "number": significant,
    "ratio": lambda v: number(v, 3),
    "steps": lambda v: significant(v, 4),
    "factor": lambda v: number(math.exp(v), 3),
    "percent": lambda v: percent(math.expm1(v), 2),
}


def between(interval: Interval, form: Callable[[float], str] = significant) -> str:
    """`estimate [low, high]`, "no seed" for a quantity without values, and "—" for one that more seeds would have."""
    if math.isnan(interval.estimate):
        return "—" if interval.seeds else "no seed"
    low, high = form(interval.low), form(interval.high)
    return f"{form(interval.estimate)} [{low}, {high}]"
