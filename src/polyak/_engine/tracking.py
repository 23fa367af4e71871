"""Tracking: what of a model is averaged, what is copied, what is left alone, and by what name.

`track` walks a model once and decides for every tensor. Names are canonical: those of the plain
model, whatever wraps it (DistributedDataParallel, torch.compile, activation checkpointing). A tensor
is found again by the dictionary that holds it and its leaf name, at every use, so that replaced
parameters are followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from polyak._ranks.sharding import (
    Shape,
    is_distributed,
    local,
    refuse_flat,
    refuse_gathered,
    rows,
    shape,
    shape_of_rows,
    spread,
    stream,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Policy = Literal["average", "copy", "skip"]
Buffers = Literal["auto", "average", "copy"] | Mapping[str, Policy]
Select = Callable[[str], bool] | str | Sequence[str] | None
Source = nn.Module | Mapping[str, Tensor]

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Tracked:
    """One tensor of a model: its canonical name, where it is found, and what is done with it.

    With a `mesh`, the ranks that all have the tensor average a part of it each.
    """

    name: str
    holder: Mapping[str, Tensor | None]
    leaf: str
    kind: Literal["parameter", "buffer", "tensor"]
    persistent: bool = True
    aliases: tuple[str, ...] = ()
    policy: Policy = "skip"
    reason: str = ""
    mesh: DeviceMesh | None = None

    def local(self) -> Tensor:
        """What is averaged on this rank: the tensor as it is now, or its part; the model's content."""
        found = local(self.found())
        return found if self.mesh is None else rows(found, self.mesh)

    def held(self) -> Tensor:
        """The tensor as averages are spread over ranks: a DTensor where it is sharded."""
        found = self.found()
        return found if self.mesh is None else spread(found, self.mesh)

    def shape(self) -> Shape:
        """The shape, and how it is spread."""
        found = self.found()
        return shape(found) if self.mesh is None else shape_of_rows(found, self.mesh)

    def stream(self) -> str:
        """What tells this rank's part from those of others, equal on ranks that have the same."""
        return stream(self.found(), self.mesh)

    def found(self) -> Tensor:
        """The tensor as the model has it."""
        return cast(Tensor, self.holder[self.leaf])

    def own(self) -> Tensor | None:
        """What of it the model has on this rank; None where it has the tensor no more."""
        found = self.holder.get(self.leaf)
        return None if found is None else local(found)


def track(
    source: Source,
    buffers: Buffers = "auto",
    select: Select = None,
    mesh: DeviceMesh | None = None,
) -> list[Tracked]:
    """Every tensor of a model or mapping, once, in the model's order, with its policy and reason.

    Policies: "average" (floating-point and complex parameters, BatchNorm's running statistics),
    "copy" (integers, and every other buffer), "skip" (left to the model: not selected, or a buffer
    that its module does not save). Tied tensors are one, with the other names as aliases. Averaged
    parameters of one dimension or more are divided over the ranks of a `mesh`, by rows.

    Raises `ValueError` for meta, sparse or not yet materialised tensors, patterns that match
    nothing, names that meet after canonicalisation, and when nothing is left to average.
    """
    found = _merge_ties(list(_find(source)))
    for item in found:
        _refuse_strange(item)
    names = {name: item for item in found for name in (item.name, *item.aliases)}
    overrides = _overrides(buffers, names)
    selected = _selector(select, names)
    tracked = []
    for item in found:
        policy, reason = _decide(item, buffers, overrides, selected)
        mesh_of = mesh if mesh is not None and _is_divided(item, policy) else None
        tracked.append(replace(item, policy=policy, reason=reason, mesh=mesh_of))
    if not any(item.policy == "average" for item in tracked):
        raise ValueError(
            f"nothing to average among {len(tracked)} tensors: wanted at least one selected "
            "floating-point parameter; look at `model` and `select`"
        )
    return tracked


def _find(source: Source) -> Iterator[Tracked]:
    """All tensors of a model or mapping by canonical name, ties included."""
    if isinstance(source, nn.Module):
        for prefix, module in walk(source, ""):
            refuse_flat(prefix, module)
            yield from _own_tensors(prefix, module)
        return
    if not isinstance(source, Mapping):
        wanted = "a torch.nn.Module or a mapping name -> tensor"
        raise TypeError(f"model is {type(source).__name__}, wanted {wanted}")
    for name, tensor in source.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"model[{name!r}] is {type(tensor).__name__}, wanted a tensor")
        refuse_gathered(name, tensor)
        yield Tracked(name, source, name, "tensor")


def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their canonical prefixes: the names that wrappers add are left out."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            wrapper = name in WRAPPERS or (name == "module" and isinstance(module, _PARALLEL))
            yield from walk(child, prefix if wrapper else f"{prefix}{name}.")


def _own_tensors(prefix: str, module: nn.Module) -> Iterator[Tracked]:
    for leaf, tensor in module._parameters.items():
        if tensor is not None:
            yield Tracked(prefix + leaf, module._parameters, leaf, "parameter")
    for leaf, buffer in module._buffers.items():
        if buffer is not None:
            persistent = leaf not in module._non_persistent_buffers_set
            yield Tracked(prefix + leaf, module._buffers, leaf, "buffer", persistent)


def _merge_ties(found: list[Tracked]) -> list[Tracked]:
    """One entry a tensor object: the first name it has; later names become aliases."""
    names: dict[int, list[str]] = {}
    seen: set[str] = set()
    for item in found:
        if item.name in seen:
            raise ValueError(f"two tensors are named {item.name!r} once wrappers are left out")
        seen.add(item.name)
        names.setdefault(id(item.found()), []).append(item.name)
    firsts = {same[0]: tuple(same[1:]) for same in names.values()}
    return [replace(item, aliases=firsts[item.name]) for item in found if item.name in firsts]


def _refuse_strange(item: Tracked) -> None:
    tensor = item.local()
    if is_lazy(tensor):
        raise ValueError(
            f"{item.name} is not materialised yet (a lazy module): run one forward pass, "
            "then make the average"
        )
    if tensor.is_meta:
        raise ValueError(
            f"{item.name} is on the meta device and has no content: materialise the model "
            "(to_empty, load its weights), then make the average"
        )
    if hasattr(item.found(), "ds_id") and tensor.numel() == 0:
        raise ValueError(
            f"{item.name} is partitioned by DeepSpeed ZeRO-3 and is empty between its uses: wanted "
            "weights that are there (ZeRO 1 or 2), or sharded by fully_shard (FSDP2)"
        )
    if tensor.is_inference():
        raise ValueError(
            f"{item.name} was made under torch.inference_mode() and cannot be written to outside: "
            "build the model outside it, or under torch.no_grad()"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{item.name} has layout {tensor.layout}, wanted torch.strided")


def _is_divided(item: Tracked, policy: Policy) -> bool:
    """Whether ranks that have a tensor whole average its rows; buffers are each rank's own."""
    if is_distributed(item.found()):
        raise ValueError(
            f"shard was given, and {item.name} is sharded already: each rank averages its own part "
            "of it anyway; leave `shard` out"
        )
    return policy == "average" and item.kind != "buffer" and item.found().dim() > 0


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running statistic of a norm, by the last part of its name.

    >>> is_statistic("layer1.0.bn.running_var"), is_statistic("layer1.0.bn.weight")
    (True, False)
    """
    return name.rpartition(".")[2] in STATISTICS


def averageable(tensor: Tensor) -> bool:
    """Whether a tensor's values have a mean: floating-point or complex ones."""
    return tensor.is_floating_point() or tensor.is_complex()


def _decide(
    item: Tracked, buffers: Buffers, overrides: dict[str, Policy], selected: Callable[[str], bool]
) -> tuple[Policy, str]:
    """The policy of one tensor and why."""
    if not selected(item.name):
        return "skip", "not selected"
    if item.name in overrides:
        return overrides[item.name], "by the pattern given"
    if not item.persistent:
        return "skip", "a buffer that its module does not save"
    if not averageable(item.local()):
        return "copy", f"{str(item.local().dtype).removeprefix('torch.')} has no mean"
    if item.kind != "buffer":
        return "average", item.kind
    if buffers in ("average", "copy"):
        return cast(Policy, buffers), f'buffers="{buffers}"'
    if is_statistic(item.leaf):
        return "average", "running statistics belong to the weights"
    return "copy", "a buffer that is no running statistic"


def _overrides(buffers: Buffers, names: dict[str, Tracked]) -> dict[str, Policy]:
    """name -> policy for the patterns given; the first pattern that matches a name decides."""
    if not isinstance(buffers, Mapping):
        if buffers not in ("auto", "average", "copy"):
            wanted = '"auto", "average", "copy" or a mapping pattern -> policy'
            raise ValueError(f"buffers is {buffers!r}, wanted {wanted}")
        return {}
    decided: dict[str, Policy] = {}
    for pattern, policy in buffers.items():
        if policy not in get_args(Policy):
            wanted = '"average", "copy" or "skip"'
            raise ValueError(f"buffers[{pattern!r}] is {policy!r}, wanted {wanted}")
        for item in _matches(pattern, names, "buffers"):
            if policy == "average" and not averageable(item.local()):
                raise ValueError(f"{item.name} is {item.local().dtype}: it can be copied only")
            decided.setdefault(item.name, policy)
    return decided


def _matches(pattern: str, names: dict[str, Tracked], option: str) -> list[Tracked]:
    """The tensors that a name or pattern means; a name in full means that tensor alone."""
    if pattern in names:
        return [names[pattern]]
    matching = [item for name, item in names.items() if fnmatchcase(name, pattern)]
    if not matching:
        first = ", ".join(list(names)[:5])
        raise ValueError(
            f"{option} pattern {pattern!r} matches no tensor; the names begin with {first}"
        )
    return matching


def _selector(select: Select, names: dict[str, Tracked]) -> Callable[[str], bool]:
    if callable(select):
        return select
    if select is None:
        return names.__contains__
    patterns = [select] if isinstance(select, str) else list(select)
    chosen = {item.name for pattern in patterns for item in _matches(pattern, names, "select")}
    return chosen.__contains__


def holders(source: Source, tracked: Sequence[Tracked]) -> list[ValuesView[object]]:
    """Live views of all that must stay the same objects for tensors to be where they were.

    The dictionaries that hold the tensors, and those that hold modules: a module that is replaced
    takes its tensors with it, and who keeps these would average dead weights.
    """
    mappings: dict[int, Mapping[str, object]] = {id(item.holder): item.holder for item in tracked}
    if isinstance(source, nn.Module):
        families = [module._modules for module in source.modules() if module._modules]
        mappings |= {id(family): family for family in families}
    return [mapping.values() for mapping in mappings.values()]
