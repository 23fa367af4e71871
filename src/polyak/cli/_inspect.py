"""`polyak inspect`: what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak.cli._grouped import grouped
from polyak.cli._options import Json, Part
from polyak.cli._output import (
    left_text,
    note_norms,
    number_text,
    print_json,
    print_table,
    say,
    size_text,
)

if TYPE_CHECKING:
    from polyak.checkpoints._open_file import Verified
    from polyak.offline import Description
    from polyak.offline._description import DescribedAverage, Weighed

_LARGEST = 5
_MOST = 10


@grouped
def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A checkpoint, or a folder of snapshots."),
    ],
    *,
    part: Part,
    tensors: Annotated[bool, typer.Option("--tensors", help="List all tensors.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare all checksums.")] = False,
    json: Json = False,
) -> None:
    """List what a checkpoint holds: weights, averages, rules.

    It reads the files of polyak and of other libraries, safetensors, torch.save and
    torch.distributed.checkpoint, and runs no code from them.

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
    say(_headline(description))
    _print_weights(description)
    _print_tensors(description, all=tensors)
    if description.left:
        say(f"left aside: {left_text(description.left)}")
    for name, reason in description.refused.items():
        say(f"{name} was not read: {reason}")
    if description.unfit:
        say(f"cannot be averaged: {description.unfit}")
    _print_aside(description)
    if description.verified is not None:
        say(f"verified: {_verified(description.verified)}")
    note_norms(description.norms)


def _headline(description: Description) -> str:
    clock = "" if description.count is None else f", {description.count:,} {_unit(description)}"
    line = f"{description.path}: {description.format}{clock}"
    if description.recorded is None:
        return line
    run = description.recorded
    return (
        f"{line}; {run.snapshots} snapshots of run {run.run}, at times {run.first:g} to "
        f"{run.last:g}, {size_text(run.bytes)}"
    )


def _unit(description: Description) -> str:
    return "units of time" if description.unit == "time" else str(description.unit)


def _print_weights(description: Description) -> None:
    header = ("", "rule", "half-life", "mean age", "tensors", "parameters", "size", "dtypes")
    live = (
        []
        if description.live is None
        else [("live weights", "-", "-", "-", *_numbers(description.live))]
    )
    averages = [(name, *_of_average(average)) for name, average in description.averages.items()]
    print_table(header, [*live, *averages], left=2)
    if not averages:
        say("no average")


def _of_average(average: DescribedAverage) -> tuple[str, str, str, str, str, str, str]:
    ages = number_text(average.half_life), number_text(average.mean_age)
    return average.rule or "unknown", *ages, *_numbers(average.weights)


def _numbers(weights: Weighed) -> tuple[str, str, str, str]:
    dtypes = weights.dtypes
    shown = ", ".join(d if len(dtypes) == 1 else f"{d} x {n}" for d, n in dtypes.items())
    return f"{weights.tensors:,}", f"{weights.parameters:,}", size_text(weights.bytes), shown


def _print_tensors(description: Description, *, all: bool) -> None:
    shown = description.tensors if all else description.tensors[:_LARGEST]
    more = "" if len(shown) == len(description.tensors) else "; --tensors lists all"
    say(f"\nlargest tensors, {len(shown)} of {len(description.tensors)}{more}")
    rows = [
        (t.name, "x".join(map(str, t.shape)) or "scalar", t.dtype, size_text(t.bytes))
        for t in shown
    ]
    print_table(("name", "shape", "dtype", "size"), rows)


def _verified(checked: Verified) -> str:
    """What a comparison with checksums found, and what it could not find."""
    compared = f"{size_text(checked.compared)} fit their checksums"
    none = f"{size_text(checked.unchecked)} have no checksum, so damage there is not seen"
    told = [compared] if checked.compared else ["headers and sizes fit"]
    return "; ".join([*told, none] if checked.unchecked else told)


def _print_aside(description: Description) -> None:
    """The objects beside the weights that were not read, since reading them would run code."""
    names = [f"{name} x{count}" for name, count in description.aside.items()]
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    if names:
        say(f"objects that were not read: {', '.join(names[:_MOST])}{more}")
