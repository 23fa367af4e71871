"""Modules of a model's structure whose parameters and buffers are the slots of an average.

A twin is a plain module. It has views of the slots' memory, so it follows every update, and writes to
it are seen in the versions of the slots. What is not averaged it shares with the model.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
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

_PLAIN = (Tensor, nn.Parameter)


class _View(NamedTuple):
    """A tensor, the module and its table that have it, and the name that it is tracked by."""

    tensor: Tensor
    owner: ref[nn.Module]  # the module must not keep itself alive
    table: Table
    held: dict[str, Tensor | None]
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
        self._tables = {id(v.held): (v.owner, v.table, v.held) for v in views}.values()
        self._held, self._leaves = [v.held for v in views], [v.leaf for v in views]
        self._tensors = [v.tensor for v in views]
        self._names = shared.names()
        places = {name: i for i, name in enumerate(self._names)}
        self._slotted = [v.tensor for v in views if v.name in places]
        self._places = [places[v.name] for v in views if v.name in places]
        self._sources = shared.sources(average)
        self.note()

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
        average = self._average
        average.apart.note(average.all_slots())

    def require_followed(self, call: str) -> None:
        """Raises `RuntimeError` if the module was moved, or its tensors were written to."""
        slots = addresses(_slot(self._average))
        self._shared.require_own(self._average, slots, call)
        if name := self._lost(slots):
            self._average.twin = None
            raise RuntimeError(
                f"{call}: {name} of module({self.label!r}) no longer shares the average's memory: the module "
                "was moved or converted, or given other tensors. Use Averager.to to move it, or "
                "module(copy=True), which you may move"
            )
        if written := self._average.apart.written(self._average.all_slots()):
            self.note()
            self._average.damaged = (
                f"{self._names[written[0]]} of module({self.label!r}) was written to: by an "
                "optimizer that has it, by a layer in train mode, or by hand"
            )
            self._average.refuse_damaged(call)

    def _lost(self, slots: Sequence[int | None]) -> str:
        """The name of a tensor that the module has no longer, or not on its slot; empty if there is none."""
        held = self._held
        if any(getattr(owner(), table, None) is not known for owner, table, known in self._tables):
            held = [getattr(view.owner(), view.table, {}) for view in self._views]
        kept = list(map(operator.is_, map(dict.get, held, self._leaves), self._tensors))
        if not all(kept):
            return self._views[kept.index(False)].name
        found, wanted = addresses(self._slotted), [slots[i] for i in self._places]
        if found == wanted:
            return ""
        moved = list(map(operator.ne, found, wanted)).index(True)
        return self._names[self._places[moved]]


class _Shared:
    """The tensors that modules share with an averager and its model."""

    def __init__(self, live: ModelTensors, updating: Updating) -> None:
        self._live, self._updating = live, updating
        self._beside: tuple[int, list[Tracked]] = -1, []

    def sources(self, average: Average) -> tuple[object, ...]:
        """A value that stays equal as long as all shared tensors are the same objects in the same memory."""
        held = id(average.slots), id(self._updating.copies.tensors), self._live.generation
        return *held, *(id(item.own()) for item in self._models_own())

    def names(self) -> list[str]:
        """The names of the slots, in order."""
        return [item.name for item in self._live.averaged]

    def require_own(self, average: Average, slots: Sequence[int | None], call: str) -> None:
        """`Average.require_own`, of weights too that `.data` has moved, which an update does not see.

        `slots` are the addresses of the slots.
        """
        weights = addresses(list(chain.from_iterable(self._live.groups)))
        if {*slots}.intersection(weights) - {0, None}:
            self._live.check(call)
        average.require_own(self._live, call)

    def _models_own(self) -> list[Tracked]:
        """The model's own tensors that a twin has, without buffers that a module computes and does not save."""
        if self._beside[0] != self._live.generation:
            own = [item for item in self._live.tracked if not item.stored and item.persistent]
            self._beside = self._live.generation, own
        return [i for i in self._beside[1] if all(type(e.found()) in _PLAIN for e in i.entries)]

    def contents(self, average: Average) -> dict[str, Tensor]:
        """name -> the slot, the copy, or the model's own tensor of what an averager does not hold."""
        copied = zip(self._live.copied, self._updating.copies.tensors, strict=True)
        contents = {item.name: item.local().detach() for item in self._models_own()}
        contents |= {item.name: copy for item, copy in copied}
        return contents | dict(zip(self.names(), _slot(average), strict=True))

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
            _View(tensor, ref(each), table, held, leaf, names[id(tensor)])
            for each in module.modules()
            for table in get_args(Table)
            for held in [getattr(each, table)]
            for leaf, tensor in held.items()
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


def _view(content: Tensor, like: Tensor) -> Tensor:
    """A tensor on the memory of another: a Parameter or a plain tensor, as `like` is."""
    if isinstance(like, nn.Parameter):
        return nn.Parameter(content, requires_grad=False)
    return content.detach()
