"""`polyak export` and `polyak convert`: weights as plain safetensors, averages as our own file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyak._shown import size_text
from polyak.cli._grouped import grouped
from polyak.cli._options import Dtype, Force, Json, Part, ShardSize, Source, bytes_of, dtype_of
from polyak.cli._output import (
    from_live_text,
    note,
    note_left,
    note_norms,
    note_tied,
    print_json,
    progress_shown,
    say,
)
from polyak.rules import LIVE

if TYPE_CHECKING:
    from polyak.checkpoints import Checkpoint


@grouped
def export(
    file: Source,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="File *.safetensors; with --shard-size, a folder.")
    ],
    average: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help='The average, or "live".', show_default="the only average"
        ),
    ] = None,
    *,
    part: Part,
    dtype: Dtype = None,
    shard_size: ShardSize = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an average as plain safetensors, for from_pretrained.

    Tensors get the dtypes of FILE's live weights, if it has them. Tied weights are written once.

    \b
    Examples:
      polyak export average.safetensors model --dtype bf16 --shard-size 5GB
      polyak export ema.pt live.safetensors --average live
    """
    from polyak import checkpoints

    checkpoint = part.reader()(file)
    with progress_shown(f"writing {out}") as progress:
        checkpoints.export(
            out,
            checkpoint,
            average,
            dtype=None if dtype is None else dtype_of(dtype),
            shard_bytes=bytes_of(shard_size),
            overwrite=force,
            progress=progress,
        )
    written = average or next(iter(checkpoint.averages))
    _print(out, checkpoint, json=json, average=written)
    note_tied(checkpoint.weights(written))
    note_left(checkpoint.unused(written))
    _note_averages(checkpoint, [written])


@grouped
def convert(
    file: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    *,
    part: Part,
    rule: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]SPEC", help="The rule of the training, if FILE does not say."),
    ] = [],  # noqa: B006
    count: Annotated[
        int | None, typer.Option(metavar="N", help="Updates so far, if FILE does not say.")
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(metavar="N", help="Calls per update, if FILE counts calls (ema-pytorch)."),
    ] = None,
    copy: Annotated[
        list[str], typer.Option(metavar="PATTERN", help="Buffers to copy instead of averaging.")
    ] = [],  # noqa: B006
    force: Force = False,
    json: Json = False,
) -> None:
    """Write another library's averages as a polyak file.

    \b
    Example:
      polyak convert ema.pt ours.safetensors --rule "exponential(0.99)" --count 2000
    """
    from polyak import checkpoints

    checkpoint = checkpoints.convert(
        part.reader()(file),
        out,
        _rules(rule),
        count=count,
        every=every,
        copied=copy,
        overwrite=force,
    )
    _print(out, checkpoint, json=json, averages=list(checkpoint.averages))
    note_left(checkpoint.left)
    _note_averages(checkpoint, checkpoint.averages)


def _rules(texts: list[str]) -> str | dict[str, str] | None:
    """[NAME=]SPEC: the one rule, or those of averages by name."""
    named = [re.fullmatch(r"([^(=]+)=(.*)", text) for text in texts]
    if len(texts) == 1 and named[0] is None:
        return texts[0]
    rules = {match[1]: match[2] for match in named if match}
    if len(rules) < len(texts):
        raise ValueError(
            f"--rule is {', '.join(texts)}: wanted one SPEC, or NAME=SPEC once for each average"
        )
    return rules or None


def _print(out: Path, checkpoint: Checkpoint, *, json: bool, **about: Any) -> None:
    """Print what was written, and the size of the file or folder."""
    files = [out] if out.is_file() else sorted(out.iterdir())
    size = sum(file.stat().st_size for file in files)
    if json:
        print_json({"out": str(out), "from": checkpoint.format, **about, "bytes": size})
    else:
        say(f"{out}: {size_text(size)}, from a file of the format {checkpoint.format}")


def _note_averages(checkpoint: Checkpoint, averages: Iterable[str]) -> None:
    """Which tensors of averages are live weights, and which norms should be estimated again."""
    from polyak import norms

    names: set[str] = set()
    for average in averages:
        if average != LIVE:
            names |= set(weights := checkpoint.average(average))
            if tensors := checkpoint.from_live(average):
                note(from_live_text(average, tensors, len(weights)))
    note_norms(norms.statistics(names))
