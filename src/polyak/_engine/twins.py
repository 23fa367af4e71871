"""Modules of a model's structure whose parameters and buffers are the slots of an average.

A twin is a plain module. It has views of the slots' memory, so it follows every update, and writes to
it are seen in the versions of the slots. What is not averaged it shares with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, get_args
from weakref import ref

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from polyak._dtypes import kind
from polyak._engine.live import ModelTensors
from polyak._engine.memory import addresses
from polyak._engine.slots import Average
from polyak._engine.tracking import Table, Tracked, inner
from polyak._engine.updating import Updating
from polyak._modes import ordinary
from polyak._ranks.sharding import is_distributed
from polyak._tensors import versions

_PLAIN = (Tensor, nn.Parameter)


class _View(NamedTuple):
    """A tensor, the module and its table that have it, and the name that it is tracked by."""

    tensor: Tensor
    owner: nn.Module
    table: Table
    leaf: str
    name: str


class Twin:
    """How one module follows one average. `views` are its tensors."""

    def __init__(
        self, module: nn.Module, views: list[_View], label: str, average: Average, shared: _Shared
    ) -> None:
        self.module = average.twin = ref(module)
        self.label = label
        self._views, self._average, self._shared = views, average, shared
        self._sources, self._seen = shared.sources(average), versions(_slot(average))

    def settle(self) -> None:
        """Notes the slots as they are after an update, and follows tensors that were replaced."""
        sources = self._shared.sources(self._average)
        if sources != self._sources:
            contents = self._shared.contents(self._average)
            for view in self._views:
                view.tensor.data = contents[view.name]
        self._sources = sources
        self.note()

    def note(self) -> None:
        """Notes how often the slots were written to."""
        self._seen = versions(_slot(self._average))

    def require_followed(self, call: str) -> None:
        """Raises `RuntimeError` if the module was moved, or its tensors were written to."""
        self._shared.look(self._average, call)
        slots = self._shared.slots(self._average)
        for tensor, owner, table, leaf, name in self._views:
            if getattr(owner, table).get(leaf) is not tensor or (
                name in slots and tensor.data_ptr() != slots[name].data_ptr()
            ):
                self._average.twin = None
                raise RuntimeError(
                    f"{call}: {name} of module({self.label!r}) no longer shares the average's memory: the module "
                    "was moved or converted, or given other tensors. Use Averager.to to move it, or "
                    "module(copy=True), which you may move"
                )
        if (seen := versions(list(slots.values()))) != self._seen:
            wrong = [name for name, a, b in zip(slots, seen, self._seen, strict=True) if a != b]
            self._seen = seen
            self._average.damaged = (
                f"{wrong[0]} of module({self.label!r}) was written to: by an optimizer that has it, "
                "by a layer in train mode, or by hand"
            )
            self._average.refuse_damaged(call)


class _Shared:
    """The tensors that modules share with an averager and its model."""

    def __init__(self, live: ModelTensors, updating: Updating) -> None:
        self._live, self._updating = live, updating

    def sources(self, average: Average) -> tuple[object, ...]:
        """What is equal as long as all shared tensors are the same objects in the same memory."""
        held = id(average.slots), id(self._updating.copies.tensors), self._live.generation
        return *held, *(id(item.own()) for item in self._live.tracked if _is_shared(item))

    def slots(self, average: Average) -> dict[str, Tensor]:
        """name -> slot."""
        return dict(zip((i.name for i in self._live.averaged), _slot(average), strict=True))

    def look(self, average: Average, call: str) -> None:
        """`Average.look`, at tensors too that `.data` has moved, which an update does not see."""
        weights = (item.local() for item in self._live.averaged)
        if not {*addresses(_slot(average))}.isdisjoint(map(Tensor.data_ptr, weights)):
            self._live.check(call)
        average.look(self._live, call)

    def contents(self, average: Average) -> dict[str, Tensor]:
        """name -> the slot, the copy, or the model's own tensor of what an averager does not hold."""
        copied = zip(self._live.copied, self._updating.copies.tensors, strict=True)
        shared = {i.name: i.local().detach() for i in self._live.tracked if _is_shared(i)}
        return shared | {item.name: copy for item, copy in copied} | self.slots(average)

    @ordinary
    def made(
        self, model: nn.Module, average: Average, memo: dict[int, Any]
    ) -> tuple[nn.Module, list[_View]]:
        """A module in eval mode with views of the contents, and the views."""
        contents = self.contents(average)
        names: dict[int, str] = {}
        for item in self._live.tracked:
            for tensor in (entry.found() for entry in item.entries):
                if item.name in contents:
                    memo[id(tensor)] = _view(contents[item.name], tensor)
                    names[id(memo[id(tensor)])] = item.name
                elif item.persistent:
                    memo[id(tensor)] = tensor  # of a class that no plain tensor can replace
        module = plain_copy("module", model, memo).eval()
        for each in module.modules():
            if isinstance(each, _BatchNorm) and each.running_mean is not None:
                # In train mode it would write to its statistics, which are slots. Now it normalises
                # by the batch there, and by the slots in eval mode, as before.
                each.track_running_stats = False
        return module, [
            _View(tensor, each, table, leaf, names[id(tensor)])
            for each in module.modules()
            for table in get_args(Table)
            for leaf, tensor in getattr(each, table).items()
            if tensor is not None and id(tensor) in names
        ]


class Twins:
    """The modules of an averager's averages: at most one each, as long as it is referenced."""

    def __init__(
        self, live: ModelTensors, averages: Mapping[str, Average], updating: Updating
    ) -> None:
        self._live, self._averages, self._updating = live, averages, updating
        self._shared = _Shared(live, updating)
        self._twins: dict[str, Twin] = {}

    def module(self, model: nn.Module, label: str, memo: dict[int, Any]) -> nn.Module:
        """The module of an average of the model; made where there is none.

        `memo` is that of the deep copy: the id of an object -> what the module has in its place.
        """
        for twin in self._followed():
            if twin.label == label and (module := twin.module()) is not None:
                return module
        average = self._averages[label]
        refuse_unshareable(label, self._live, average)
        module, views = self._shared.made(model, average, memo)
        self._twins[label] = Twin(module, views, label, average, self._shared)
        return module

    def call(self, elapsed: float, found_inf: Sequence[Tensor] = ()) -> None:
        """A call of `Updating.call` that the modules follow."""
        self.check("update")
        try:
            self._updating.call(elapsed, found_inf)
            self.settle()
        except BaseException:  # slots may have moved: an interrupted update is completed
            for twin in self._followed():
                twin.note()
            raise

    def check(self, call: str) -> None:
        """Raises `RuntimeError` once for a module that was moved or written to."""
        for twin in self._followed():
            twin.require_followed(call)

    def settle(self) -> None:
        """Makes the modules follow what has moved."""
        for twin in self._followed():
            twin.settle()

    def _followed(self) -> list[Twin]:
        """The twins that are still there, and still have the slots."""
        self._twins = {n: t for n, t in self._twins.items() if self._averages[n].shared()}
        return list(self._twins.values())


def refuse_unshareable(label: str, live: ModelTensors, average: Average) -> None:
    """Raises `ValueError` unless an average is one slot in the form of the weights."""
    slots = average.lone_slot()
    if slots is None or len(average.rule.slots) > 1:
        read = ", ".join(average.readout())
        raise _unshareable(f"module({label!r})", f"{average.rule} reads its average from {read}")
    refuse_unlike(f"module({label!r})", live, slots)


def refuse_unlike(call: str, live: ModelTensors, slots: Sequence[Tensor]) -> None:
    """Raises `ValueError` unless slots have the dtypes and devices of the weights."""
    for item, slot in zip(live.averaged, slots, strict=True):
        weight = item.local()
        if item.mesh is not None:
            raise _unshareable(call, f"each rank has a shard of {item.name} (shard=)")
        if kind(slot) != kind(weight):
            raise _unshareable(
                call,
                f"the slot of {item.name} is {slot.dtype} on {slot.device}, and the weight "
                f"{weight.dtype} on {weight.device}",
            )


def _unshareable(call: str, problem: str) -> ValueError:
    return ValueError(
        f"{call}: {problem}, so no module can share its memory; use module(copy=True) and "
        "refresh it with copy_to(module)"
    )


@ordinary
def plain_copy(call: str, model: nn.Module, copies: dict[int, Any]) -> nn.Module:
    """A copy of a model without the wrappers, in which tensors of these ids are those given.

    Raises `RuntimeError` for a model that cannot be copied, and `ValueError` for a sharded one.
    """
    for name, parameter in model.named_parameters():
        if is_distributed(parameter):
            raise ValueError(
                f"{call}: {name} is sharded (fully_shard, parallelize_module), and a second module cannot "
                "be made from the model's shards; use applied()"
            )
    try:
        for module in reversed(list(model.modules())):  # the inner ones first
            if (wrapped := inner(module)) is not None:
                copies[id(module)] = deepcopy(wrapped, copies)
        copied: nn.Module = deepcopy(model, copies)
    except Exception as error:
        raise RuntimeError(
            f"{call}: {type(model).__name__} cannot be copied ({error}); build a second one, and "
            "write the average into it with copy_to"
        ) from error
    return copied


def _slot(average: Average) -> list[Tensor]:
    """The slot that is the average."""
    slot = average.lone_slot()
    assert slot is not None
    return slot


def _is_shared(item: Tracked) -> bool:
    """Whether a twin has the model's own tensor. What a module does not save, it computes for itself."""
    return (
        not item.stored
        and item.persistent
        and all(type(entry.found()) in _PLAIN for entry in item.entries)
    )


def _view(content: Tensor, like: Tensor) -> Tensor:
    """A tensor on the memory of another: a Parameter or a plain tensor, as `like` is."""
    if isinstance(like, nn.Parameter):
        return nn.Parameter(content, requires_grad=False)
    return content.detach()
