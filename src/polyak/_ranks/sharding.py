"""The part of a tensor that lies on this rank, under FSDP2, tensor parallelism, or by rows.

An average is elementwise, so each rank averages its own shards, exactly, without communication.
Shards become DTensors only where they leave an averager. Without torch.distributed nothing is imported
and nothing is looked for: a tensor can be a DTensor only if their module is loaded.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from polyak._ranks.torch_private import (
    as_dtensor,
    fsdp_groups,
    fsdp_parameters,
    gathered_weight,
    holders_of,
    local_part,
    local_parts,
    reshard_group,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True)
class Layout:
    """How a tensor is spread. Two tensors of equal layouts have the same places on every rank."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    ranks: str

    def __repr__(self) -> str:
        spread = ", ".join(map(repr, self.placements))
        return f"{self.shape} as ({spread}) on ranks {self.ranks}"


Shape = tuple[int, ...] | Layout


def is_distributed(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, the same object at every call; a plain tensor itself."""
    if not is_distributed(tensor):
        return tensor
    part: Tensor = local_part(tensor)
    return part


def as_distributed(part: Tensor, like: Tensor) -> Tensor:
    """A part as a DTensor spread like another one, sharing its memory; the part if that is plain."""
    return as_dtensor(part, like) if is_distributed(like) else part


def one_mesh(shard: DeviceMesh | ProcessGroup, device: torch.device) -> DeviceMesh:
    """The ranks that share averages among them, as a mesh of one dimension.

    Raises `TypeError` for another object; `ValueError` for a mesh of several dimensions, and if this
    rank is not a member.
    """
    from torch.distributed import GroupMember, ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    given: object = shard
    if given is GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "This rank is not a member of the group `shard`; leave `shard` out on this rank"
        )
    if not isinstance(shard, (DeviceMesh, ProcessGroup)):
        wanted = "a ProcessGroup (torch.distributed.group.WORLD) or a DeviceMesh of one dimension"
        raise TypeError(f"shard is {type(shard).__name__}, wanted {wanted}")
    mesh = DeviceMesh.from_group(shard, device.type) if isinstance(shard, ProcessGroup) else shard
    if mesh.ndim != 1:
        raise ValueError(
            f"shard is a mesh of {mesh.ndim} dimensions ({mesh}), wanted the dimension along which "
            'the ranks have equal weights, such as mesh["data"]'
        )
    if mesh.get_coordinate() is None:
        ranks = mesh.mesh.tolist()
        raise ValueError(f"This rank is not a member of `shard`, which has the ranks {ranks}")
    return mesh


def rows(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of a tensor that every rank of a mesh has whole: a view, cut as `Shard(0)` is."""
    length = rows_of_a_rank(whole, mesh)
    # Ranks beyond the last row have an empty part, which begins at the end.
    start = min(mesh.get_local_rank() * length, whole.shape[0])
    return whole.detach().narrow(0, start, min(length, whole.shape[0] - start))


def rows_of_a_rank(whole: Tensor, mesh: DeviceMesh) -> int:
    """How many rows each of the first ranks of a mesh has; the last ranks may have fewer, or none."""
    return -(-whole.shape[0] // mesh.size())


def spread(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor that every rank of a mesh has whole, as a DTensor whose parts are its `rows`."""
    from torch.distributed.tensor import DTensor, Shard

    # Shape and stride are given: from uneven parts they would be guessed wrong, and to ask the other
    # ranks (run_check) would make this collective.
    return DTensor.from_local(
        rows(whole, mesh),
        mesh,
        [Shard(0)],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def stream(tensor: Tensor, mesh: DeviceMesh | None = None) -> str:
    """A text that is equal on ranks with the same part of a tensor, and differs where parts differ.

    With a mesh, the parts are the tensor's rows.
    """
    if mesh is not None:
        return f"rows {mesh.get_local_rank()}"
    if not is_distributed(tensor):
        return ""
    where: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    placed = zip(tensor.placements, where, strict=False)
    return ", ".join("same" if p.is_replicate() else f"{p!r} {at}" for p, at in placed)


def shape(tensor: Tensor) -> Shape:
    """The properties that must be equal in tensors that are averaged: the shape, and the layout of a DTensor."""
    if is_distributed(tensor):
        mesh = tensor.device_mesh
        return Layout(tuple(tensor.shape), tuple(tensor.placements), _ranks(mesh))
    return tuple(tensor.shape)


def shape_of_rows(whole: Tensor, mesh: DeviceMesh) -> Layout:
    """`shape(spread(whole, mesh))`, without making the DTensor."""
    from torch.distributed.tensor import Shard

    return Layout(tuple(whole.shape), (Shard(0),), _ranks(mesh))


@lru_cache(maxsize=64)
def _ranks(mesh: DeviceMesh) -> str:
    """The ranks along each dimension, as text: a tensor of them could be on the meta device."""
    from torch.distributed import get_process_group_ranks

    return " x ".join(str(get_process_group_ranks(group)) for group in mesh.get_all_groups())


def reshard(model: object) -> None:
    """Let weights that FSDP2 has gathered be shards again. It starts no communication.

    `model` is a module, whose weights may belong to an outer module's group, or a mapping
    name -> tensor.

    FSDP2 leaves a root's parameters whole after a forward pass without a backward pass, and all
    parameters after a forward pass that raised. What is written to shards then is not what the next
    pass reads. `FSDPModule.reshard` would leave the root as it is.
    """
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is None:
        return
    groups = fsdp_groups()
    # A parameter is found by the modules that have it, since the root's group has parameters of modules
    # within; a mapping has the parameters themselves, which are their shards.
    if isinstance(model, nn.Module):
        modules = list(model.modules())
        if not groups and any(isinstance(module, fsdp.FSDPModule) for module in modules):
            raise RuntimeError(
                f"this torch ({torch.__version__}) keeps the weights of fully_shard in a way that "
                "polyak does not know: use a torch version that polyak supports"
            )
        known = set(map(id, modules))
    else:
        known = set(map(id, model.values())) if isinstance(model, Mapping) else set()
    # Only this model's groups: another model may be in the middle of its forward pass.
    for group in groups:
        parameters = fsdp_parameters(group)
        if any(not known.isdisjoint(map(id, holders_of(each))) for each in parameters):
            reshard_group(group)


def refuse_gathered(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` for a whole tensor that FSDP2 has gathered for a while: it is soon stale."""
    if "torch.distributed.fsdp" not in sys.modules or is_distributed(tensor):
        return
    for group in fsdp_groups():
        if any(gathered_weight(parameter) is tensor for parameter in fsdp_parameters(group)):
            raise ValueError(
                f"{name} is a weight that FSDP2 has gathered for a forward pass; wanted its shard: give "
                "the module, or take its parameters after `module.reshard()`"
            )


def refuse_flat(name: str, module: nn.Module) -> None:
    """Raise `ValueError` for a module of FSDP1, which keeps its weights in flat parameters."""
    known = sys.modules.get("torch.distributed.fsdp")
    if known is not None and isinstance(module, known.FullyShardedDataParallel):
        raise ValueError(
            f"{name.removesuffix('.') or 'the model'} is sharded by FullyShardedDataParallel (FSDP1), "
            "whose flat parameters are not averaged; wanted fully_shard (FSDP2)"
        )


class Shards:
    """The sharded tensors of a model, with their parts as they were found.

    `divided` are whole tensors whose rows are averaged: they must stay where they were.
    """

    def __init__(self, tensors: Sequence[Tensor], divided: Sequence[Tensor]) -> None:
        self._sharded = list(filter(is_distributed, tensors))
        self._parts = local_parts(self._sharded)
        self._divided = divided
        self._places = list(map(Tensor.data_ptr, divided))

    def unmoved(self) -> bool:
        """Whether all parts still are the same objects, or at the same place."""
        # A shard that was replaced is another object. Rows are views of a whole tensor, which may stay the
        # same object with other memory: they are stale then.
        return (
            all(map(operator.is_, local_parts(self._sharded), self._parts))
            and [tensor.data_ptr() for tensor in self._divided] == self._places
        )


def require_whole(call: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` if any tensor is sharded: one rank's part would pass for the whole."""
    for name, tensor in tensors.items():
        if is_distributed(tensor):
            raise ValueError(
                f"{call}: {name} is sharded: {shape(tensor)}, and a single file would hold this "
                "rank's part alone. Use a polyak.Averager, which saves sharded averages"
            )


def require_beside(tensors: Iterable[Tensor], device: torch.device | None) -> None:
    """Raise `ValueError` if slots of sharded weights are wanted on a device of another type."""
    if device is None:
        return
    for tensor in tensors:
        if is_distributed(tensor) and local(tensor).device.type != device.type:
            raise ValueError(
                f"device is {device}, and the weights are sharded on {local(tensor).device}: the "
                "average of sharded weights stays beside them, so leave `device` out"
            )
