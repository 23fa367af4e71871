"""`polyak sweep`: which average of a run is best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak._files import making_folder, refuse_existing, writing
from polyak.cli._choosing import Wanted, stored
from polyak.cli._grouped import grouped
from polyak.cli._options import Fitted, Force, Json, Part, Snapshots, counts_of, grid_of
from polyak.cli._output import (
    json_text,
    note,
    note_left,
    print_json,
    print_table,
    progress_shown,
    say,
)
from polyak.cli._users_function import BetterOption, users_function

if TYPE_CHECKING:
    from polyak.offline import Sweep


@grouped
def sweep(
    evaluate: Annotated[
        str,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Takes weights (name -> tensor); returns their quality, or one number for each example.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for sweep.json and the chart.")
    ],
    folder: Snapshots = None,
    *,
    rule: Annotated[
        list[str], typer.Option(metavar="SPEC", help="An average to try (repeatable).")
    ] = [],  # noqa: B006
    half_lives: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH:COUNT", help="Try exponential(half_life=...).")
    ] = None,
    relative_stds: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH:COUNT", help="Try power(relative_std=...).")
    ] = None,
    windows: Annotated[
        str | None, typer.Option(metavar="K,K,...", help="Try the mean of the last K checkpoints.")
    ] = None,
    fitted: Fitted,
    wanted: Wanted,
    part: Part,
    better: BetterOption = "lower",
    force: Force = False,
    json: Json = False,
) -> None:
    """Find the best average of a finished run, by your own function.

    The function's module may be in the current directory; what it prints goes to stderr. The live
    weights are evaluated too. Report the best average's quality on other data.

    \b
    Examples:
      polyak sweep snapshots --evaluate judge:loss --half-lives 100:1000:8 --out sweep
      polyak sweep . --evaluate judge:loss --windows 2,3 --out sweep
    """
    from polyak import charts, offline

    refuse_existing(out / "sweep.json", force)
    rules = [*rule, *_specs("exponential(half_life={})", half_lives, "--half-lives")]
    rules += _specs("power(relative_std={})", relative_stds, "--relative-stds")
    counts = [] if windows is None else counts_of(windows, "--windows")
    if not rules and not counts:
        raise ValueError(
            "no average to try: give --rule, --half-lives, --relative-stds or --windows"
        )
    with making_folder(out):  # before the work, so that a place that cannot be made fails at once
        with users_function(evaluate) as function, progress_shown("trials", bytes=False) as show:
            result = offline.sweep(
                stored(folder, wanted, part, better),
                rules,
                function,
                windows=counts,
                better=better,
                read=part.reader(),
                progress=show,
                **fitted.arguments(),
            )
        try:  # the work of hours: it is printed if it cannot be written, and the reverse
            with writing(out / "sweep.json", overwrite=force) as file:
                file.write(f"{json_text(result.as_dict())}\n".encode())
        finally:
            _print(result, json=json)
        charts.save(charts.sweep_chart(result), out, "sweep")
        _notes(result)
    say(f"chart: {out}/sweep.html (also .png, .svg), {out}/sweep.json", err=json)


def _specs(spec: str, grid: str | None, option: str) -> list[str]:
    return [spec.format(number) for number in grid_of(grid, option)]


def _print(result: Sweep, *, json: bool) -> None:
    if json:
        print_json(result.as_dict())
        return
    for table in result.tables():
        print_table(table.header, table.rows, table.left)


def _notes(result: Sweep) -> None:
    """Print what the table does not say."""
    note_left(result.left)
    if result.best is None:
        note("all averages but one were refused, so none is the best")
    if not result.baselines:
        note("no live weights were stored to compare with: give --checkpoint TIME=FILE")
    for baseline in result.baselines:
        if result.worse_than(baseline):
            note(f"no average is better than the live weights of {baseline.path} ({baseline.name})")
            break
