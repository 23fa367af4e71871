"""`polyak average`: one file made from several."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from polyak.cli._adapters import concatenated
from polyak.cli._averaged import Averaged, Form
from polyak.cli._choosing import Wanted, in_order, require_chosen
from polyak.cli._grouped import grouped
from polyak.cli._options import AllowNonfinite, Dtype, Json, Part, Writing, bytes_of, dtype_of
from polyak.cli._output import note, progress_shown
from polyak.cli._shares import Shares
from polyak.cli._torchrun import shared
from polyak.cli._users_function import Better, users_function

if TYPE_CHECKING:
    import torch

    from polyak.checkpoints import Checkpoint
    from polyak.offline import Combination, Soup

_ROUNDING = 1e-9


@grouped
def average(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Checkpoints, or the folder of a run.")
    ],
    *,
    writing: Writing,
    like: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a copy of this checkpoint with other weights."),
    ] = None,
    wanted: Wanted,
    shares: Shares,
    better: Annotated[
        Better | None,
        typer.Option(
            help="Which quality is better.",
            show_default="lower, or what --by suggests",
        ),
    ] = None,
    which: Annotated[
        str | None,
        typer.Option(
            "--average",
            metavar="NAME",
            help='The average in each file, or "live".',
            show_default="the live weights",
        ),
    ] = None,
    copy: Annotated[
        list[str],
        typer.Option(metavar="PATTERN", help="Tensors to take from the last file (repeatable)."),
    ] = [],  # noqa: B006
    part: Part,
    lora: Annotated[
        Literal["concatenate"] | None,
        typer.Option(help="Average PEFT adapters into one whose rank is the sum of theirs."),
    ] = None,
    dtype: Dtype = None,
    accumulate: Annotated[
        str, typer.Option(metavar="DTYPE", help="Dtype of the sums: float32 or float64.")
    ] = "float32",
    allow_nonfinite: AllowNonfinite = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the result back and check it by direct sums.")
    ] = False,
    json: Json = False,
) -> None:
    """Average checkpoint files, or chosen checkpoints of a run.

    Files are sorted by the steps in their names or contents, except with --coefficients or several
    --elapsed.

    \b
    Examples:
      polyak average . --last 2 --dry-run --rule "exponential(0.5)"
      polyak average . --steps 1:2 --like step-3.pt --out mean.pt --verify
      polyak average step-1.pt step-2.pt --out mean.safetensors --dtype bf16
      polyak average step-1.pt step-2.pt --out a.safetensors --rule "exponential(0.9)"
      polyak average step-1.pt step-2.pt --out soup.safetensors --greedy judge:loss
    """
    from polyak import offline

    began, out, read = time.monotonic(), writing.place, part.reader()
    _require_together(like, shares, dtype, writing)
    with shared(writing.torchrun) as group:
        chosen = _files(files, wanted, shares, better)
        rule, elapsed = shares.of(len(chosen)), shares.times(len(chosen))
        if lora is not None:
            named: dict[str, object] = {"like": like, "greedy": shares.greedy, "average": which}
            named |= {"better": None if wanted.best else better, **part._asdict(), "dtype": dtype}
            named |= {"allow-nonfinite": allow_nonfinite, "verify": verify, "copy": copy or None}
            named |= {"shard-size": writing.shard_size, "torchrun": writing.torchrun}
            concatenated(chosen, rule, elapsed, writing, named, json=json)
            return
        found, soup = list(map(read, chosen)), None
        form = None if like is None else Form(like, which, read)
        dtypes, sums = _dtype(dtype, form), dtype_of(accumulate, "--accumulate")
        if shares.greedy is not None:
            soup = _soup(found, shares.greedy, better or "lower", which, copy)
        made = offline.average(
            found,
            rule if soup is None else soup.coefficients,
            elapsed=elapsed,
            which=which,
            copy=copy,
            dtype=dtypes,
            accumulate=sums,
            allow_nonfinite=allow_nonfinite,
        )
        if shares.listed:
            _note_order(chosen, made)
        averaged = Averaged(chosen, made, soup)
        if out is None:
            averaged.print_forecast(json=json)
            return
        averaged.write(writing, form, group)
        checked = averaged.verified(out, form) if verify else None
        averaged.print_written(out, time.monotonic() - began, checked, json=json)


def _require_together(
    like: Path | None, shares: Shares, dtype: str | None, writing: Writing
) -> None:
    """Raise `ValueError` for options that exclude each other, and for a text that is not a size."""
    bytes_of(writing.shard_size)
    if like is not None and (writing.shard_size or dtype or writing.torchrun):
        raise ValueError(
            "--like gives files and dtypes: leave --shard-size, --dtype, --torchrun out"
        )
    if writing.torchrun and shares.greedy is not None:
        raise ValueError("--greedy tries one model after the other: leave --torchrun out")


def _dtype(dtype: str | None, form: Form | None) -> torch.dtype | dict[str, torch.dtype] | None:
    """The dtype of the result; by default that of the files, or of the checkpoint that it resembles."""
    if dtype is not None:
        return dtype_of(dtype)
    return None if form is None else form.dtypes()


def _files(
    files: Sequence[Path], wanted: Wanted, shares: Shares, better: Better | None
) -> Sequence[Path]:
    """The files that the options choose, or those that are listed, in order."""
    if wanted.some:
        choice = wanted.of(files, better, judged=shares.greedy is not None)
        return [file.path for file in choice.files]
    if len(files) == 1 and files[0].is_dir():
        require_chosen(files[0])
    return files if shares.listed else in_order(files)


def _soup(
    files: Sequence[Checkpoint],
    name: str,
    better: Better,
    which: str | None,
    copy: Sequence[str],
) -> Soup:
    from polyak import offline

    trials = 2 * len(files) - 1
    with users_function(name) as function, progress_shown("trials", bytes=False) as show:
        done = iter(range(1, trials + 1))
        soup = offline.greedy_soup(
            files,
            function,
            better=better,
            which=which,
            copy=copy,
            progress=lambda *_: show and show(next(done), trials),
        )
    last, best = soup.qualities[-1], soup.qualities[soup.order[0]]
    note(
        f"the mean of {len(soup.ingredients)} of {len(files)} files has quality {soup.quality:g}; the best "
        f"single file has {best:g}, the last {last:g}"
    )
    return soup


def _note_order(files: Sequence[Path], made: Combination) -> None:
    """Warns if the numbers in the files' names descend, and the order of the files counts."""
    digits = [re.findall(r"\d+", file.stem) for file in files]
    numbers = [int(of_file[-1]) for of_file in digits if of_file]
    uneven = max(made.coefficients) - min(made.coefficients) > _ROUNDING
    if numbers != sorted(numbers) and uneven:
        note("the files' numbers do not ascend; give the oldest file first")
