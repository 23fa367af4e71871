"""`polyak average`: one file made from several."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from polyak.cli._adapters import concatenated
from polyak.cli._averaged import (
    dtypes_of,
    print_forecast,
    print_written,
    verified,
    write_like,
)
from polyak.cli._choosing import Wanted, in_order, require_chosen
from polyak.cli._grouped import grouped
from polyak.cli._options import (
    AllowNonfinite,
    Dtype,
    Json,
    Part,
    Writing,
    bytes_of,
    dtype_of,
)
from polyak.cli._output import (
    note,
    progress_shown,
)
from polyak.cli._shares import Shares
from polyak.cli._torchrun import shared
from polyak.cli._users_function import Better, users_function

if TYPE_CHECKING:
    from polyak.checkpoints import Checkpoint
    from polyak.offline import Combination, Soup

_ROUNDING = 1e-9


@grouped
def average(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Checkpoints, or the folder of a run."),
    ],
    *,
    writing: Writing,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write in the form of this checkpoint: all but the weights is its own.",
        ),
    ] = None,
    wanted: Wanted,
    shares: Shares,
    better: Annotated[
        Better | None,
        typer.Option(
            help="Which quality is better.", show_default="lower, or usual for the name of --by"
        ),
    ] = None,
    which: Annotated[
        str | None,
        typer.Option(
            "--average",
            metavar="NAME",
            help='The average to take from each file, or "live".',
            show_default="the live weights",
        ),
    ] = None,
    part: Part,
    lora: Annotated[
        Literal["concatenate"] | None,
        typer.Option(
            help="Average adapters of PEFT as one adapter, whose rank is the sum of theirs."
        ),
    ] = None,
    dtype: Dtype = None,
    accumulate: Annotated[
        str, typer.Option(metavar="DTYPE", help="Of the sums: float32 or float64.")
    ] = "float32",
    allow_nonfinite: AllowNonfinite = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare what was written with direct sums.")
    ] = False,
    json: Json = False,
) -> None:
    """Average checkpoint files of any format, or chosen ones of a run.

    They are taken in the order of the steps in their names or files. With --coefficients or several
    --elapsed they are taken as listed.

    \b
    Examples:
      polyak average . --last 2 --dry-run --rule "exponential(0.5)"
      polyak average . --steps 1:2 --like step-3.pt --out mean.pt --verify
      polyak average step-1.pt step-2.pt --out mean.safetensors --dtype bf16
      polyak average step-1.pt step-2.pt step-3.pt --out ema.safetensors --rule "exponential(0.9)"
      polyak average step-1.pt step-2.pt --out soup --greedy judge:loss --shard-size 2GB
    """
    from polyak import offline

    began, out, shard_bytes = time.monotonic(), writing.place, bytes_of(writing.shard_size)
    if like is not None and (writing.shard_size or dtype or writing.torchrun):
        raise ValueError(
            "--like tells files and dtypes: leave --shard-size, --dtype, --torchrun out"
        )
    with shared(writing.torchrun) as group:
        if group is not None and shares.greedy is not None:
            raise ValueError("--greedy tries one model after the other: leave --torchrun out")
        chosen = _files(files, wanted, shares, better)
        if lora is not None:
            others: dict[str, object] = {
                "like": like,
                "greedy": shares.greedy,
                "better": better if wanted.best is None else None,
                "average": which,
                **part._asdict(),
                "dtype": dtype,
                "allow-nonfinite": allow_nonfinite or None,
                "shard-size": shard_bytes,
                "verify": verify or None,
                "torchrun": group,
            }
            concatenated(chosen, shares, writing, others, json=json)
            return
        read = part.reader()
        found = list(map(read, chosen))
        rule_or_shares = shares.of(len(chosen))
        soup = None
        if shares.greedy is not None:
            soup = _soup(found, shares.greedy, better or "lower", which)
        made = offline.average(
            found,
            rule_or_shares if soup is None else soup.coefficients,
            elapsed=shares.times(len(chosen)),
            which=which,
            dtype=dtypes_of(like, which, read) if dtype is None else dtype_of(dtype),
            accumulate=dtype_of(accumulate, "--accumulate"),
            allow_nonfinite=allow_nonfinite,
        )
        if shares.listed:
            _note_order(chosen, made)
        if out is None:
            print_forecast(chosen, made, soup, json=json)
            return
        force = writing.force
        with progress_shown(f"writing {out}") as progress:
            if like is None:
                made.write(
                    out, shard_bytes=shard_bytes, overwrite=force, progress=progress, group=group
                )
            else:
                write_like(out, like, made, which, read, overwrite=force, progress=progress)
        checked = verified(made, out, which, like, read) if verify else None
        print_written(chosen, made, soup, out, time.monotonic() - began, checked, json=json)


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
    files: Sequence[Checkpoint], name: str, better: Literal["lower", "higher"], which: str | None
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
