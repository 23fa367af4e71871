"""The live weights: a model's tensors, found again at every use, in groups for one foreach call."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polyak.tracking import Buffers, Select, Source, Tracked, difference, report, track

Kind = tuple[torch.dtype, torch.device]
Groups = list[list[Tensor]]


class LiveWeights:
    """What of a model is averaged or copied, and where it is now.

    `averaged` and `copied` are in the model's order. `generation` counts how often tensors were
    found to be replaced or moved, so that what was grouped before can be grouped anew.
    """

    def __init__(self, model: Source, buffers: Buffers, select: Select) -> None:
        self._model = model
        self._options = (buffers, select)
        self.generation = 0
        self._adopt(track(model, buffers, select))
        self._shapes = self._shapes_of(self.tracked)

    def groups(self) -> Groups:
        """The averaged weights in groups of one dtype and device: the hot path.

        A replaced tensor is noticed here. One that was moved in place (`.to`) is noticed by the
        first of its group, since models move as a whole; any other is still averaged rightly.
        """
        try:
            now = [holder[leaf] for holder, leaf in self._places]
        except KeyError:
            now = []
        same = len(now) == len(self._now) and all(map(operator.is_, now, self._now))
        if not same or any(
            kind(group[0]) != was for group, was in zip(self._groups, self._kinds, strict=False)
        ):
            self.check("update")
        return self._groups

    def group(self, flat: Sequence[Tensor]) -> Groups:
        """Tensors in the order of `averaged`, in the groups of the live weights."""
        return [[flat[i] for i in indices] for indices in self._indices]

    def check(self, call: str) -> None:
        """Looks all tensors up anew; raises `RuntimeError` if names or shapes are not the first ones."""
        tracked = track(self._model, *self._options)
        self.require(call, self._shapes_of(tracked), RuntimeError)
        self._adopt(tracked)

    def targets(self, model: Source, call: str) -> list[Tracked]:
        """The stored tensors of another model of the same names and shapes, or `ValueError`."""
        tracked = track(model, *self._options)
        self.require(call, self._shapes_of(tracked), ValueError)
        return [item for item in tracked if item.policy != "live"]

    def require(
        self, call: str, got: Mapping[str, tuple[int, ...]], error: type[Exception]
    ) -> None:
        """Raises `error` with a list of what differs unless names and shapes are the first ones."""
        if lines := difference(self._shapes, got):
            raise error(report(f"{call}: not the tensors that the averager was made with", lines))

    def _adopt(self, tracked: list[Tracked]) -> None:
        self.tracked = tracked
        self.averaged = [item for item in tracked if item.policy == "average"]
        self.copied = [item for item in tracked if item.policy == "copy"]
        self._places = [(item.holder, item.leaf) for item in self.averaged]
        self._now = [item.live() for item in self.averaged]
        indices: dict[Kind, list[int]] = {}
        for i, tensor in enumerate(self._now):
            indices.setdefault(kind(tensor), []).append(i)
        self._kinds, self._indices = list(indices), list(indices.values())
        self._groups = self.group(self._now)
        self.generation += 1

    @staticmethod
    def _shapes_of(tracked: list[Tracked]) -> dict[str, tuple[int, ...]]:
        return {item.name: tuple(item.live().shape) for item in tracked if item.policy != "live"}


def kind(tensor: Tensor) -> Kind:
    """What a tensor must share with another to be updated by one foreach call with it."""
    return tensor.dtype, tensor.device
