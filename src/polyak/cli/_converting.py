"""`polyak export` and `polyak convert`: a checkpoint's weights as plain safetensors, or as our own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from polyak.cli._options import Dtype, Force, Json, Names, ShardSize, bytes_of, dtype_of, names_of
from polyak.cli._output import note_norms, print_json, progress_shown, say, size_text

if TYPE_CHECKING:
    from polyak.checkpoints import Checkpoint

Source = Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint that polyak reads.")]
Average = Annotated[
    str | None,
    typer.Option(
        "--average", metavar="NAME", help="The average's name.", show_default="the only one"
    ),
]


def export(
    file: Source,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The file *.safetensors to write; with --shard-size a folder."
        ),
    ],
    average: Average = None,
    names: Names = None,
    dtype: Dtype = None,
    shard_size: ShardSize = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """An average as plain safetensors, with its model's names and dtypes.

    from_pretrained of transformers and diffusers, and safetensors.torch.load_model, load it. The
    dtypes are those of the live weights in the file, where it tells. Tied weights are there once.

    \b
    Examples:
      polyak export average.safetensors model.safetensors
      polyak export average.safetensors model --dtype bf16 --shard-size 5GB
    """
    from polyak import checkpoints

    found = checkpoints.read(file, names_of(names))
    with progress_shown(f"writing {out}") as progress:
        checkpoints.export(
            out,
            found,
            average,
            dtype=None if dtype is None else dtype_of(dtype),
            shard_bytes=bytes_of(shard_size),
            overwrite=force,
            progress=progress,
        )
    _print(out, found, json=json)


def convert(
    file: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file *.safetensors to write.")],
    to: Annotated[
        Literal["safetensors", "ours"],
        typer.Option(
            help="Weights alone, in their own dtypes; or our own format, from which training goes on."
        ),
    ],
    average: Average = None,
    live: Annotated[bool, typer.Option("--live", help="Write the live weights.")] = False,
    names: Names = None,
    rule: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]SPEC",
            help="Of an average whose rule the file does not tell, as it was in training.",
        ),
    ] = [],  # noqa: B006
    count: Annotated[
        int | None, typer.Option(metavar="N", help="Updates so far, where the file does not tell.")
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Calls per update, for a file that counts calls (ema-pytorch)."
        ),
    ] = None,
    copy: Annotated[
        list[str],
        typer.Option(
            metavar="PATTERN",
            help="Names of buffers that polyak copies: all of floats but running statistics.",
        ),
    ] = [],  # noqa: B006
    force: Force = False,
    json: Json = False,
) -> None:
    """Another library's file as plain safetensors, or as polyak's own.

    With --to safetensors it is the average, or with --live the live weights. With --to ours it is all
    averages with rules and clock; polyak.load reads most libraries' files itself, so this is for
    files that are to be without that library.

    \b
    Examples:
      polyak convert ema.pt plain.safetensors --to safetensors
      polyak convert ema.pt live.safetensors --to safetensors --live
      polyak convert ema.pt ours.safetensors --to ours --rule "exponential(0.99)" --count 2000
    """
    if to == "ours":
        _refuse("--to ours writes all averages", average=average, live=live)
        found = _to_ours(file, out, names_of(names), rule, count, every, copy, force)
    else:
        why = "--to safetensors writes weights alone"
        _refuse(why, rule=rule, count=count, every=every, copy=copy)
        found = _to_plain(file, out, names_of(names), average, live, force)
    _print(out, found, json=json)


def _refuse(why: str, **given: object) -> None:
    """Refuses options that would do nothing."""
    if names := [f"--{name}" for name, value in given.items() if value not in (None, False, [])]:
        raise ValueError(f"{why}: leave out {', '.join(names)}")


def _to_ours(
    file: Path,
    out: Path,
    names: list[str] | None,
    rules: list[str],
    count: int | None,
    every: int | None,
    copied: list[str],
    force: bool,
) -> Checkpoint:
    from polyak.checkpoints._convert import convert

    return convert(
        file,
        out,
        _rules(rules),
        names=names,
        count=count,
        every=every,
        copied=copied,
        overwrite=force,
    )


def _rules(texts: list[str]) -> str | dict[str, str] | None:
    """[NAME=]SPEC: the one rule, or those of averages by name."""
    named = [re.fullmatch(r"([^(=]+)=(.*)", text) for text in texts]
    if len(texts) == 1 and named[0] is None:
        return texts[0]
    rules = {match[1]: match[2] for match in named if match}
    if len(rules) < len(texts):
        raise ValueError(
            f"--rule is {', '.join(texts)}: of several, each is NAME=SPEC, once a name"
        )
    return rules or None


def _to_plain(
    file: Path, out: Path, names: list[str] | None, average: str | None, live: bool, force: bool
) -> Checkpoint:
    from polyak import checkpoints
    from polyak.checkpoints._export import distinct
    from polyak.checkpoints._writing import write
    from polyak.rules import LIVE

    if live and average is not None:
        raise ValueError("--live and --average are different weights: give one")
    found = checkpoints.read(file, names)
    which = LIVE if live else average
    weights = found.average(which) if found.averages and not live else found.weights(which)
    forms = distinct(found, weights)
    with progress_shown(f"writing {out}") as progress:
        write(out, forms, lambda name: [weights[name]], overwrite=force, progress=progress)
    return found


def _print(out: Path, found: Checkpoint, *, json: bool) -> None:
    """What was written; a file's or a folder's size."""
    from polyak import norms

    files = [out] if out.is_file() else sorted(out.iterdir())
    size = sum(each.stat().st_size for each in files)
    about = {"out": str(out), "from": found.format, "averages": list(found.averages), "bytes": size}
    if json:
        print_json(about)
    else:
        say(f"{out}: from {found.format}, {size_text(size)}")
    note_norms(norms.statistics({n for weights in found.averages.values() for n in weights}))
