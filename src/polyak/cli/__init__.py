"""The command line: `polyak explain`, `inspect`, `average`, `synthesize`, `sweep`, ...

Commands parse and print; what they do is in the library. Each imports what it needs, so that
`polyak --help` loads neither torch nor a chart. Their errors are caught in one place (`commands`).
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit('the command line needs typer: pip install "polyak[cli]"') from None

from polyak.cli._averaging import average
from polyak.cli._commands import EPILOG, WIDTH, Commands
from polyak.cli._converting import convert, export
from polyak.cli._differing import diff
from polyak.cli._explaining import explain
from polyak.cli._inspecting import inspect
from polyak.cli._studying import article
from polyak.cli._sweeping import sweep
from polyak.cli._synthesizing import synthesize

app = typer.Typer(
    name="polyak",
    cls=Commands,
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": WIDTH},
)
study = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(study, name="study", help="Experiments: does averaging help, by how much?")
study.command()(article)
for command in (explain, inspect, average, synthesize, sweep, export, convert, diff):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"polyak {version('polyak')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[  # noqa: ARG001
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Averages of the weights of PyTorch models: explain them, make them from files, study them."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no half file is left
