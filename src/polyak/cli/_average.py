"""`polyak average`: one file made from several."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from polyak._files import refuse_existing
from polyak.cli._averaged import (
    dtypes_of,
    print_forecast,
    print_written,
    verified,
    write_like,
)
from polyak.cli._choosing import (
    Best,
    By,
    File,
    Last,
    Steps,
    TokensPerStep,
    Wanted,
    WindowTokens,
    in_order,
    require_chosen,
)
from polyak.cli._options import (
    As,
    Dtype,
    Force,
    Json,
    Key,
    Names,
    Prefix,
    ShardSize,
    Torchrun,
    bytes_of,
    dtype_of,
    numbers_of,
    reader,
)
from polyak.cli._output import (
    note,
    progress_shown,
)
from polyak.cli._torchrun import shared
from polyak.cli._users_function import Better, users_function

if TYPE_CHECKING:
    from polyak.checkpoints import Checkpoint
    from polyak.offline import Combination, Soup
    from polyak.theory._profiles import Profile

Shape = Literal["sqrt", "linear", "cosine"]

_ROUNDING = 1e-9


def average(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Checkpoints, or the folder of a run."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="File *.safetensors, or folder for --shard-size."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write in the form of this checkpoint: all but the weights is its own.",
        ),
    ] = None,
    last: Last = None,
    best: Best = None,
    by: By = None,
    steps: Steps = None,
    window_tokens: WindowTokens = None,
    tokens_per_step: TokensPerStep = None,
    file: File = None,
    rule: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Each file is one update.", show_default="uniform()"),
    ] = None,
    coefficients: Annotated[
        str | None, typer.Option(metavar="C,C,...", help="One a file, of sum 1.")
    ] = None,
    wsm: Annotated[
        Shape | None,
        typer.Option(help="Equivalent to a learning-rate decay (arXiv 2507.17634)."),
    ] = None,
    qam: Annotated[Shape | None, typer.Option(help="The same, for a quadratic loss.")] = None,
    greedy: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Keep the files that improve this function (greedy soup).",
        ),
    ] = None,
    better: Annotated[
        Better | None,
        typer.Option(
            help="Which quality is better.", show_default="lower, or usual for the name of --by"
        ),
    ] = None,
    elapsed: Annotated[
        str | None,
        typer.Option(metavar="T,T,...", help="Time between files."),
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
    key: Key = None,
    prefix: Prefix = None,
    names: Names = None,
    as_: As = None,
    dtype: Dtype = None,
    accumulate: Annotated[
        str, typer.Option(metavar="DTYPE", help="Of the sums: float32 or float64.")
    ] = "float32",
    allow_nonfinite: Annotated[
        bool,
        typer.Option("--allow-nonfinite", help="Average values that are infinite or NaN too."),
    ] = False,
    shard_size: ShardSize = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print files, coefficients, bytes and time.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare what was written with direct sums.")
    ] = False,
    force: Force = False,
    torchrun: Torchrun = False,
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

    began, shard_bytes = time.monotonic(), bytes_of(shard_size)
    if out is None and not dry_run:
        raise ValueError("nothing to do: give --out, or --dry-run to see what would be done")
    if out is not None:
        refuse_existing(out, force)
    if like is not None and (shard_size or dtype or torchrun):
        raise ValueError(
            "--like tells files and dtypes: leave --shard-size, --dtype, --torchrun out"
        )
    wanted = Wanted(last, best, by, better, steps, window_tokens, tokens_per_step, file)
    listed = coefficients is not None or (elapsed is not None and "," in elapsed)
    with shared(torchrun) as group:
        if group is not None and greedy is not None:
            raise ValueError("--greedy tries one model after the other: leave --torchrun out")
        chosen = _files(files, wanted, listed=listed)
        read = reader(key, prefix, names, as_)
        found = list(map(read, chosen))
        rule_or_shares = _chosen(len(chosen), rule, coefficients, wsm, qam, greedy)
        soup = None if greedy is None else _soup(found, greedy, better or "lower", which)
        made = offline.average(
            found,
            rule_or_shares if soup is None else soup.coefficients,
            elapsed=_times(elapsed, len(chosen)),
            which=which,
            dtype=dtypes_of(like, which, read) if dtype is None else dtype_of(dtype),
            accumulate=dtype_of(accumulate, "--accumulate"),
            allow_nonfinite=allow_nonfinite,
        )
        if listed:
            _note_order(chosen, made)
        if out is None or dry_run:
            print_forecast(chosen, made, soup, json=json)
            return
        with progress_shown(f"writing {out}") as progress:
            if like is None:
                made.write(
                    out, shard_bytes=shard_bytes, overwrite=force, progress=progress, group=group
                )
            else:
                write_like(out, like, made, which, read, overwrite=force, progress=progress)
        checked = verified(made, out, which, like, read) if verify else None
        print_written(chosen, made, soup, out, time.monotonic() - began, checked, json=json)


def _files(files: Sequence[Path], wanted: Wanted, *, listed: bool) -> Sequence[Path]:
    """The files that the options choose, or those that are listed, in order."""
    if wanted.some:
        return [file.path for file in wanted.of(files).files]
    if len(files) == 1 and files[0].is_dir():
        require_chosen(files[0])
    return files if listed else in_order(files)


def _chosen(
    files: int,
    rule: str | None,
    coefficients: str | None,
    wsm: Shape | None,
    qam: Shape | None,
    greedy: str | None,
) -> str | Sequence[float] | Profile:
    """The rule or the coefficients, from the one option that is given."""
    from polyak import theory

    given = {"rule": rule, "coefficients": coefficients, "wsm": wsm, "qam": qam, "greedy": greedy}
    names = [f"--{name}" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} each choose the coefficients: give one of them")
    if coefficients is not None:
        return numbers_of(coefficients, "--coefficients")
    if wsm is not None:
        return theory.wsm(theory.learning_rate_decay(wsm, files))
    if qam is not None:
        return theory.qam(theory.learning_rate_decay(qam, files))
    return "uniform()" if rule is None else rule


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


def _times(text: str | None, files: int) -> list[float] | None:
    if text is None:
        return None
    times = numbers_of(text, "--elapsed")
    return times * files if len(times) == 1 else times


def _note_order(files: Sequence[Path], made: Combination) -> None:
    """Warns if the numbers in the files' names descend, and the order of the files counts."""
    digits = [re.findall(r"\d+", file.stem) for file in files]
    numbers = [int(of_file[-1]) for of_file in digits if of_file]
    uneven = max(made.coefficients) - min(made.coefficients) > _ROUNDING
    if numbers != sorted(numbers) and uneven:
        note("the files' numbers do not ascend; give the oldest file first")
