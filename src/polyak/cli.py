"""The command line: `polyak explain`, `polyak study article`.

Commands parse and print; what they do is in the library. Each imports what it needs, so that
`polyak --help` loads neither torch nor a chart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError:
    raise SystemExit('the command line needs typer: pip install "polyak[cli]"') from None

if TYPE_CHECKING:
    from polyak.theory import Explanation

# click's `UsageError`, which newer versions of typer carry within themselves.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


@contextmanager
def _one_line_usage_errors() -> Iterator[None]:
    """An unknown option, a missing or superfluous argument: one line, exit code 2."""
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # not an error: it prints the help
            raise
        message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "polyak"
        typer.echo(f"polyak: {message.rstrip('.')}; see {command} --help", err=True)
        raise typer.Exit(2) from None


class _Commands(TyperGroup):
    """The commands; an error in their usage is one line, like every other."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _one_line_usage_errors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _one_line_usage_errors():
            return super().invoke(ctx)


app = typer.Typer(
    name="polyak",
    cls=_Commands,
    help="Averages of the weights of PyTorch models: explain them and study them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
study = typer.Typer(help="Experiments: does averaging help, by how much?", no_args_is_help=True)
app.add_typer(study, name="study")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A wrong value, a file that cannot be written, a missing extra: one line, exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        typer.echo(f'polyak: {error.name} is missing: pip install "polyak[study]"', err=True)
        raise typer.Exit(2) from None
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"polyak: {error}", err=True)
        raise typer.Exit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"polyak {version('polyak')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Averages of the weights of PyTorch models: explain them and study them."""


@app.command()
def explain(
    spec: Annotated[str, typer.Argument(help='A rule, such as "exponential(half_life=1000)".')],
    steps: Annotated[
        int | None, typer.Option(help="Steps of training.", show_default="the start is forgotten")
    ] = None,
    every: Annotated[int, typer.Option(help="Steps between updates.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the chart.")] = Path("explain"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What a rule averages: its measures, its chart, its equivalents in other libraries."""
    with _one_line_errors():
        from polyak import charts, theory

        about = theory.explain(spec, steps, every=every)
        charts.save(charts.rule_chart(about.rule, about.steps, every=every), out, "rule")
        (_print_json if json else _print_table)(about, theory.equivalents(about.rule))
    typer.echo(f"chart: {out}/rule.html (also .png, .svg)", err=json)


def _print_json(about: Explanation, calls: dict[str, str]) -> None:
    import json

    typer.echo(json.dumps({**about.as_dict(), "equivalents": calls}, indent=2))


def _print_table(about: Explanation, calls: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from polyak.theory import CONVENTIONS

    table = Table(title=about.title(), title_justify="left")
    for name, justify in (("measure", "left"), ("value", "right"), ("unit", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # it takes three words
    for row in about.rows():
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.print(table)
    found = "The same average, updated every step:" if calls else "No other library known has it."
    console.print(f"\n{found}")
    for name, call in calls.items():
        note = f"   # {CONVENTIONS[name]}" if name in CONVENTIONS else ""
        console.print(f"  {call}{note}", soft_wrap=True)


@study.command()
def article(
    seeds: Annotated[int, typer.Option(help="Repetitions, with different seeds.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("study-article"),
    jobs: Annotated[int, typer.Option(help="Processes; -1 is one per core.")] = -1,
) -> None:
    """The founding article's experiment, over many seeds: a verdict on each of its claims."""
    with _one_line_errors():
        from polyak.study import run_article

        run_article(seeds=seeds, out=out, jobs=jobs)
