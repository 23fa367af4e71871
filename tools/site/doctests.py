"""Docstrings are Markdown, but for their doctests: here these become blocks of code."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from griffe import Extension, Object


class Doctests(Extension):
    """Fences every paragraph that begins with `>>>`."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with its doctests within fences."""
    paragraphs = [
        list(g) for _, g in groupby(text.splitlines(), key=lambda line: bool(line.strip()))
    ]
    return "\n".join("\n".join(_fence(lines)) for lines in paragraphs)


def _fence(lines: list[str]) -> list[str]:
    return ["```pycon", *lines, "```"] if lines[0].startswith(">>>") else lines
