"""Exporting: an average as plain safetensors, under the names and in the dtypes of its model."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from polyak.averager import Averager
from polyak.checkpoints import writing
from polyak.checkpoints.checkpoint import Checkpoint, Weights
from polyak.checkpoints.tensorfile import Form, form, forms, narrowed
from polyak.checkpoints.ties import distinct
from polyak.sharding import require_whole


def export(
    path: Path | str,
    source: Averager | Checkpoint,
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Writes an average as plain safetensors: the model's own names and dtypes, tied weights once.

    `safetensors.torch.load_model` loads it; so do `from_pretrained` of transformers and diffusers
    from a folder with the model's config, under the names that they look for: `model.safetensors`,
    `diffusion_pytorch_model.safetensors`. What is not averaged comes from the model as it is now;
    buffers that their module does not save are left out.

    Args:
        source: an averager, or what `checkpoints.read` found in a file: there the dtypes are those of
            the live weights in the file, where it tells.
        name: of the average, where there are several.
        dtype: of floating-point tensors, if not the model's.
        shard_bytes: `path` is then a folder of files of at most so many bytes, with an index.
        progress: is told how many bytes are written, and of how many.

    >>> import tempfile
    >>> from safetensors.torch import load_model
    >>> model, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    >>> averager = Averager(model, "uniform()")
    >>> averager.update()
    >>> place = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> export(place, averager)
    >>> load_model(other, place)
    (set(), [])
    >>> torch.equal(other.weight, model.weight)
    True

    One tensor is held at a time. Raises `RuntimeError` before the first update and inside
    `applied()`, `ValueError` for a sharded model, `FileExistsError` for a path that exists, unless
    `overwrite`.
    """
    if isinstance(source, Averager):
        model, weights = _of_averager(source, name)
    elif isinstance(source, Checkpoint):
        model, weights = _of_checkpoint(source, name)
    else:
        got = type(source).__name__
        raise TypeError(f"export: got {got}, wanted a polyak.Averager or a Checkpoint")
    wanted = {each: Form(_as(dtype, held.dtype), held.shape) for each, held in model.items()}
    writing.write(
        path,
        wanted,
        lambda each: [narrowed(each, weights[each].detach(), wanted[each].dtype)],
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def _of_averager(averager: Averager, name: str | None) -> tuple[dict[str, Form], Weights]:
    """The forms of all that the model saves, tied weights once; the average, or what is live."""
    tracked = [item for item in averager.tracked if item.persistent]
    live = {item.name: item.held() for item in tracked}
    require_whole("export", live)
    return {n: form(tensor) for n, tensor in live.items()}, ChainMap(
        cast(Any, averager.weights(name)), live
    )


def _of_checkpoint(found: Checkpoint, name: str | None) -> tuple[dict[str, Form], Weights]:
    """The forms of an average's tensors in the dtypes of the live ones, tied weights once."""
    weights = found.average(name)
    live = {n: each.dtype for n, each in forms(found.live or {}).items()}
    dtypes = found.dtypes or live
    held = distinct(found, weights)
    return {n: Form(dtypes.get(n, each.dtype), each.shape) for n, each in held.items()}, weights


def _as(wanted: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    return wanted if wanted is not None and dtype.is_floating_point else dtype
