"""Exporting: an average as plain safetensors, under the names and in the dtypes of its model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak._checks import require
from polyak._engine.tracking import Tracked
from polyak._lazy import TensorSpec, joined, spec_of
from polyak._ranks.agreement import together
from polyak._ranks.sharding import is_distributed, local
from polyak._tensors import dtype_name
from polyak.averager import SLOT_DTYPES, Averager
from polyak.checkpoints import _sharded_export as slabs
from polyak.checkpoints import _writing as writing
from polyak.checkpoints._checkpoint import Checkpoint, Weights
from polyak.checkpoints._rank_checks import require_all_parts, require_one_model
from polyak.checkpoints._tensorfile import narrowed
from polyak.rules import LIVE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def export(
    path: Path | str,
    source: Averager | Checkpoint,
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    group: ProcessGroup | None = None,
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
        name: of the average, where there are several; "live" for the live weights of a checkpoint.
        dtype: of floating-point tensors, if not the model's.
        shard_bytes: `path` is then a folder of files of at most so many bytes, with an index.
        group: of the ranks that export a sharded average; by default all.
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

    One tensor is held at a time.

    Of a sharded model it is collective: every rank of the group calls it, and what comes is the
    same file as from one process, while no rank holds more than some pieces of 32 MiB beside
    its weights. Where all ranks see the path, each writes its own parts, but for those
    that would be scattered over the file (columns of a matrix); these pass through the first
    rank, and so does everything where a rank does not see the path. `progress` is the first
    rank's.

    Raises `RuntimeError` before the first update and inside `applied()`, `FileExistsError` for a
    path that exists, unless `overwrite`; `ValueError` for a value that the dtype cannot hold, and
    where ranks would write different tensors. What fails on one rank fails on all, and leaves all
    as it was.
    """
    wanted_dtypes = ", ".join(map(dtype_name, SLOT_DTYPES))
    require(dtype in (None, *SLOT_DTYPES), "export: dtype", dtype, f"one of {wanted_dtypes}")
    if isinstance(source, Averager):
        tracked = [item for item in source.tracked if item.persistent]
        if any(is_distributed(item.held()) for item in tracked):
            with together("export", group):
                for item in tracked:
                    if is_distributed(held := item.held()):
                        require_all_parts("export", item.name, held, group)
                source.check_replicas()  # by the ranks of its mesh, which may be some of all
                parts = _Parts(source, name, tracked, dtype)
            require_one_model("export", {item.name: item for item in tracked}, group)
            slabs.write(
                path,
                parts.spreads,
                parts.read,
                told=f"average {name!r} at {source.clock}",
                group=group,
                shard_bytes=shard_bytes,
                overwrite=overwrite,
                progress=progress,
            )
            return
        model, weights = _of_averager(source, name, tracked)
    elif isinstance(source, Checkpoint):
        model, weights = _of_checkpoint(source, name)
    else:
        got = type(source).__name__
        raise TypeError(f"export: got {got}, wanted a polyak.Averager or a Checkpoint")
    wanted = {each: TensorSpec(held.shape, _as(dtype, held.dtype)) for each, held in model.items()}
    writing.write(
        path,
        wanted,
        lambda each: [narrowed(each, weights[each].detach(), wanted[each].dtype)],
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def _of_averager(
    averager: Averager, name: str | None, tracked: list[Tracked]
) -> tuple[dict[str, TensorSpec], Weights]:
    """The specs of all that the model saves, tied weights once; the average, or what is live."""
    live = {item.name: item.held() for item in tracked}
    return {n: spec_of(tensor) for n, tensor in live.items()}, joined(live, averager.weights(name))


class _Parts:
    """This rank's parts of all that the model saves, those of the average computed when read."""

    def __init__(
        self,
        averager: Averager,
        name: str | None,
        tracked: list[Tracked],
        dtype: torch.dtype | None,
    ) -> None:
        held = {item.name: item.held() for item in tracked}
        self.spreads = {
            n: slabs.Spread(TensorSpec(tuple(tensor.shape), _as(dtype, tensor.dtype)), tensor)
            for n, tensor in held.items()
        }
        self._weights = averager.weights(name)
        self._held = held

    def read(self, name: str, where: tuple[slice, ...]) -> Tensor:
        """What is somewhere in this rank's part of a tensor."""
        if name in self._weights:
            return self._weights.read(name, where)
        return local(self._held[name]).detach()[where]


def _of_checkpoint(found: Checkpoint, name: str | None) -> tuple[dict[str, TensorSpec], Weights]:
    """The specs of an average's tensors in the dtypes of the live ones, tied weights once."""
    weights = found.weights(name) if name == LIVE else found.average(name)
    live = {
        n: each.dtype for n, each in (found.live.specs if found.live is not None else {}).items()
    }
    dtypes = found.dtypes or live
    held = distinct(found, weights)
    return {
        n: TensorSpec(each.shape, dtypes.get(n, each.dtype)) for n, each in held.items()
    }, weights


def _as(wanted: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    return wanted if wanted is not None and dtype.is_floating_point else dtype


def distinct(found: Checkpoint, weights: Weights) -> dict[str, TensorSpec]:
    """The spec of each of a checkpoint's tensors, of tied ones under their first name."""
    specs = weights.specs
    if found.dtypes:
        return {name: specs[name] for name in specs if name in found.dtypes}
    kept: dict[Hashable, str] = {}
    for name in specs:
        identity = weights.identity(name)
        kept.setdefault(name if identity is None else identity, name)
    return {name: specs[name] for name in kept.values()}
