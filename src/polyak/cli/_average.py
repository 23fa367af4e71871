"""`polyak average`: one file made from several."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from polyak._files import refuse_existing
from polyak.cli._options import (
    Dtype,
    Force,
    Json,
    ShardSize,
    Torchrun,
    bytes_of,
    dtype_of,
    numbers_of,
)
from polyak.cli._output import (
    note,
    note_norms,
    print_json,
    print_table,
    progress_shown,
    say,
    size_text,
)
from polyak.cli._torchrun import shared
from polyak.cli._users_function import Better, users_function

if TYPE_CHECKING:
    from polyak.offline import Combination
    from polyak.theory._profiles import Profile

Shape = Literal["sqrt", "linear", "cosine"]

_FEW = 20
_ROUNDING = 1e-9


def average(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Checkpoints, the oldest first."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="PATH", help="File *.safetensors, or folder for --shard-size.")
    ],
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
    better: Better = "lower",
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
    dtype: Dtype = None,
    accumulate: Annotated[
        str, typer.Option(metavar="DTYPE", help="Of the sums: float32 or float64.")
    ] = "float32",
    shard_size: ShardSize = None,
    force: Force = False,
    torchrun: Torchrun = False,
    json: Json = False,
) -> None:
    """Average checkpoint files of any format.

    The order counts; shells sort step-1000 before step-900.

    \b
    Examples:
      polyak average step-1.pt step-2.pt --out mean.safetensors --dtype bf16
      polyak average step-1.pt step-2.pt step-3.pt --out ema.safetensors --rule "exponential(0.9)"
      polyak average step-1.pt step-2.pt --out soup --greedy judge:loss --shard-size 2GB
    """
    from polyak import offline

    began = time.monotonic()
    refuse_existing(out, force)
    shard_bytes = bytes_of(shard_size)
    chosen = _chosen(len(files), rule, coefficients, wsm, qam, greedy)
    with shared(torchrun) as group:
        if group is not None and greedy is not None:
            raise ValueError("--greedy tries one model after the other: leave --torchrun out")
        made = offline.average(
            files,
            chosen if greedy is None else _soup(files, greedy, better, which),
            elapsed=_times(elapsed, len(files)),
            which=which,
            dtype=None if dtype is None else dtype_of(dtype),
            accumulate=dtype_of(accumulate, "--accumulate"),
        )
        _note_order(files, made)
        with progress_shown(f"writing {out}") as progress:
            made.write(
                out, shard_bytes=shard_bytes, overwrite=force, progress=progress, group=group
            )
        _print(files, made, out, time.monotonic() - began, json=json)


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
    files: Sequence[Path], name: str, better: Literal["lower", "higher"], which: str | None
) -> Profile:
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
    note(f"the mean of {len(soup.ingredients)} of {len(files)} files has quality {soup.quality:g}")
    return soup.coefficients


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


def _print(
    files: Sequence[Path], made: Combination, out: Path, seconds: float, *, json: bool
) -> None:
    size = sum(spec.nbytes for spec in made.specs.values())
    shares = made.coefficients.tolist()
    if json:
        about = {"out": str(out), "tensors": len(made), "bytes": size, "seconds": seconds}
        terms = [{"file": str(f), "coefficient": c} for f, c in zip(files, shares, strict=True)]
        print_json({**about, "norms": made.norms, "terms": terms})
    else:
        if len(files) <= _FEW:
            rows = [(str(f), f"{c:.6g}") for f, c in zip(files, shares, strict=True)]
            print_table(("file", "coefficient"), rows)
        done = f"{len(made)} tensors of {len(files)} files, {size_text(size)}, {seconds:.1f} s"
        say(f"{out}: {done}")
    note_norms(made.norms)
