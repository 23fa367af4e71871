"""`polyak explain`: what a rule averages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from polyak.cli._options import ChartFolder, Json
from polyak.cli._output import print_equivalents, print_json, print_table, save_chart, say

if TYPE_CHECKING:
    from polyak.theory import Explanation


def explain(
    specs: Annotated[
        list[str], typer.Argument(metavar="SPEC...", help='Rules, such as "exponential(0.999)".')
    ],
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the run; adds measures in % of the run.", show_default="a long run"
        ),
    ] = None,
    every: Annotated[int, typer.Option(help="Steps between updates.")] = 1,
    out: ChartFolder = None,
    json: Json = False,
) -> None:
    """Show what a rule averages, or compare rules.

    For one rule, it also prints other libraries' calls for the same average.

    \b
    Examples:
      polyak explain "exponential(half_life=1000)" --steps 20000
      polyak explain "power(relative_std=0.1)" "window(100)" --out rules
    """  # fmt: skip
    from polyak import theory

    abouts = [theory.explain(spec, steps, every=every) for spec in specs]
    if json:
        described = [{**a.as_dict(), "equivalents": theory.equivalents(a.rule)} for a in abouts]
        print_json(described[0] if len(described) == 1 else described)
    else:
        _print_table(abouts)
        if len(abouts) == 1:
            print_equivalents(abouts[0].rule)
    if out is not None:
        # Comes last: the table is printed even if altair is missing or the folder cannot be written.
        from polyak import charts

        save_chart(charts.rule_chart(abouts), out, "rule", err=json)


def _print_table(abouts: list[Explanation]) -> None:
    """One row a measure, one column a rule."""
    several = len(abouts) > 1
    for number, about in enumerate(abouts, 1):
        say(f"{number}: {about.title()}" if several else about.title())
    tables = [about.tables()[0] for about in abouts]
    rows = [
        (*row[0][:2], *(cells[2] for cells in row))
        for row in zip(*(table.rows for table in tables), strict=True)
    ]
    heads = [str(number) for number in range(1, len(abouts) + 1)] if several else ["value"]
    print_table((*tables[0].header[:2], *heads), rows, left=2)
