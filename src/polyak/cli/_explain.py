"""`polyak explain`: what a rule averages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak.cli._options import Json
from polyak.cli._output import print_json, say

if TYPE_CHECKING:
    from polyak.theory import Explanation


def explain(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help='A rule, such as "exponential(0.999)".')
    ],
    steps: Annotated[
        int | None, typer.Option(help="Steps of training.", show_default="a long run")
    ] = None,
    every: Annotated[int, typer.Option(help="Steps between updates.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the chart.")] = Path("explain"),
    json: Json = False,
) -> None:
    """Show what a rule averages, and the same average in other libraries.

    \b
    Examples:
      polyak explain "exponential(half_life=1000)"
      polyak explain "power(relative_std=0.1)" --steps 20000 --json
    """
    from polyak import theory

    about = theory.explain(spec, steps, every=every)
    calls = theory.equivalents(about.rule)
    if json:
        print_json({**about.as_dict(), "equivalents": calls})
    else:
        _print_table(about, calls)
    _write_chart(about, out, json=json)


def _write_chart(about: Explanation, out: Path, *, json: bool) -> None:
    """Comes last: the table is printed even if altair is missing or the folder cannot be written."""
    from polyak import charts

    charts.save(charts.rule_chart(about), out, "rule")
    say(f"chart: {out}/rule.html (also .png, .svg)", err=json)


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
    headline = (
        "The same average, updated every step:" if calls else "No other library known has it."
    )
    console.print(f"\n{headline}")
    for name, call in calls.items():
        convention = f"   # {CONVENTIONS[name]}" if name in CONVENTIONS else ""
        console.print(f"  {call}{convention}", soft_wrap=True)
