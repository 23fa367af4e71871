"""Checks before several ranks write one folder or file: nothing is lost, and nothing lies at a wrong place.

All of them are collective, or look only at a DTensor's layout, which all ranks know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch.distributed as dist

from polyak._ranks.agreement import alone, digest, gathered, together
from polyak._ranks.replicas import sample
from polyak._ranks.shard_geometry import box_of, missing_parts
from polyak._ranks.sharding import is_distributed, local
from polyak._ranks.torch_private import stored_chunks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

    from polyak._engine.tracking import Tracked


def require_one_model(
    call: str, tracked: Mapping[str, Tracked], group: ProcessGroup | None
) -> None:
    """Raise `ValueError` on all ranks if ranks have the same part of tensors that differ.

    They would pass for copies, and one of them would be lost: for example two stages of a pipeline
    whose names and shapes are equal. Samples of the live weights are compared, among ranks whose parts
    are all the same. Collective.
    """
    if alone(group):
        return
    with together(call, group):
        items = {n: i for n, i in tracked.items() if i.policy == "average" and i.kind != "buffer"}
        where = digest([(name, _where(name, item.held())) for name, item in items.items()])
        samples = {name: int(sample(local(item.held()))) for name, item in items.items()}
    # By the parts that a rank has: ranks with other parts have nothing that could be taken for a copy.
    first: dict[str, tuple[int, str]] = {}
    for rank, (parts, content) in enumerate(gathered((where, digest(samples)), group)):
        other, wanted = first.setdefault(parts, (rank, content))
        if content != wanted:
            theirs = gathered(samples, group)  # on all ranks, as all have found the same
            names = [n for n in theirs[rank] if theirs[rank][n] != theirs[other].get(n)]
            raise ValueError(
                f"{call}: ranks {other} and {rank} have the same shard of {', '.join(names[:8])}, but "
                "its content differs, and one of the two would be lost. Give the group of ranks that "
                "share a model (a stage of a pipeline) as `group=`, and each group its own path. If "
                "these ranks should have copies of one model, their weights have diverged"
            )


def require_all_parts(call: str, name: str, tensor: DTensor, group: ProcessGroup | None) -> None:
    """Raise `ValueError` if some parts lie only on ranks that do not write: the result would lack them."""
    writers = set(dist.get_process_group_ranks(group)) if group is not None else set()
    if writers and (lost := missing_parts(tensor, writers)):
        raise ValueError(
            f"{call}: shards of {name} are only on the ranks {lost[:8]}, which are not members of "
            f"`group` ({sorted(writers)[:8]}): give the group of all ranks that share the tensor"
        )


def require_stored_rightly(call: str, name: str, tensor: DTensor) -> None:
    """Raise `ValueError` if torch.distributed.checkpoint would store a part at a wrong place.

    It does so for some tensors that are cut twice into uneven pieces.
    """
    wanted = box_of(name, tensor)
    stored = stored_chunks(tensor)
    # A rank without elements may tell no chunk, or an empty one anywhere.
    if stored != [wanted] and (wanted.numel or any(0 not in shape for _, shape in stored)):
        raise ValueError(
            f"{call}: {name} of shape {tuple(tensor.shape)} is cut as {tensor.placements} into "
            f"uneven shards, which torch.distributed.checkpoint stores at wrong places (offsets and "
            f"shapes {stored}, wanted {wanted}): choose sizes that the number of ranks divides"
        )


def _where(name: str, held: Tensor) -> object:
    """Which part of a tensor lies on this rank."""
    return box_of(name, held) if is_distributed(held) else tuple(held.shape)
