"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from polyak._files import refuse_existing

if TYPE_CHECKING:
    import torch

    from polyak.checkpoints import Checkpoint

Source = Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint file or folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ChartFolder = Annotated[Path | None, typer.Option(help="Folder for a chart.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
ShardSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Write a folder of files up to this size (2GB, 1GiB)."),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="Dtype of the result: float64, float32, bf16 or fp16."),
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Accept infinite and NaN values.")
]
Snapshots = Annotated[
    Path | None,
    typer.Argument(
        metavar="FOLDER", help="Snapshots of polyak.Recorder, or a run.", show_default=False
    ),
]


class Part(NamedTuple):
    """Which part of a checkpoint is read, and what it is."""

    key: Annotated[
        str | None,
        typer.Option(metavar="KEYS", help="Read only this part of a file; dots join nested keys."),
    ] = None
    prefix: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Read only names that begin with TEXT, and remove TEXT."),
    ] = None
    names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text file of tensor names, if the checkpoint has none."),
    ] = None
    as_: Annotated[
        Literal["live", "average"] | None,
        typer.Option("--as", help="What the weights are, if the file does not say."),
    ] = None

    def reader(self, *, positions: bool = False) -> Callable[[Path], Checkpoint]:
        """`checkpoints.read` with these options.

        With `positions`, tensors without names are named by their positions if no names are given.
        """
        from functools import partial

        from polyak import checkpoints

        names = names_of(self.names) or ("positions" if positions else None)
        return partial(
            checkpoints.read, names=names, key=self.key, prefix=self.prefix, role=self.as_
        )


class Fitted(NamedTuple):
    """Options for the target of a fit, for the averages that it is made of, and for how well it must fit."""

    at: Annotated[
        float | None,
        typer.Option(
            metavar="TIME",
            help="The time of the average, in the run's unit.",
            show_default="the last snapshot",
        ),
    ] = None
    checkpoint: Annotated[
        list[str], typer.Option(metavar="TIME=FILE", help="Live weights at a step (repeatable).")
    ] = []  # typer makes a new one  # noqa: RUF012
    copy: Annotated[
        list[str],
        typer.Option(
            metavar="PATTERN",
            help="Tensors to take from the last file (repeatable); refused for snapshots.",
        ),
    ] = []  # noqa: RUF012
    max_error: Annotated[
        float,
        typer.Option(
            metavar="E", help="Refuse a larger relative error, expected on a random walk."
        ),
    ] = 0.05
    max_amplification: Annotated[
        float | None,
        typer.Option(
            metavar="A",
            help="Refuse a larger growth of rounding errors.",
            show_default="by the stored dtype",
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """These options as arguments of `offline.synthesize` and `offline.sweep`."""
        given = self._asdict()
        return {"checkpoints": checkpoints_of(given.pop("checkpoint")), **given}


class Writing(NamedTuple):
    """Where weights are written, and how."""

    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="File *.safetensors; with --shard-size, a folder."),
    ] = None
    shard_size: ShardSize = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; print what would be written.")
    ] = False
    force: Force = False
    torchrun: Annotated[
        bool, typer.Option("--torchrun", help="Share the work between the processes of torchrun.")
    ] = False

    @property
    def place(self) -> Path | None:
        """Where to write; None if nothing is to be written.

        Raises `ValueError` if nothing is to be done, and `FileExistsError` for what may not be replaced.
        """
        if self.out is None and not self.dry_run:
            raise ValueError("nothing to do: give --out, or --dry-run to see what would be done")
        if self.out is not None:
            refuse_existing(self.out, self.force)
        return None if self.dry_run else self.out


_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def given(options: Mapping[str, object]) -> str:
    """The options that have a value, as they are typed: "--key, --shard-size"; "" if none has one."""
    names = [name for name, value in options.items() if value is not None and value is not False]
    return ", ".join(f"--{name.strip('_').replace('_', '-')}" for name in names)


def dtype_of(text: str, option: str = "--dtype") -> torch.dtype:
    """The dtype with a name."""
    from polyak._dtypes import SLOT_DTYPES, dtype_name

    known = {dtype_name(dtype): dtype for dtype in SLOT_DTYPES}
    name = _DTYPES.get(text, text)
    if name not in known:
        raise ValueError(f"{option} is {text!r}, wanted one of {', '.join([*known, *_DTYPES])}")
    return known[name]


def bytes_of(text: str | None) -> int | None:
    """A size in bytes: "2GB" is 2 * 1000^3, "2GiB" is 2 * 1024^3; None for no text."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"--shard-size is {text!r}, wanted a size such as 2GB, 500MB or 1GiB")
    number, unit, binary = match[1], match[2].upper(), match[3]
    return int(float(number) * (1024 if binary else 1000) ** _UNITS[unit])


def numbers_of(text: str, option: str) -> list[float]:
    """Numbers between commas."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}, wanted numbers such as 0.2,0.3,0.5") from None


def counts_of(text: str, option: str) -> list[int]:
    """Integers above 0 between commas."""
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", text):
        raise ValueError(f"{option} is {text!r}, wanted integers above 0, such as 2,5,10")
    return [int(number) for number in text.split(",")]


def grid_of(text: str | None, option: str) -> list[float]:
    """LOW:HIGH:COUNT as numbers of four digits with equal quotients; none for no text."""
    if text is None:
        return []
    low, high, count = _grid_ends(text, option)
    shares = [i / max(count - 1, 1) for i in range(count)]
    return [float(f"{low * (high / low) ** share:.4g}") for share in shares]


def _grid_ends(text: str, option: str) -> tuple[float, float, int]:
    try:
        low, high, count = text.split(":")
        ends = float(low), float(high), int(count)
    except ValueError:
        ends = 0.0, 0.0, 0
    if not (0 < ends[0] <= ends[1] < float("inf") and 1 <= ends[2] <= 10_000):
        wanted = "LOW:HIGH:COUNT with 0 < LOW <= HIGH, such as 100:10000:12"
        raise ValueError(f"{option} is {text!r}, wanted {wanted}")
    return ends


def checkpoints_of(texts: list[str]) -> dict[int, Path]:
    """TIME=FILE as time -> file."""
    files: dict[int, Path] = {}
    for text in texts:
        time, _, file = text.partition("=")
        if not time.strip().isdecimal() or not file or int(time) in files:
            wanted = "TIME=FILE, such as 5000=step-5000.pt, each time once"
            raise ValueError(f"--checkpoint is {text!r}, wanted {wanted}")
        files[int(time)] = Path(file)
    return files


def names_of(file: Path | None) -> list[str] | None:
    """The lines of a text file, without spaces around them and without empty ones."""
    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file, wanted one name per line") from None
    return [line.strip() for line in lines if line.strip()]
