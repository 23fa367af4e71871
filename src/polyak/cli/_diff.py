"""`polyak diff`: how two checkpoints differ."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak._shown import number_text
from polyak.cli._commands import DIFFERENT
from polyak.cli._grouped import grouped
from polyak.cli._options import Json, Part
from polyak.cli._output import note, print_json, print_table, progress_shown, say

if TYPE_CHECKING:
    from polyak.checkpoints import Checkpoint
    from polyak.offline._comparison import Comparison, Difference

_MOST = 20


@grouped
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another checkpoint.")],
    average: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help='The average, or "live"; give it twice for A and B.',
            show_default="the live weights",
        ),
    ] = [],  # noqa: B006
    *,
    part: Part,
    all: Annotated[bool, typer.Option("--all", help="List equal tensors too.")] = False,
    json: Json = False,
) -> None:
    """Compare the tensors of two checkpoints.

    It compares names, dtypes, shapes, and numbers by |a - b| / |a|. --key and --prefix apply to
    the files that have such a part; a file without it is read whole.

    \b
    Example:
      polyak diff ema.pt ema.pt --average live --average average --json
    """
    from polyak import offline

    if len(average) > 2:
        raise ValueError(
            f"--average is given {len(average)} times, wanted once, or for A and for B"
        )
    of_a, of_b = (average[0], average[-1]) if average else (None, None)
    found_a, found_b = _parts((a, b), part)
    first, second = found_a.weights(of_a), found_b.weights(of_b)
    with progress_shown("comparing") as progress:
        compared = offline.compare(first, second, progress=progress)
    if json:
        print_json(compared.as_dict())
    else:
        _print(compared, all=all)
    if not compared.equal:
        raise typer.Exit(DIFFERENT)


def _parts(paths: tuple[Path, Path], part: Part) -> list[Checkpoint]:
    """The part of each checkpoint, or all of the one that has no such part."""
    whole = part._replace(key=None, prefix=None)
    found, errors = [], []
    for path in paths:
        try:
            found.append(part.reader(positions=True)(path))
        except ValueError as error:
            errors.append(error)
            with suppress(ValueError):  # the first error says more
                found.append(whole.reader(positions=True)(path))
    if len(errors) == len(paths) or len(found) < len(paths):
        raise errors[0]
    for problem in errors:
        note(f"{problem}: all of it is compared")
    return found


def _print(compared: Comparison, *, all: bool) -> None:
    shown = compared.tensors if all else compared.different[:_MOST]
    if compared.equal:
        say(f"equal: {len(compared.tensors)} tensors")
    else:
        counts = f"{len(compared.different)} of {len(compared.tensors)} tensors differ"
        say(f"{counts}; over all of them |a - b| / |a| = {number_text(compared.relative)}")
    if shown:
        header = ("tensor", "|a-b|/|a|", "largest |a-b|", "elements", "dtype", "shape")
        print_table(header, [_row(difference) for difference in shown])
    if len(shown) < len(compared.different):
        say(f"and {len(compared.different) - len(shown)} more; --all lists them")
    for label, names in (("A", compared.only_a), ("B", compared.only_b)):
        for name in names:
            say(f"only in {label}: {name}")


def _row(difference: Difference) -> tuple[str, ...]:
    dtypes, shapes = difference.dtypes, difference.shapes
    texts = ["x".join(map(str, shape)) or "scalar" for shape in shapes]
    return (
        difference.name,
        number_text(difference.relative),
        number_text(difference.largest),
        "-" if difference.elements is None else f"{difference.elements:,}",
        dtypes[0] if dtypes[0] == dtypes[1] else f"{dtypes[0]}, {dtypes[1]}",
        texts[0] if texts[0] == texts[1] else f"{texts[0]}, {texts[1]}",
    )
