"""The files of averages beside a Lightning checkpoint, such as `best.ema.safetensors` beside `best.ckpt`."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak import checkpoints
from polyak._checks import require
from polyak.averager import Averager
from polyak.integrations._states import file_name


def exported(checkpoint: Path | str, name: str) -> Path:
    """Return the file beside a checkpoint in which an average is exported."""
    path = Path(checkpoint)
    if path.is_symlink():  # `save_last="link"`: the averages are beside the checkpoint it names
        checkpoint = path.resolve()
    return Path(f"{str(checkpoint).removesuffix('.ckpt')}.{name}.safetensors")


def chosen(names: Sequence[str], name: str | None) -> str:
    """Return the name, or that of the only average; raises `ValueError` if there is no such average."""
    (found, *more) = names if name is None else [name]
    require(found in names and not more, "the average", name, f"one of {', '.join(names)}")
    return found


def parts(checkpoint: Path | str, names: Sequence[str]) -> Path:
    """The folder with the ranks' parts of sharded averages."""
    return exported(checkpoint, file_name(names)).with_suffix(".dcp")


def write(checkpoint: str, averager: Averager | None, *, first: bool) -> None:
    """Export every average; the first rank alone, or all ranks together if they are sharded."""
    if averager is None:
        return
    if "://" in checkpoint:
        warnings.warn(
            f"{checkpoint} is not a local path: no average is written beside it", stacklevel=2
        )
        return
    names = list(averager.rules)
    if averager.sharded:
        checkpoints.save(parts(checkpoint, names), averager, overwrite=True)
    if averager.clock.n and (averager.sharded or first):
        for name in names:
            checkpoints.export(exported(checkpoint, name), averager, name, overwrite=True)


def remove(checkpoint: Path | str, names: Sequence[str]) -> None:
    """Remove the files of a checkpoint that was removed."""
    for name in names:
        exported(checkpoint, name).unlink(missing_ok=True)
    shutil.rmtree(parts(checkpoint, names), ignore_errors=True)


def bests(callbacks: Sequence[Any], owners: Mapping[str, str]) -> Iterator[str]:
    """Lines that say which weights are best, for each checkpoint that is best by an average's metric.

    `owners` maps each metric that was logged of an average to the average.
    """
    for callback in callbacks:
        monitor = str(getattr(callback, "monitor", ""))
        checkpoint = getattr(callback, "best_model_path", "")
        metric = monitor.partition("/dataloader_idx_")[0]  # Lightning adds these two ends
        name = owners.get(metric, owners.get(metric.removesuffix("_epoch"), ""))
        if name and checkpoint:
            yield (
                f"best {monitor}: {exported(checkpoint, name)} is the average that was best; "
                f"{checkpoint} has the live weights of that step, and the averages' state"
            )
