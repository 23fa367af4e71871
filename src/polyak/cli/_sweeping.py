"""`polyak sweep`: which average of a run is best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak._files import refuse_existing
from polyak.cli._evaluating import Better, function_of
from polyak.cli._options import (
    At,
    Checkpoints,
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

if TYPE_CHECKING:
    from polyak.offline import Sweep


def sweep(
    evaluate: Annotated[
        str,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Gives the quality of weights, a dictionary name -> tensor, as a number.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for sweep.json and the chart.")
    ],
    folder: Snapshots = None,
    rule: Annotated[
        list[str], typer.Option(metavar="SPEC", help="An average to judge; repeat it.")
    ] = [],  # noqa: B006
    half_lives: Annotated[
        str | None,
        typer.Option(
            metavar="LOW:HIGH:COUNT", help="exponential(half_life=...) over a logarithmic grid."
        ),
    ] = None,
    relative_stds: Annotated[
        str | None,
        typer.Option(
            metavar="LOW:HIGH:COUNT", help="power(relative_std=...) over a logarithmic grid."
        ),
    ] = None,
    at: At = None,
    checkpoint: Checkpoints = [],  # noqa: B006
    better: Better = "lower",
    max_error: MaxError = 0.05,
    max_amplification: MaxAmplification = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite an earlier sweep in the folder.")
    ] = False,
    json: Json = False,
) -> None:
    """Which average of a finished run is best, by a function of your own.

    Each average is made of what was stored (`polyak synthesize`) and judged; those that cannot be
    made exactly enough are listed as refused. The function's module is found in the current
    directory too. Where it raises, its traceback is shown and the exit code is 1. The best of many
    looks better than it is on the data that chose it: report its quality on other data.

    \b
    Examples:
      polyak sweep snapshots --evaluate judge:loss --half-lives 100:1000:8 --out sweep
      polyak sweep snapshots --evaluate judge:loss --rule "uniform()" \\
          --relative-stds 0.05:0.25:6 --at 1500 --out sweep --force --json
    """
    from polyak import charts, offline

    refuse_existing(out / "sweep.json", force)
    rules = [*rule]
    rules += [f"exponential(half_life={each})" for each in grid_of(half_lives, "--half-lives")]
    rules += [f"power(relative_std={each})" for each in grid_of(relative_stds, "--relative-stds")]
    if not rules:
        raise ValueError("no average to judge: give --rule, --half-lives or --relative-stds")
    out.mkdir(parents=True, exist_ok=True)
    judged, done = function_of(evaluate), iter(range(1, len(rules) + 1))
    with progress_shown("judging", bytes=False) as show:
        found = offline.sweep(
            folder,
            rules,
            judged,
            at,
            better=better,
            checkpoints=checkpoints_of(checkpoint),
            max_error=max_error,
            max_amplification=max_amplification,
            progress=lambda _: show and show(next(done), len(rules)),
        )
    (out / "sweep.json").write_text(json_text(found.as_dict()) + "\n")
    charts.save(charts.sweep_chart(found), out, "sweep")
    if json:
        print_json(found.as_dict())
    else:
        _print(found)
    say(f"chart: {out}/sweep.html (also .png, .svg), {out}/sweep.json", err=json)


def _print(found: Sweep) -> None:
    rows = [
        (
            point.rule,
            number_text(point.half_life),
            number_text(point.mean_age),
            f"{point.relative_error:.2g}",
            f"{point.amplification:.3g}",
            "refused" if point.quality is None else number_text(point.quality),
            "best" if point is found.best else "",
        )
        for point in found.points
    ]
    header = ("rule", "half-life", "mean age", "error", "amplification", "quality", "")
    print_table(header, rows)
