"""`polyak synthesize`: any average of a finished run, from its snapshots."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from polyak._shown import number_text
from polyak.cli._averaged import note_faults
from polyak.cli._choosing import Wanted, stored
from polyak.cli._grouped import grouped
from polyak.cli._options import AllowNonfinite, Fitted, Json, Part, Snapshots, Writing, bytes_of
from polyak.cli._output import note_tied, print_json, print_table, progress_shown, say
from polyak.cli._torchrun import shared

if TYPE_CHECKING:
    from polyak.offline import Synthesis

_MOST = 10


@grouped
def synthesize(
    rule: Annotated[str, typer.Option(metavar="SPEC", help="The average to make.")],
    folder: Snapshots = None,
    *,
    writing: Writing,
    fitted: Fitted,
    wanted: Wanted,
    part: Part,
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
) -> None:
    """Make any average of a run from snapshots or checkpoints.

    \b
    Examples:
      polyak synthesize snapshots --rule "power(relative_std=0.15)" --dry-run
      polyak synthesize snapshots --rule "uniform()" --at 1500 --out m.safetensors
      polyak synthesize . --last 2 --rule "uniform()" --max-error 0.5 --dry-run
    """
    from polyak import offline

    began, out, shard_bytes = time.monotonic(), writing.place, bytes_of(writing.shard_size)
    with shared(writing.torchrun) as group:
        made = offline.synthesize(
            stored(folder, wanted, part), rule, read=part.reader(), **fitted.arguments()
        )
        if out is None:
            made.weights()  # refuses what cannot be averaged
        if not json:
            _print(made)
        if out is not None:
            with progress_shown(f"writing {out}") as progress:
                weights = made.save(
                    out,
                    shard_bytes=shard_bytes,
                    overwrite=writing.force,
                    allow_nonfinite=allow_nonfinite,
                    progress=progress,
                    group=group,
                )
            note_faults(weights)
            note_tied(weights)
        written = {"out": out and str(out), "seconds": time.monotonic() - began}
        if json:
            print_json({**made.as_dict(), **written})
        elif out is not None:
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
