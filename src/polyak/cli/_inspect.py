"""`polyak inspect`: what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak._checks import listed
from polyak._shown import size_text
from polyak.cli._grouped import grouped
from polyak.cli._options import Json, Part
from polyak.cli._output import from_live_text, left_text, note_norms, print_json, print_table, say

if TYPE_CHECKING:
    from polyak.checkpoints._open.files import Verified

_LARGEST = 5
_MOST = 10


@grouped
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A checkpoint, or a folder of snapshots.")
    ],
    *,
    part: Part,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List all tensors, not only the largest.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything and compare its checksums.")
    ] = False,
    json: Json = False,
) -> None:
    """List what a checkpoint holds: weights, averages, rules.

    It reads files of polyak and of other libraries, and runs no code from them.

    \b
    Examples:
      polyak inspect ema.pt --tensors
      polyak inspect snapshots --json
    """
    from polyak import offline

    found = path if part == Part() else part.reader(positions=True)(path)
    description = offline.describe(found, verify=verify)
    if json:
        print_json(description.as_dict())
        return
    for line in description.heading():
        say(line)
    averages, largest = description.tables()
    print_table(*averages)
    if not description.averages:
        say("no average")
    for name, average in description.averages.items():
        if average.from_live:
            say(from_live_text(name, average.from_live, average.weights.tensors))
    shown = largest.rows if tensors else largest.rows[:_LARGEST]
    more = "" if len(shown) == len(largest.rows) else "; --tensors lists all"
    say(f"\nlargest tensors, {len(shown)} of {len(largest.rows)}{more}")
    print_table(largest.header, shown, largest.left)
    if description.left:
        say(f"not used: {left_text(description.left)}")
    for name, reason in description.refused.items():
        say(f"{name} was not read: {reason}")
    if description.unfit:
        say(f"cannot be averaged: {description.unfit}")
    if aside := [f"{name} x{count}" for name, count in description.aside.items()]:
        say(f"objects that were not read: {listed(aside, _MOST)}")
    if description.verified is not None:
        say(f"verified: {_verified(description.verified)}")
    note_norms(description.norms)


def _verified(checked: Verified) -> str:
    """Describe the result of a comparison with checksums, and what it could not compare."""
    compared = f"{size_text(checked.compared)} fit their checksums"
    none = f"{size_text(checked.unchecked)} have no checksum, so damage there is not seen"
    parts = [compared] if checked.compared else ["headers and sizes fit"]
    return "; ".join([*parts, none] if checked.unchecked else parts)
