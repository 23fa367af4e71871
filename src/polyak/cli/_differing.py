"""`polyak diff`: how two checkpoints differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak.cli._commands import DIFFERENT
from polyak.cli._options import Json, Names, names_of
from polyak.cli._output import number_text, print_json, print_table, progress_shown, say

if TYPE_CHECKING:
    from polyak.checkpoints._checkpoint import Weights
    from polyak.offline._comparison import Comparison, Difference

_MOST = 20


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint that polyak reads.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    average: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help='The average to compare, or "live"; give it twice for that of A and that of B.',
            show_default="the live weights",
        ),
    ] = [],  # noqa: B006
    names: Names = None,
    all: Annotated[bool, typer.Option("--all", help="List all tensors, equal ones too.")] = False,
    json: Json = False,
) -> None:
    """How two checkpoints differ: names, dtypes, shapes, numbers.

    Formats may differ. Numbers are compared by |a - b| / |a|, tensor by tensor. Exit code 0: the same names, dtypes, shapes and numbers; 1: not so. One
    tensor of each is in memory at a time.

    \b
    Examples:
      polyak diff step-1.pt step-2.pt
      polyak diff ema.pt ema.pt --average live --average average --json
    """
    from polyak.offline._comparison import compare

    if len(average) > 2:
        raise ValueError(
            f"--average is given {len(average)} times, wanted once, or for A and for B"
        )
    of_a, of_b = (average[0], average[-1]) if average else (None, None)
    first, second = _weights(a, of_a, names), _weights(b, of_b, names)
    with progress_shown("comparing") as progress:
        found = compare(first, second, progress=progress)
    if json:
        print_json(found.as_dict())
    else:
        _print(found, all=all)
    if not found.equal:
        raise typer.Exit(DIFFERENT)


def _weights(path: Path, which: str | None, names: Path | None) -> Weights:
    from polyak import checkpoints

    return checkpoints.read(path, names_of(names) or "positions").weights(which)


def _print(found: Comparison, *, all: bool) -> None:
    shown = found.tensors if all else found.different[:_MOST]
    if found.equal:
        say(f"equal: {len(found.tensors)} tensors")
    else:
        counts = f"{len(found.different)} of {len(found.tensors)} tensors differ"
        say(f"{counts}; in all by |a - b| / |a| = {number_text(found.relative)}")
    if shown:
        header = ("tensor", "|a-b|/|a|", "largest |a-b|", "elements", "dtype", "shape")
        print_table(header, [_row(each) for each in shown])
    if len(shown) < len(found.different):
        say(f"and {len(found.different) - len(shown)} more; --all lists them")
    for label, names in (("A", found.only_a), ("B", found.only_b)):
        for name in names:
            say(f"only in {label}: {name}")


def _row(each: Difference) -> tuple[str, ...]:
    dtypes, shapes = each.dtypes, each.shapes
    texts = ["x".join(map(str, shape)) or "scalar" for shape in shapes]
    return (
        each.name,
        number_text(each.relative),
        number_text(each.largest),
        "-" if each.elements is None else f"{each.elements:,}",
        dtypes[0] if dtypes[0] == dtypes[1] else f"{dtypes[0]}, {dtypes[1]}",
        texts[0] if texts[0] == texts[1] else f"{texts[0]}, {texts[1]}",
    )
