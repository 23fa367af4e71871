"""`polyak synthesize`: any average of a finished run, from its snapshots."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak._files import refuse_existing
from polyak.cli._options import (
    At,
    Checkpoints,
    Force,
    Json,
    MaxAmplification,
    MaxError,
    ShardSize,
    Snapshots,
    Torchrun,
    bytes_of,
    checkpoints_of,
)
from polyak.cli._output import note_norms, number_text, print_json, print_table, progress_shown, say
from polyak.cli._torchrun import shared

if TYPE_CHECKING:
    from polyak.offline import Synthesis

_MOST = 10


def synthesize(
    rule: Annotated[str, typer.Option(metavar="SPEC", help="The average to make.")],
    folder: Snapshots = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="File *.safetensors, or folder for --shard-size."),
    ] = None,
    at: At = None,
    checkpoint: Checkpoints = [],  # noqa: B006  # typer makes a new one
    max_error: MaxError = 0.05,
    max_amplification: MaxAmplification = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print how exact it is.")] = False,
    shard_size: ShardSize = None,
    force: Force = False,
    torchrun: Torchrun = False,
    json: Json = False,
) -> None:
    """Make any average of a finished run from its snapshots.

    The relative error holds for a random walk, as a share of the average's distance from the live
    weights. The amplification, the sum of |coefficients|, multiplies the stored rounding.

    \b
    Examples:
      polyak synthesize snapshots --rule "power(relative_std=0.15)" --dry-run
      polyak synthesize snapshots --rule "uniform()" --at 1500 --out mean.safetensors --json
    """
    from polyak import norms, offline

    began, shard_bytes = time.monotonic(), bytes_of(shard_size)
    if out is None and not dry_run:
        raise ValueError("nothing to do: give --out, or --dry-run to see how exact it would be")
    if out is not None:
        refuse_existing(out, force)
    with shared(torchrun) as group:
        made = offline.synthesize(
            folder,
            rule,
            at,
            checkpoints=checkpoints_of(checkpoint),
            max_error=max_error,
            max_amplification=max_amplification,
        )
        if not json:
            _print(made)
        if out is not None and not dry_run:
            with progress_shown(f"writing {out}") as progress:
                made.save(
                    out, shard_bytes=shard_bytes, overwrite=force, progress=progress, group=group
                )
            note_norms(norms.statistics(made.model))
        written = {"out": None if dry_run else str(out), "seconds": time.monotonic() - began}
        if json:
            print_json({**made.as_dict(), **written})
        elif not dry_run:
            say(f"{out}: {written['seconds']:.1f} s")


def _print(made: Synthesis) -> None:
    say(f"{made}")
    say(f"half-life {number_text(made.half_life)}, mean age {number_text(made.mean_age)}\n")
    largest = sorted(made.terms, key=lambda term: -abs(term.coefficient))[:_MOST]
    rows = [
        (t.path.name, t.average, t.slot, f"{t.time:g}", f"{t.coefficient:.6g}") for t in largest
    ]
    print_table(("file", "average", "slot", "time", "coefficient"), rows, left=3)
    if len(made.terms) > _MOST:
        say(f"and {len(made.terms) - _MOST} smaller ones")
