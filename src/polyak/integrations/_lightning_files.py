"""The files of averages beside a Lightning checkpoint: `best.ckpt` has `best.ema.safetensors` beside it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

from polyak import checkpoints
from polyak.averager import Averager


def exported(checkpoint: Path | str, name: str) -> Path:
    """The file in which an average is exported."""
    return Path(f"{str(checkpoint).removesuffix('.ckpt')}.{name}.safetensors")


def parts(checkpoint: Path | str, names: Sequence[str]) -> Path:
    """The folder with the ranks' parts of sharded averages; `last.ckpt` may be a link to the checkpoint."""
    return exported(Path(checkpoint).resolve(), "+".join(names)).with_suffix(".averages")


def write(checkpoint: str, averager: Averager, *, first: bool) -> None:
    """Export every average; the first rank alone, or all ranks together if they are sharded."""
    if "://" in checkpoint:
        warnings.warn(
            f"{checkpoint} is not a local path: no average is written beside it", stacklevel=2
        )
        return
    names = list(averager.rules)
    if averager.sharded:
        checkpoints.save(parts(checkpoint, names), averager)
    if averager.clock.n and (averager.sharded or first):
        for name in names:
            checkpoints.export(exported(checkpoint, name), averager, name, overwrite=True)


def remove(checkpoint: Path | str, names: Sequence[str]) -> None:
    """Remove the files of a checkpoint that was removed."""
    for name in names:
        exported(checkpoint, name).unlink(missing_ok=True)
    shutil.rmtree(parts(checkpoint, names), ignore_errors=True)


def told(checkpoint: str, name: str) -> str:
    """What a checkpoint that was best by an average's metric holds, and where the average is."""
    return (
        f"{exported(checkpoint, name)} is the average that was best; {checkpoint} has the live "
        "weights of that step, and the averages' state"
    )
