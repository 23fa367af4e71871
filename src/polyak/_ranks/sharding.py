"""Sharding: the part of a tensor that lies on this rank, under FSDP2, tensor parallelism, or by rows.

An average is elementwise, so each rank averages its own shards, exactly, and no rank asks another.
Shards become DTensors only where they leave an averager. What `torch.distributed` keeps private is
used here alone. Without it nothing is imported, and nothing is looked for: a tensor can be a DTensor
only if someone has loaded the module that defines them.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

# `to_local()` gives a fresh view of a parameter at each call: its identity would tell nothing.
_local = operator.attrgetter("_local_tensor")


@dataclass(frozen=True)
class Layout:
    """How a tensor is spread: two of equal layouts have parts of the same places on every rank."""

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
    """This rank's part of a tensor, the same object at every call; a plain tensor is its own."""
    if not is_distributed(tensor):
        return tensor
    part: Tensor = _local(tensor)
    return part


def as_distributed(part: Tensor, like: Tensor) -> Tensor:
    """A part as a DTensor spread like another one, sharing its memory; itself where that is plain.

    Shape and stride are the other one's: from uneven parts they would be guessed wrong. Made as
    FSDP2 makes its own, since `from_local` would move what rests in the host's memory
    (CPUOffloadPolicy) to the mesh's device.
    """
    if not is_distributed(like):
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import TensorMeta

    meta = TensorMeta(like.shape, like.stride(), part.dtype)
    spec = replace(like._spec, tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)


def one_mesh(shard: DeviceMesh | ProcessGroup, device: torch.device) -> DeviceMesh:
    """The ranks that share averages among them, as a mesh of one dimension.

    Raises `TypeError` for another object; `ValueError` for a mesh of several dimensions, and where
    this process is none of the ranks.
    """
    from torch.distributed import GroupMember, ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    given: object = shard
    if given is GroupMember.NON_GROUP_MEMBER:
        raise ValueError("shard is a group of which this rank is none; it averages without `shard`")
    if not isinstance(shard, (DeviceMesh, ProcessGroup)):
        wanted = "a ProcessGroup (torch.distributed.group.WORLD) or a DeviceMesh of one dimension"
        raise TypeError(f"shard is {type(shard).__name__}, wanted {wanted}")
    mesh = DeviceMesh.from_group(shard, device.type) if isinstance(shard, ProcessGroup) else shard
    if mesh.ndim != 1:
        raise ValueError(
            f"shard is a mesh of {mesh.ndim} dimensions ({mesh}), wanted the one over which the "
            'weights are equal, such as mesh["data"]'
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"shard is over the ranks {mesh.mesh.tolist()}, and this is none of them")
    return mesh


def rows(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of a tensor that every rank of a mesh has whole: a view, cut as `Shard(0)` is."""
    length = rows_of_a_rank(whole, mesh)
    start = min(mesh.get_local_rank() * length, whole.shape[0])
    return whole.detach().narrow(0, start, min(length, whole.shape[0] - start))


def rows_of_a_rank(whole: Tensor, mesh: DeviceMesh) -> int:
    """How many rows the first ranks of a mesh have each; the last may have fewer, or none."""
    return -(-whole.shape[0] // mesh.size())


def spread(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor that every rank of a mesh has whole, as a DTensor whose parts are its `rows`."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(
        rows(whole, mesh),
        mesh,
        [Shard(0)],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def stream(tensor: Tensor, mesh: DeviceMesh | None = None) -> str:
    """The same text on ranks that have the same part of a tensor, another where the part is another.

    The parts are its rows where a mesh is given.
    """
    if mesh is not None:
        return f"rows {mesh.get_local_rank()}"
    if not is_distributed(tensor):
        return ""
    where: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    placed = zip(tensor.placements, where, strict=False)
    return ", ".join("same" if p.is_replicate() else f"{p!r} {at}" for p, at in placed)


def shape(tensor: Tensor) -> Shape:
    """What two tensors must agree in to be averaged: the shape, and the layout of a DTensor."""
    if is_distributed(tensor):
        mesh = tensor.device_mesh
        return Layout(tuple(tensor.shape), tuple(tensor.placements), _ranks(mesh))
    return tuple(tensor.shape)


def shape_of_rows(whole: Tensor, mesh: DeviceMesh) -> Layout:
    """`shape(spread(whole, mesh))`, sooner."""
    from torch.distributed.tensor import Shard

    return Layout(tuple(whole.shape), (Shard(0),), _ranks(mesh))


@lru_cache(maxsize=64)
def _ranks(mesh: DeviceMesh) -> str:
    """The ranks along each dimension; a tensor of them would be one of another mode's."""
    from torch.distributed import get_process_group_ranks

    return " x ".join(str(get_process_group_ranks(group)) for group in mesh.get_all_groups())


def reshard(model: object) -> None:
    """Lets what FSDP2 has sharded carry its shards again; communicates nothing that is not on its way.

    `model` is a module, whose weights may be of an outer module's group, or a mapping name -> tensor.

    FSDP2 leaves a root's parameters whole after a forward pass that no backward pass follows, and
    all of them in a forward pass that an exception has ended, where `FSDPModule.reshard` would
    leave the root as it is. What is written to shards then is not what the next pass reads. Nor is
    it where weights are gathered ahead (prefetching, `unshard(async_op=True)`): these arrive first.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    held = set(map(id, model.modules() if isinstance(model, nn.Module) else _values(model)))
    for group in _fsdp_groups():
        if any(not held.isdisjoint(map(id, _parts_of(each))) for each in group.fsdp_params):
            group.wait_for_unshard()
            group._to_sharded()


def refuse_gathered(name: str, tensor: Tensor) -> None:
    """Raises `ValueError` for a whole tensor that FSDP2 has gathered for a while: it is soon stale."""
    if "torch.distributed.fsdp" not in sys.modules or is_distributed(tensor):
        return
    for group in _fsdp_groups():
        if any(getattr(each, "_unsharded_param", None) is tensor for each in group.fsdp_params):
            raise ValueError(
                f"{name} is a weight that FSDP2 has gathered for a forward pass; wanted its shard: give "
                "the module, or take its parameters after `module.reshard()`"
            )


def _fsdp_groups() -> Iterator[Any]:
    """All parameter groups of FSDP2 in this process."""
    from torch.distributed._composable_state import _module_state_mapping

    for state in [reference() for reference in list(_module_state_mapping.values())]:
        yield from getattr(state, "_fsdp_param_groups", ())


def _parts_of(parameter: Any) -> list[object]:
    """The modules that have a parameter of such a group, and the parameter that has its shard."""
    module = parameter._module_info
    return [module.module, *module.shared_modules, parameter.sharded_param]


def _values(model: object) -> Iterable[object]:
    return model.values() if isinstance(model, Mapping) else ()


def refuse_flat(name: str, module: nn.Module) -> None:
    """Raises `ValueError` for a module of FSDP1, which keeps its weights in flat parameters."""
    known = sys.modules.get("torch.distributed.fsdp")
    if known is not None and isinstance(module, known.FullyShardedDataParallel):
        raise ValueError(
            f"{name.removesuffix('.') or 'the model'} is sharded by FullyShardedDataParallel (FSDP1), "
            "whose flat parameters are not averaged; wanted fully_shard (FSDP2)"
        )


class Shards:
    """The sharded ones among a model's tensors, with their parts as they were found.

    `divided` are the tensors of which views are averaged: these stay where the tensor was.
    """

    def __init__(self, tensors: Sequence[Tensor], divided: Sequence[Tensor]) -> None:
        self._sharded = list(filter(is_distributed, tensors))
        self._parts = list(map(_local, self._sharded))
        self._divided = divided
        self._places = list(map(Tensor.data_ptr, divided))

    def unmoved(self) -> bool:
        """Whether all parts still are the same objects, or at the same place."""
        parts = [tensor._local_tensor for tensor in self._sharded]  # half the time of a map
        return (
            all(map(operator.is_, parts, self._parts))
            and [tensor.data_ptr() for tensor in self._divided] == self._places
        )


def require_whole(call: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises `ValueError` if any tensor is sharded, where one rank's parts would pass for all."""
    for name, tensor in tensors.items():
        if is_distributed(tensor):
            raise ValueError(
                f"{call}: {name} is sharded: {shape(tensor)}, and a file of ours would hold this "
                "rank's part alone. Use a polyak.Averager, which saves sharded averages"
            )


def require_beside(tensors: Iterable[Tensor], device: torch.device | None) -> None:
    """Raises `ValueError` if slots of sharded weights are wanted on a device of another type."""
    if device is None:
        return
    for tensor in tensors:
        if is_distributed(tensor) and local(tensor).device.type != device.type:
            raise ValueError(
                f"device is {device}, and the weights are sharded on {local(tensor).device}: the "
                "average of sharded weights stays beside them, leave `device` out"
            )
