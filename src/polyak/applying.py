"""Applying: the model carries the average for a while, in place, and gets its live weights back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyak.live import kind
from polyak.tensors import exchange_
from polyak.tracking import Tracked


@dataclass
class _Swap:
    """Live weights and a slot that trade contents; `live` is the tensor as it was at the start."""

    item: Tracked
    live: Tensor
    slot: Tensor
    version: int = 0

    def enter(self) -> None:
        exchange_(self.live, self.slot)
        self.version = self.live._version

    def leave(self) -> None:
        now = self.item.live()
        if now is self.live and kind(now) == kind(self.slot):
            exchange_(self.live, self.slot)
            return
        average = self.live.detach().clone()  # the tensor was replaced or moved within the block
        now.data.copy_(self.slot)
        self.slot.copy_(average)

    def written(self) -> bool:
        return self.live._version != self.version


@dataclass
class _Replacement:
    """Live weights that are kept aside while the model holds something else."""

    item: Tracked
    average: Tensor
    kept: Tensor | None = None

    def enter(self) -> None:
        self.kept = self.item.live().detach().clone()
        self.item.live().data.copy_(self.average)

    def leave(self) -> None:
        if self.kept is not None:
            self.item.live().data.copy_(self.kept)


@dataclass
class Exchange:
    """A plan of swaps and replacements: `enter`, then `leave`, which undoes as much as was entered."""

    _plan: list[_Swap | _Replacement] = field(default_factory=list)
    _entered: list[_Swap | _Replacement] = field(default_factory=list)
    _written: list[str] = field(default_factory=list)

    def swap(self, item: Tracked, slot: Tensor) -> None:
        """Plans to trade the contents of a live tensor and of a slot of its dtype and device."""
        self._plan.append(_Swap(item, item.live(), slot))

    def replace(self, item: Tracked, average: Tensor) -> None:
        """Plans to keep a live tensor aside and to write an average into it."""
        self._plan.append(_Replacement(item, average))

    @torch.no_grad()
    def enter(self) -> None:
        for step in self._plan:
            step.enter()
            self._entered.append(step)

    @torch.no_grad()
    def leave(self) -> None:
        swaps = [step for step in self._entered if isinstance(step, _Swap)]
        self._written = [step.item.name for step in swaps if step.written()]
        interrupt = None
        while self._entered:
            try:
                self._entered[-1].leave()
                self._entered.pop()
            except KeyboardInterrupt as error:  # the weights first, then the user's wish
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def refuse_writes(self) -> None:
        """Raises `RuntimeError` if weights were written to while they held the average."""
        if self._written:
            names = ", ".join(self._written[:8])
            raise RuntimeError(
                f"applied: {names} were written to inside the block. The live weights are back, "
                "but the average now holds what was written: train and load outside the block"
            )
