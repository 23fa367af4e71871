"""`polyak sweep`: which average of a run is best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak._files import making_folder, refuse_existing, writing
from polyak.cli._options import (
    At,
    Checkpoints,
    Force,
    Json,
    MaxAmplification,
    MaxError,
    Snapshots,
    checkpoints_of,
    grid_of,
)
from polyak.cli._output import (
    json_text,
    number_text,
    print_json,
    print_table,
    progress_shown,
    say,
)
from polyak.cli._users_function import BetterOption, users_function

if TYPE_CHECKING:
    from polyak.offline import Sweep


def sweep(
    evaluate: Annotated[
        str,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Takes weights, name -> tensor; returns their quality.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="For sweep.json and the chart.")],
    folder: Snapshots = None,
    rule: Annotated[
        list[str], typer.Option(metavar="SPEC", help="An average to try (repeatable).")
    ] = [],  # noqa: B006
    half_lives: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH:COUNT", help="Try exponential(half_life=...)."),
    ] = None,
    relative_stds: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH:COUNT", help="Try power(relative_std=...)."),
    ] = None,
    at: At = None,
    checkpoint: Checkpoints = [],  # noqa: B006
    better: BetterOption = "lower",
    max_error: MaxError = 0.05,
    max_amplification: MaxAmplification = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Find the best average of a finished run, by a function of yours.

    Its module may lie in the current directory; its prints go to stderr. The best of many averages
    looks better than it is: report its quality on other data.

    \b
    Example:
      polyak sweep snapshots --evaluate judge:loss --half-lives 100:1000:8 --out sweep --json
    """
    from polyak import charts, offline

    refuse_existing(out / "sweep.json", force)
    rules = [*rule]
    rules += [f"exponential(half_life={number})" for number in grid_of(half_lives, "--half-lives")]
    rules += [
        f"power(relative_std={number})" for number in grid_of(relative_stds, "--relative-stds")
    ]
    if not rules:
        raise ValueError("no average to try: give --rule, --half-lives or --relative-stds")
    with making_folder(out):  # before the work, so that a place that cannot be made fails at once
        with users_function(evaluate) as function, progress_shown("averages", bytes=False) as show:
            done = iter(range(1, len(rules) + 1))
            result = offline.sweep(
                folder,
                rules,
                function,
                at,
                better=better,
                checkpoints=checkpoints_of(checkpoint),
                max_error=max_error,
                max_amplification=max_amplification,
                progress=lambda _: show and show(next(done), len(rules)),
            )
        try:  # the work of hours: it is printed if it cannot be written, and the reverse
            with writing(out / "sweep.json", overwrite=force) as file:
                file.write(f"{json_text(result.as_dict())}\n".encode())
        finally:
            _print(result, json=json)
        charts.save(charts.sweep_chart(result), out, "sweep")
    say(f"chart: {out}/sweep.html (also .png, .svg), {out}/sweep.json", err=json)


def _print(result: Sweep, *, json: bool) -> None:
    if json:
        print_json(result.as_dict())
        return
    rows = [
        (
            point.rule,
            number_text(point.half_life),
            number_text(point.mean_age),
            f"{point.relative_error:.2g}",
            f"{point.amplification:.3g}",
            "refused" if point.quality is None else number_text(point.quality),
            "best" if point is result.best else "",
        )
        for point in result.points
    ]
    header = ("rule", "half-life", "mean age", "error", "amplification", "quality", "")
    print_table(header, rows)
