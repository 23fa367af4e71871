"""`polyak inspect`: what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak.cli._options import Json
from polyak.cli._output import note_norms, number_text, print_json, print_table, say, size_text

if TYPE_CHECKING:
    from polyak.offline import Description
    from polyak.offline._description import DescribedAverage, Weighed

_LARGEST = 5


def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A checkpoint, or a folder of snapshots."),
    ],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List all tensors, not only the largest.")
    ] = False,
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

    found = offline.describe(path)
    if json:
        print_json(found.as_dict())
        return
    say(_headline(found))
    _print_weights(found)
    _print_tensors(found, all=tensors)
    note_norms(found.norms)


def _headline(found: Description) -> str:
    clock = "" if found.count is None else f", {found.count:,} {_unit(found)}"
    line = f"{found.path}: {found.format}{clock}"
    if found.recorded is None:
        return line
    run = found.recorded
    return (
        f"{line}; {run.snapshots} snapshots of run {run.run}, at times {run.first:g} to "
        f"{run.last:g}, {size_text(run.bytes)}"
    )


def _unit(found: Description) -> str:
    return "units of time" if found.unit == "time" else str(found.unit)


def _print_weights(found: Description) -> None:
    header = ("", "rule", "half-life", "mean age", "tensors", "parameters", "size", "dtypes")
    live = [] if found.live is None else [("live weights", "-", "-", "-", *_numbers(found.live))]
    averages = [(name, *_of_average(average)) for name, average in found.averages.items()]
    print_table(header, [*live, *averages], left=2)
    if not averages:
        say("no average")


def _of_average(average: DescribedAverage) -> tuple[str, str, str, str, str, str, str]:
    ages = number_text(average.half_life), number_text(average.mean_age)
    return average.rule or "not told", *ages, *_numbers(average.weights)


def _numbers(weights: Weighed) -> tuple[str, str, str, str]:
    dtypes = weights.dtypes
    shown = ", ".join(d if len(dtypes) == 1 else f"{d} x {n}" for d, n in dtypes.items())
    return f"{weights.tensors:,}", f"{weights.parameters:,}", size_text(weights.bytes), shown


def _print_tensors(found: Description, *, all: bool) -> None:
    shown = found.tensors if all else found.tensors[:_LARGEST]
    more = "" if len(shown) == len(found.tensors) else "; --tensors lists all"
    say(f"\nlargest tensors, {len(shown)} of {len(found.tensors)}{more}")
    rows = [
        (t.name, "x".join(map(str, t.shape)) or "scalar", t.dtype, size_text(t.bytes))
        for t in shown
    ]
    print_table(("name", "shape", "dtype", "size"), rows)
