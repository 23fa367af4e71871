"""The `--help` of every command, as one page of Markdown.

python -m polyak.cli._reference > docs/cli.md
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import typer
from typer.main import get_command

from polyak.cli import app
from polyak.cli._choosing import Wanted
from polyak.cli._commands import WIDTH
from polyak.cli._options import Fitted, Part, Writing

_HEAD = """\
# The command line

Install it with `pip install ".[cli]"`, or with `".[study]"` for charts and studies too. Each command has `--help`; all
but `study` have `--json`. `python -m polyak.cli._reference` writes this page.
"""
_GROUPS: dict[str, Any] = {
    "to read a checkpoint": Part,
    "to choose checkpoints of a run": Wanted,
    "to fit an average": Fitted,
    "to write weights": Writing,
}


def reference() -> str:
    """The page."""
    command = get_command(app)
    shared = "\n\n".join(_groups(command))
    page = [
        _HEAD,
        *_sections(command, "polyak", None),
        f"## Shared options\n\n```text\n{shared}\n```\n",
    ]
    return "\n".join(page)


def _sections(command: Any, name: str, parent: Any) -> Iterator[str]:
    """A section for a command, then those of its subcommands."""
    context = typer.Context(
        command, info_name=name, parent=parent, terminal_width=WIDTH - 2
    )  # as on a terminal
    titles = [title for title, group in _GROUPS.items() if _has(command, group)]
    fields = {"json", *(field for title in titles for field in _GROUPS[title]._fields)}
    own = copy.copy(command)
    own.params = [parameter for parameter in command.params if parameter.name not in fields]
    own.add_help_option = False
    shared = f"\n\nShared options: {'; '.join(titles)}." if titles else ""
    _, _, text = own.get_help(context).partition(
        "\n\n"
    )  # without its usage, which repeats the rest
    yield f"## {context.command_path}\n\n```text\n{text.rstrip()}{shared}\n```\n"
    for word, subcommand in getattr(command, "commands", {}).items():
        yield from _sections(subcommand, word, context)


def _groups(command: Any) -> Iterator[str]:
    """The options of each group, as a command that has them lists them."""
    for title, group in _GROUPS.items():
        holder = next(each for each in command.commands.values() if _has(each, group))
        context = typer.Context(holder, terminal_width=WIDTH - 2)
        options = [each for each in holder.params if each.name in group._fields]
        formatter = context.make_formatter()
        with formatter.section(f"Options {title}"):
            formatter.write_dl([each.get_help_record(context) for each in options])
        yield formatter.getvalue().strip()


def _has(command: Any, group: Any) -> bool:
    return set(group._fields) <= {parameter.name for parameter in command.params}


if __name__ == "__main__":
    typer.echo(reference(), nl=False)
