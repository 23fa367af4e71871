"""The command line: `polyak explain`, `advise`, `inspect`, `average`, `synthesize`, `sweep`, ...

A command parses its options, calls a function of the library, and prints what it returns. It imports
what it needs when it runs, so that `polyak --help` loads neither torch nor a chart. Errors are caught
in one place (`_commands`), and so is what a command changes in its process (`_process`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

try:
    import typer
    from typer.main import get_command
except ModuleNotFoundError:
    raise SystemExit('the command line needs typer: install polyak with its extra "cli"') from None

from polyak.cli._advise import advise
from polyak.cli._average import average
from polyak.cli._commands import EPILOG, WIDTH, Commands
from polyak.cli._diff import diff
from polyak.cli._explain import explain
from polyak.cli._export import convert, export
from polyak.cli._inspect import inspect
from polyak.cli._migrate import migrate
from polyak.cli._study import article, compare, listed, reproduce, run
from polyak.cli._sweep import sweep
from polyak.cli._synthesize import synthesize

__all__ = ["app", "main"]


class _App(typer.Typer):
    """The application; unlike typer's own, a call leaves `sys.excepthook` as it is."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return get_command(self)(*args, **options)


app = _App(
    name="polyak",
    cls=Commands,
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": WIDTH},
)
study = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(study, name="study", help="Measure whether averaging helps.")
study.command()(article)
study.command()(run)
study.command("list")(listed)
study.command()(compare)
study.command()(reproduce)
for command in (
    explain,
    advise,
    migrate,
    inspect,
    average,
    synthesize,
    sweep,
    export,
    convert,
    diff,
):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line with these arguments, by default those of the process.

    It always ends with `SystemExit`, whose code `polyak --help` explains. The process is then as it
    was before: its signal handlers, hooks, search path and streams.
    """
    app(arguments)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"polyak {version('polyak')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Average the weights of PyTorch models."""
