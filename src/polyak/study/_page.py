"""A report as data, and how it is written: one HTML file that opens offline.

A page is a title, a summary and sections of blocks. Its charts are drawn when it is written and are part of
the HTML as SVG, so the page loads nothing, runs no chart library, and prints as it looks. Every chart has its
words and a table of its data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import vl_convert

from polyak._files import writing
from polyak.charts._files import css, inline, svg
from polyak.study._text import Table

NAME = "report.html"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    kind: ClassVar[str] = "bullets"
    items: tuple[str, ...]


@dataclass(frozen=True)
class Terms:
    """Names with their values."""

    kind: ClassVar[str] = "terms"
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Code:
    """A command."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Grid:
    """A table of text on the page, and as Markdown beside it."""

    kind: ClassVar[str] = "grid"
    table: Table


@dataclass(frozen=True)
class Reason:
    """A quantity with its figure, what was wanted of it, and the verdict on it."""

    quantity: str
    figure: str
    wanted: str
    verdict: str


@dataclass(frozen=True)
class Claimed:
    """A claim in its own words, its verdict, and the reasons."""

    sentence: str
    verdict: str
    reasons: tuple[Reason, ...]
    source: str = ""


@dataclass(frozen=True)
class Claims:
    """The claims with their verdicts."""

    kind: ClassVar[str] = "claims"
    claims: tuple[Claimed, ...]


@dataclass(frozen=True)
class Figure:
    """A chart with its caption, what it shows in words, and the table of its data."""

    name: str
    chart: Any
    caption: str
    words: str
    table: Table


@dataclass(frozen=True)
class Figures:
    """Charts side by side, or below each other where there is no room."""

    kind: ClassVar[str] = "figures"
    figures: tuple[Figure, ...]


Block = Text | Bullets | Terms | Code | Grid | Claims | Figures


@dataclass(frozen=True)
class Section:
    """A part of a page; `name` is its address on the page."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A report: its title, one line about it, the summary in sentences, and the sections."""

    title: str
    about: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...] = field(default=())

    def tables(self) -> dict[str, Table]:
        """name -> table, in the order of the page."""
        return {b.table.name: b.table for b in self._blocks() if isinstance(b, Grid)}

    def figures(self) -> Iterator[Figure]:
        """The charts, in the order of the page."""
        for block in self._blocks():
            if isinstance(block, Figures):
                yield from block.figures

    def _blocks(self) -> Iterator[Block]:
        for section in self.sections:
            yield from section.blocks


def write(page: Page, folder: Path) -> Path:
    """Write report.html, charts/*.svg and *.png and tables/*.md into a folder; return the page's path."""
    drawn = {figure.name: svg(figure.chart.to_dict()) for figure in page.figures()}
    for name, chart in drawn.items():
        _write(folder / "charts" / f"{name}.svg", chart.encode())
        _write(folder / "charts" / f"{name}.png", vl_convert.svg_to_png(chart, scale=2))
    for name, table in page.tables().items():
        _write(folder / "tables" / f"{name}.md", table.markdown().encode())
    _write(folder / NAME, _html(page, drawn).encode())
    return folder / NAME


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; the file is there whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    _write(path, (text + "\n").encode())


def _html(page: Page, drawn: Mapping[str, str]) -> str:
    template = files("polyak.study").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = {name: inline(name, chart) for name, chart in drawn.items()}
    return environment.from_string(template).render(page=page, svg=charts, css=css())


def _write(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    with writing(path) as file:
        file.write(content)
