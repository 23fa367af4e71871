"""`applied()`: a model has an average for a while, in place, and then its live weights again.

A `Swapper` belongs to one averager and says which tensors exchange contents. A block is `Applied`, the
context manager. The blocks of all averagers meet in `polyak._engine.open_swaps`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakMethod

import torch
from torch import Tensor

from polyak._dtypes import Kind, kind
from polyak._engine import open_swaps, signals
from polyak._engine.holds import Hold, leave
from polyak._engine.live import ModelTensors
from polyak._engine.memory import addresses
from polyak._engine.pairs import Pairs
from polyak._engine.slots import Average
from polyak._engine.swapped import shared_memory
from polyak._engine.swaps import Swap
from polyak._engine.tracking import Tracked
from polyak._engine.updating import Updating
from polyak._engine.watch import Places
from polyak._modes import no_grad, ordinary
from polyak._ranks.agreement import Agreement, digest, together_or_alone
from polyak._ranks.replicas import gather_

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


_Function = TypeVar("_Function", bound=Callable[..., Any])
_RUN_LATER = inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction


class _Slots(NamedTuple):
    """The slots that exchange contents with weights, and the places of the weights that are left.

    Slots that are `shared` with a module or another process are not exchanged: they have the average
    inside a block too. `addresses` are those of all slots, which `share_memory_` moves.
    """

    generation: int
    shared: bool
    slots: list[Tensor] | None
    addresses: list[int | None]
    pairs: list[Pairs]
    rest: list[int]
    places: Places


class _Rows(NamedTuple):
    """A temporary tensor that is still to be gathered from the rows that each rank has."""

    whole: Tensor
    rows: Tensor


class _Kept(NamedTuple):
    """A block that stays open until `leave`; it keeps its `Applied`, whose end would end the block."""

    label: str
    block: Applied
    hold: Hold


class Swapper:
    """Writes averages of one averager into its model, one at a time, and restores the live weights."""

    def __init__(
        self,
        model: ModelTensors,
        averages: Mapping[str, Average],
        updating: Updating,
        mesh: DeviceMesh | None,
    ) -> None:
        self.swap: Swap | None = None
        """The swap that is open, or is being prepared."""
        self._model, self._averages, self._updating, self._mesh = model, averages, updating, mesh
        self._known: dict[str, _Slots] = {}
        self.kept: list[_Kept] = []
        """The blocks that `Applied.enter` has begun."""

    def refuse(self, call: str) -> None:
        """Raises `RuntimeError` inside a block: the model has an average there."""
        if self.swap is not None:
            raise RuntimeError(
                f"{call} inside applied({self.swap.label!r}): the model has the average's weights there; "
                f"leave the `with` block first ({self.swap.owner.name} has entered it)"
            )

    def label(self, name: str | None) -> str:
        """The name of an average; `name` may be None where there is only one.

        Raises `KeyError` for an unknown name.
        """
        label = next(iter(self._averages)) if name is None and len(self._averages) == 1 else name
        if label is None or label not in self._averages:
            raise KeyError(f"average {name!r} is unknown, wanted one of {list(self._averages)}")
        return label

    def swap_in(self, hold: Hold, name: str | None) -> None:
        """Writes an average into the model, for a block; `leave` undoes it, whatever this raises."""
        if self.swap is not None:
            self._join(self.swap, hold, name)
            return
        group = None if self._mesh is None else self._mesh.get_group()
        # All ranks agree before a weight changes: what fails on one rank then fails on all.
        with together_or_alone("applied", group) as agreement:
            gathered = self._plan(hold, name, agreement)
        # Apart from `_plan`: in a block of `together`, no rank may wait for another.
        if self._mesh is not None:
            gather_(gathered, self._mesh)
        if hold.swap is not None:
            open_swaps.enter(hold.swap, hold)

    def _join(self, swap: Swap, hold: Hold, name: str | None) -> None:
        """An inner block of the same average: the swap lasts until the last of its blocks ends."""
        label = self.label(name)
        if label != swap.label:
            self.refuse(f"applied({label!r})")
        open_swaps.refuse_owner(f"applied({label!r})", swap, "a model")
        hold.swap = swap
        open_swaps.enter(swap, hold)

    @open_swaps.in_turn
    @no_grad
    @ordinary
    def _plan(self, hold: Hold, name: str | None, agreement: Agreement) -> list[_Rows]:
        """Does all that can fail on one rank alone, and writes to no weight."""
        label = self.label(name)
        average, call = self._averages[label], f"applied({label!r})"
        self.refuse(call)
        self._updating.settle()  # slots may still move in a thread
        self._model.current(call)
        average.require_usable(call)
        known = self._slot_pairs(label, call)
        average.require_own(self._model, call)
        beside, gathered = self._beside(average, known, call)
        swap = Swap(
            label,
            average,
            [*known.pairs, *beside],
            self._model,
            open_swaps.owner(),
            WeakMethod(self._end),  # a block must not keep an averager that nobody else has
        )
        hold.swap = self.swap = swap
        if self._mesh is not None:
            specs = [(tuple(each.whole.shape), each.whole.dtype) for each in gathered]
            agreement.details = f"{label!r}, {average.tick}, {len(specs)} tensors ({digest(specs)})"
        return gathered

    def _end(self) -> None:
        self.swap = None

    def _slot_pairs(self, label: str, call: str) -> _Slots:
        """The pairs that exchange contents with slots, kept for the next block while all tensors stay the same."""
        average = self._averages[label]
        known, slots, shared = self._known.get(label), average.lone_slot(), average.shared()
        if (
            known is None
            or known.slots is not slots
            or known.addresses != addresses(slots or ())
            or known.shared != shared
            or known.generation != self._model.generation
            or not known.places.same()
            or self._model.thawed()
        ):
            self._model.check(call)
            known = self._known[label] = self._sorted(slots, shared)
        return known

    def _sorted(self, slots: list[Tensor] | None, shared: bool) -> _Slots:
        items, generation = self._model.averaged, self._model.generation
        places = Places(self._model.stored())
        at = addresses(slots or ())
        # A module that shares the slots must have the average all the time: they take no live weights.
        if slots is None or shared:
            return _Slots(generation, shared, slots, at, [], list(range(len(items))), places)
        elsewhere = shared_memory(slots)
        alike: dict[Kind, list[int]] = {}
        rest = []
        for i, item in enumerate(items):
            # A forward pass writes to buffers (BatchNorm in train mode), which would change a slot.
            # With `shard=` a slot has some rows only, so the whole average is gathered beside it.
            apart = item.mesh is not None or item.kind == "buffer" or elsewhere[i]
            if not apart and kind(item.local()) == kind(slots[i]):
                alike.setdefault(kind(slots[i]), []).append(i)
            else:
                rest.append(i)
        pairs = [
            Pairs([items[i] for i in each], [slots[i] for i in each], slots=True)
            for each in alike.values()
        ]
        return _Slots(generation, shared, slots, at, pairs, rest, places)

    def _beside(
        self, average: Average, known: _Slots, call: str
    ) -> tuple[list[Pairs], list[_Rows]]:
        """Temporary tensors for what has no slot of its dtype and device, with the average in them."""
        contents = [known.slots[i] for i in known.rest] if known.slots else []
        contents = contents or average.read(self._model, known.rest)
        items = [*(self._model.averaged[i] for i in known.rest), *self._model.copied]
        alike: dict[Kind, tuple[list[Tracked], list[Tensor]]] = {}
        gathered = []
        for item, content in zip(items, [*contents, *self._updating.copies.tensors], strict=True):
            live = item.own()
            assert live is not None
            aside = torch.empty_like(live, requires_grad=False)
            if item.mesh is not None:
                gathered.append(_Rows(aside, content))
            elif content.shape == live.shape:
                aside.copy_(content)
            else:  # copying would broadcast
                self._model.check(call)
            of_kind = alike.setdefault(kind(aside), ([], []))
            of_kind[0].append(item)
            of_kind[1].append(aside)
        pairs = [Pairs(items, asides, slots=False) for items, asides in alike.values()]
        return pairs, gathered


class Applied(ContextDecorator):
    """A block in which a model has an average. One object may be entered several times.

    A `with` statement that is abandoned ends with this object. Frameworks that have hooks and no block
    call `enter` and `leave`: such a block stays open as long as the averager or this object is there.

    Signal handlers wait during these four methods, from the first to the last instruction.
    """

    def __init__(self, swapper: Swapper, name: str | None) -> None:
        self._swapper, self._name = swapper, name
        self._holds: list[Hold] = []

    def __call__(self, func: _Function) -> _Function:
        """A function that runs in a block; raises `TypeError` if its body would run after the block."""
        if any(runs_later(func) for runs_later in _RUN_LATER):
            raise TypeError(
                f"applied() decorates {func!r}, a generator or coroutine function: its body runs "
                "after the call has returned; write `with averager.applied():` inside it"
            )
        return super().__call__(func)

    @signals.critical
    def enter(self) -> None:
        """Begin a block that stays open until `leave`; raises what entering a `with` block raises."""
        label = self._swapper.label(self._name)
        self._begin(lambda hold: self._swapper.kept.append(_Kept(label, self, hold)))

    @signals.critical
    def leave(self, error: BaseException | None = None) -> None:
        """End the block that `enter` began last, here or on another `applied()` of the same average.

        It does nothing if there is none, so call it in every hook that could be the last. Raises
        `RuntimeError` for what the block did to the weights; with an `error`, that report
        becomes a note on it.
        """
        label, kept = self._swapper.label(self._name), self._swapper.kept
        if mine := [each for each in kept if each.label == label]:
            try:
                signals.hold()
            finally:
                kept.remove(mine[-1])
                leave(mine[-1].hold, error)

    @signals.critical
    def __enter__(self) -> None:
        self._begin(self._holds.append)

    def _begin(self, note: Callable[[Hold], None]) -> None:
        hold = Hold(self)
        try:
            signals.hold()
            self._swapper.swap_in(hold, self._name)
            signals.deliver()
            note(hold)  # last: what raises before this is undone below
        except BaseException as error:
            leave(hold, error)
            raise

    @signals.critical
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            signals.hold()  # the block may have set other handlers
        finally:
            leave(self._holds.pop(), error)
