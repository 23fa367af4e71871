"""The reference: the `--help` of every command, as one page of Markdown.

python -m polyak.cli._reference > docs/cli.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from typer.main import get_command

from polyak.cli import app
from polyak.cli._commands import WIDTH

_HEAD = """\
# The command line

Install it with the extra `cli` (`pip install ".[cli]"`); charts and studies need `study`.
`python -m polyak.cli._reference` writes this page.
"""


def reference() -> str:
    """The page."""
    return "\n".join([_HEAD, *_sections(get_command(app), "polyak", None)])


def _sections(command: Any, name: str, parent: Any) -> Iterator[str]:
    """A section for a command, then those of its subcommands."""
    context = typer.Context(
        command, info_name=name, parent=parent, terminal_width=WIDTH - 2
    )  # as on a terminal
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
    for word, subcommand in getattr(command, "commands", {}).items():
        yield from _sections(subcommand, word, context)


if __name__ == "__main__":
    typer.echo(reference(), nl=False)
