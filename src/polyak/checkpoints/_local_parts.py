"""What this rank needs of tensors that files hold whole: all of them, or its shard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from polyak._checks import difference, report
from polyak._lazy import LazyTensors
from polyak._ranks.shard_geometry import box, whole
from polyak._ranks.sharding import as_distributed, is_distributed


def local_parts(
    path: Path, where: str, tensors: LazyTensors, held: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """This rank's part of each tensor, spread like the tensor of that name in `held`.

    A tensor that is whole in `held`, or not there, is read whole. Raises `ValueError` for a shape that
    is not that of the sharded tensor.
    """
    sharded = {name: held[name] for name in tensors if is_distributed(held.get(name))}
    wanted = {name: tuple(tensor.shape) for name, tensor in sharded.items()}
    if lines := difference(wanted, {name: tensors.specs[name].shape for name in wanted}):
        raise ValueError(report(f"{path}: {where}: the tensors differ", lines))
    return {name: _local_part(tensors, name, sharded.get(name)) for name in tensors}


def _local_part(tensors: LazyTensors, name: str, like: Tensor | None) -> Tensor:
    if like is None:
        return tensors[name]
    assert is_distributed(like)
    part = tensors.read(name, box(like).within(whole(like.shape)))
    return part if is_distributed(part) else as_distributed(part, like)
