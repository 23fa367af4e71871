"""The tensors of a model by canonical name, and how each is found at every use.

`track` walks a model once. Canonical names are those of the plain model, whatever wraps it
(DistributedDataParallel, torch.compile, activation checkpointing). A tensor is looked up in its
module at every use, so that replaced parameters are followed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn

from polyak._dtypes import has_mean, refuse_wrapper
from polyak._engine.memory import identity
from polyak._engine.refusals import refuse_sign_view, refuse_strange, require_apart
from polyak._ranks.sharding import (
    Shape,
    as_distributed,
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

Policy = Literal["average", "copy", "frozen", "skip"]
"""The treatment of a tensor. A frozen one is not held: an average has the model's."""

Source = nn.Module | Mapping[str, Tensor]
Table = Literal["_parameters", "_buffers"]

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
STATISTICS = ("running_mean", "running_var")


class Entry(NamedTuple):
    """One name of a tensor, and its place: the table of a module, or a mapping (`table` is None)."""

    name: str
    owner: Source
    table: Table | None
    leaf: str
    persistent: bool = True

    def holder(self) -> Mapping[str, Tensor | None]:
        """The dictionary that holds the tensor now; a module's may have been replaced."""
        owner: Any = self.owner  # a cast would be a call, for every tensor and every look
        holder: Mapping[str, Tensor | None] = (
            owner if self.table is None else getattr(owner, self.table)
        )
        return holder

    def now(self) -> Tensor | None:
        """The tensor that its owner has in this place now; None where it has none."""
        holder = self.holder()  # TorchScript's has no `get`
        return holder[self.leaf] if self.leaf in holder else None  # noqa: SIM401

    def found(self) -> Tensor:
        """The tensor that has this name now."""
        return self.holder()[self.leaf]  # type: ignore[return-value]


class Tracked(NamedTuple):
    """One tensor of a model: its names (the first is its canonical name) and its policy.

    With a `mesh`, the ranks that all have the tensor average a part of it each.
    """

    entries: tuple[Entry, ...]
    policy: Policy = "skip"
    reason: str = ""
    mesh: DeviceMesh | None = None

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.entries[0].name

    @property
    def names(self) -> list[str]:
        """All names of the tensor."""
        return [entry.name for entry in self.entries]

    @property
    def aliases(self) -> tuple[str, ...]:
        """The other names under which a model saves the tensor."""
        return tuple(entry.name for entry in self.entries[1:] if entry.persistent)

    @property
    def persistent(self) -> bool:
        """Whether the model saves the tensor."""
        return self.entries[0].persistent

    @property
    def stored(self) -> bool:
        """Whether an averager holds tensors for this one."""
        return self.policy in ("average", "copy")

    @property
    def trains(self) -> bool:
        """Whether the tensor requires gradients."""
        return any(entry.found().requires_grad for entry in self.entries)

    @property
    def kind(self) -> Literal["parameter", "buffer", "tensor"]:
        """The kind of the tensor in the model; those of a mapping are tensors."""
        table = self.entries[0].table
        if table is None:
            return "tensor"
        return "parameter" if table == "_parameters" else "buffer"

    def local(self) -> Tensor:
        """The tensor that this rank averages, as it is now: the whole or its part, in the model's memory."""
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
        """A text that is equal on ranks that have the same part of the tensor, and only there."""
        return stream(self.found(), self.mesh)

    def found(self) -> Tensor:
        """The tensor as the model has it now."""
        return self.entries[0].found()

    def own(self) -> Tensor | None:
        """This rank's content of the tensor now; None where the model no longer has the tensor."""
        found = self.entries[0].now()
        return None if found is None else local(found)


Choice = Callable[[Sequence[Tracked]], Sequence[tuple[Policy, str]]]
"""Decides the policy of each tensor, and gives the reason."""


class ModelWalk(NamedTuple):
    """A model as one walk found it: its tensors, and its modules (none of a mapping)."""

    tracked: list[Tracked]
    modules: list[nn.Module]


def track(source: Source, choice: Choice, mesh: DeviceMesh | None = None) -> ModelWalk:
    """Every tensor of a model or mapping, once, in the model's order, with the policy chosen for it.

    Tied tensors are one. Averaged parameters of one dimension or more are divided over the ranks of
    a `mesh`, by rows.

    Raises `TypeError` for a mapping whose keys are not names or whose values are not tensors;
    `ValueError` for meta, sparse or not yet materialised tensors, for tensors that share memory
    without being tied, for tensor classes with arithmetic of their own, and for names that meet after
    canonicalisation.
    """
    found, modules = _find(source)
    merged = _merge_ties(found)
    tensors = [item.found() for item in merged]
    tracked = [
        Tracked(
            item.entries, policy, reason, mesh if _divided(item, tensor, policy, mesh) else None
        )
        for item, tensor, (policy, reason) in zip(merged, tensors, choice(merged), strict=True)
    ]
    stored = [(i.name, t) for i, t in zip(tracked, tensors, strict=True) if i.stored]
    for name, tensor in stored:
        refuse_wrapper(name, local(tensor))
        refuse_sign_view(name, local(tensor))
    require_apart(stored)
    return ModelWalk(tracked, modules)


def _find(source: Source) -> tuple[list[tuple[Entry, Tensor]], list[nn.Module]]:
    """All names of a model or mapping with their tensors, ties included, and the modules."""
    if isinstance(source, nn.Module):
        walked = list(walk(source, ""))
        for prefix, module in walked:
            refuse_flat(prefix, module)
        found = [pair for prefix, module in walked for pair in _own_tensors(prefix, module)]
        return found, list({id(module): module for _, module in walked}.values())
    if not isinstance(source, Mapping):
        wanted = "a torch.nn.Module or a mapping name -> tensor"
        raise TypeError(f"model is {type(source).__name__}, wanted {wanted}")
    for name, tensor in source.items():
        if not isinstance(name, str):
            raise TypeError(f"model has the key {name!r}, wanted names: mapping name -> tensor")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"model[{name!r}] is {type(tensor).__name__}, wanted a tensor")
        refuse_gathered(name, tensor)
    return [(Entry(name, source, None, name), tensor) for name, tensor in source.items()], []


def inner(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper wraps; None for a module that is not a wrapper."""
    if isinstance(module, _PARALLEL):
        return module._modules["module"]
    return next((module._modules[name] for name in WRAPPERS if name in module._modules), None)


def by_name(source: Source) -> dict[str, Tensor]:
    """Canonical name -> the tensor that a model or mapping has now, of any kind."""
    if isinstance(source, nn.Module):
        walked = (_own_tensors(prefix, module) for prefix, module in walk(source, ""))
        return {entry.name: tensor for pairs in walked for entry, tensor in pairs}
    return {name: tensor for name, tensor in source.items() if isinstance(tensor, Tensor)}


def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their canonical prefixes, which leave out the names that wrappers add."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            wrapper = name in WRAPPERS or (name == "module" and isinstance(module, _PARALLEL))
            yield from walk(child, prefix if wrapper else f"{prefix}{name}.")


def _own_tensors(prefix: str, module: nn.Module) -> Iterator[tuple[Entry, Tensor]]:
    for leaf, tensor in module._parameters.items():
        if tensor is not None:
            yield Entry(prefix + leaf, module, "_parameters", leaf), tensor
    for leaf, buffer in module._buffers.items():
        if buffer is not None:
            persistent = leaf not in module._non_persistent_buffers_set
            yield Entry(prefix + leaf, module, "_buffers", leaf, persistent), buffer


def _merge_ties(found: Sequence[tuple[Entry, Tensor]]) -> list[Tracked]:
    """One item a tensor, with all its names. A parameter is known by its name as a parameter."""
    tied: dict[Hashable, list[Entry]] = {}
    seen: set[str] = set()
    for entry, tensor in found:
        if entry.name in seen:
            raise ValueError(
                f"two tensors are named {entry.name!r} without the prefixes that wrappers add"
            )
        seen.add(entry.name)
        refuse_strange(entry.name, tensor)
        tied.setdefault(identity(tensor), []).append(entry)
    return [Tracked(tuple(sorted(entries, key=_rank))) for entries in tied.values()]


def _rank(entry: Entry) -> tuple[bool, bool]:
    """Parameters before buffers, and those that the model saves before the others."""
    return entry.table == "_buffers", not entry.persistent


def _divided(item: Tracked, tensor: Tensor, policy: Policy, mesh: DeviceMesh | None) -> bool:
    """Whether ranks that have a tensor whole average its rows; buffers are each rank's own."""
    if mesh is None:
        return False
    if is_distributed(tensor):
        raise ValueError(
            f"shard was given, and {item.name} is sharded already: each rank averages its own part "
            "of it anyway; leave `shard` out"
        )
    return policy == "average" and item.kind != "buffer" and tensor.dim() > 0


def named(items: Sequence[Tracked], parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """name -> tensor as it leaves an averager: a DTensor if the model's is one."""
    return {
        item.name: as_distributed(part, item.held())
        for item, part in zip(items, parts, strict=True)
    }


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running statistic of a norm, by the last part of its name.

    >>> is_statistic("layer1.0.bn.running_var"), is_statistic("layer1.0.bn.weight")
    (True, False)
    """
    return name.rpartition(".")[2] in STATISTICS


def averageable(tensor: Tensor) -> bool:
    """Whether a tensor's values have a mean: floating-point or complex ones."""
    return has_mean(tensor.dtype)
