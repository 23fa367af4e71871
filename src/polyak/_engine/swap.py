"""Applying: the model carries the average for a while, in place, and gets its live weights back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak._engine.live import ModelTensors
from polyak._engine.slots import Average
from polyak._engine.tracking import Tracked
from polyak._ranks.agreement import digest
from polyak._ranks.replicas import gather_
from polyak._ranks.sharding import local
from polyak._tensors import Kind, exchange_, kind

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(eq=False)
class _Trade:
    """Live weights and a slot that trade contents; `live` is the tensor as it was at the start."""

    item: Tracked
    live: Tensor
    slot: Tensor
    version: int = 0
    pointer: int = 0

    def begin(self) -> None:
        """Notes the tensor as it is once contents have been exchanged."""
        self.version, self.pointer = self.live._version, self.live.data_ptr()

    def intact(self) -> bool:
        """Whether the tensor is still where it was, so that contents can trade places again."""
        return self.item.own() is self.live and kind(self.live) == kind(self.slot)

    def leave(self) -> None:
        """Gives back what a replaced, moved or removed tensor held, and the average to its slot."""
        now = self.item.own()
        average = self.live.detach().clone()
        for tensor in (self.live, now):
            if tensor is not None:
                tensor.data.copy_(self.slot)
        self.slot.copy_(average)

    def spoilt(self) -> str:
        """What was done in the block that the slot has suffered from."""
        if self.live._version != self.version:
            return "written to"
        return "moved" if self.live.data_ptr() != self.pointer else ""

    def changed(self) -> str:
        """What was done in the block to the weights' tensor."""
        return _changed(self.item, self.live) or self.spoilt()


@dataclass(eq=False)
class _Replacement:
    """Live weights that are kept aside while the model holds something else."""

    item: Tracked
    live: Tensor
    average: Tensor | None
    kept: Tensor | None = None
    version: int = 0

    def keep(self) -> None:
        self.kept, self.version = self.live.detach().clone(), self.live._version

    def leave(self) -> None:
        now = self.item.own()
        for tensor in (self.live, now):
            if tensor is not None and self.kept is not None:
                tensor.data.copy_(self.kept)

    def spoilt(self) -> str:
        return ""

    def changed(self) -> str:
        """The same; a buffer may be written to, as BatchNorm does in train mode."""
        if self.item.kind == "buffer":
            return ""
        moved = self.kept is not None and kind(self.kept) != kind(self.live)
        written = "written to" if self.live._version != self.version else ""
        return _changed(self.item, self.live) or ("moved" if moved else written)


def _changed(item: Tracked, live: Tensor) -> str:
    now = item.own()
    if now is None:
        return "removed"
    return "replaced" if now is not live else ""


@dataclass
class Exchange:
    """A plan of trades and replacements: `enter`, then `leave`, which undoes what was entered.

    `prepare` does all that can fail on one rank alone. Averages that lie in rows on the ranks of a
    mesh are then gathered to replace whole tensors. To leave, no rank needs another. After `leave`, `problems` says what was done to the weights in between, and `spoilt` whether
    the average's own slots have suffered from it.
    """

    mesh: DeviceMesh | None = None
    problems: list[str] = field(default_factory=list)
    spoilt: bool = False
    _trades: dict[Kind, list[_Trade]] = field(default_factory=dict)
    _replacements: list[_Replacement] = field(default_factory=list)
    _gathered: list[_Replacement] = field(default_factory=list)
    _traded: list[list[_Trade]] = field(default_factory=list)
    _replaced: list[_Replacement] = field(default_factory=list)

    def trade(self, item: Tracked, slot: Tensor) -> None:
        """Plans to trade the contents of a live tensor and of a slot of its dtype and device."""
        self._trades.setdefault(kind(slot), []).append(_Trade(item, item.local(), slot))

    def replace(self, item: Tracked, average: Tensor) -> None:
        """Plans to keep a live tensor aside and to write an average, or this rank's rows, into it."""
        plan = self._replacements if item.mesh is None else self._gathered
        plan.append(_Replacement(item, local(item.found()), average))

    @torch.no_grad()
    def prepare(self) -> None:
        """Keeps live tensors aside; nothing is written yet."""
        for replacement in [*self._gathered, *self._replacements]:
            replacement.keep()

    def told(self) -> str:
        """What is gathered: the same on all ranks, or they would get each other's rows."""
        forms = [(each.item.name, each.item.shape(), each.live.dtype) for each in self._gathered]
        return f"{len(forms)} tensors ({digest(forms)})"

    @torch.no_grad()
    def enter(self) -> None:
        """Lets the model carry the average."""
        with uninterrupted():
            self._replaced += [*self._gathered, *self._replacements]
            if self.mesh is not None:
                averages = [(each.live.data, each.average) for each in self._gathered]
                gather_([(live, part) for live, part in averages if part is not None], self.mesh)
            for trades in self._trades.values():
                _exchange(trades)
                self._traded.append(trades)
                for trade in trades:
                    trade.begin()
            for replacement in self._replacements:
                if replacement.average is not None:
                    replacement.live.data.copy_(replacement.average)
            for replacement in self._replaced:
                replacement.average = None  # its memory is for the block

    @torch.no_grad()
    def leave(self) -> None:
        """Gives the model its live weights back, every one of them that can be."""
        with uninterrupted():
            steps: list[_Trade | _Replacement] = []
            steps += [trade for trades in self._traded for trade in trades]
            steps += self._replaced
            self.spoilt = any(step.spoilt() for step in steps)
            changes = ((step.item.name, step.changed()) for step in steps)
            self.problems = [f"{name} was {changed}" for name, changed in changes if changed]
            for trades in self._traded:
                intact = [trade for trade in trades if trade.intact()]
                self._try(partial(_exchange, intact), intact)
                for trade in trades:
                    if trade not in intact:
                        self._try(trade.leave, [trade])
            for replacement in self._replaced:
                self._try(replacement.leave, [replacement])

    def _try(self, give_back: Callable[[], None], steps: Sequence[_Trade | _Replacement]) -> None:
        """One that cannot be written must not keep the others from being given back."""
        try:
            give_back()
        except RuntimeError as error:
            names = ", ".join(step.item.name for step in steps[:8])
            self.problems.append(f"{names} could not be given back ({error})")
            self.spoilt = True

    def report(self) -> str:
        """What was done to the weights in the block, and what has become of the average."""
        listed = "; ".join(self.problems[:8])
        fate = "the average is spoilt" if self.spoilt else "what was put there is dropped"
        return (
            f"applied: inside the block {listed}. The live weights are back and {fate}: train, "
            "load and move the model outside the block"
        )


def planned(
    live: ModelTensors, average: Average, copies: Sequence[Tensor], mesh: DeviceMesh | None
) -> Exchange:
    """What lets a model carry an average: whose contents trade places, which live ones are kept aside."""
    exchange, kept = Exchange(mesh), []
    lone = average.lone_slot()
    for i, item in enumerate(live.averaged):
        if lone and item.mesh is not None:
            exchange.replace(item, lone[i])
        elif lone and item.kind != "buffer" and kind(item.local()) == kind(lone[i]):
            exchange.trade(item, lone[i])
        else:
            kept.append(i)
    for i, tensor in zip(kept, average.read(live, kept), strict=True):
        exchange.replace(live.averaged[i], tensor)
    for item, copy in zip(live.copied, copies, strict=True):
        exchange.replace(item, copy)
    return exchange


def _exchange(trades: list[_Trade]) -> None:
    if trades:
        exchange_([trade.live for trade in trades], [trade.slot for trade in trades])


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C wait until the block is done: half an exchange is worse than none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
        if received:
            signal.raise_signal(signal.SIGINT)
