"""Readouts: averages of what `polyak.save` wrote, computed from their slots when asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyak import _tensors as tensors
from polyak._engine.readout import NamedTensors
from polyak.checkpoints._parts import Chunked
from polyak.checkpoints._stored import Stored, StoredAverage
from polyak.checkpoints._tensorfile import Form
from polyak.rules import LIVE


class ReadOut(NamedTensors):
    """An average of a file of ours, read out tensor by tensor: `sum of coefficient * slot`."""

    def __init__(self, stored: Stored, name: str, average: StoredAverage) -> None:
        self._stored = stored
        self._keys = [
            ("live/" if slot == LIVE else f"averages/{name}/{slot}/", coefficient)
            for slot, coefficient in average.rule.readout(average.tick).items()
        ]
        model = stored.model()
        self._names = {n: first for first, each in model.items() for n in (first, *each["aliases"])}
        self._copied = {first for first, each in model.items() if each["policy"] == "copy"}

    @property
    def known(self) -> Mapping[str, str]:
        """name -> the first name of the same tensor."""
        return self._names

    @property
    def forms(self) -> dict[str, Form]:
        """The tensors' dtypes and shapes, without their content."""
        return {name: self._form(name) for name in self}

    def __getitem__(self, name: str) -> Tensor:
        held = self.unread(name)
        return held.whole() if isinstance(held, Chunked) else held

    def unread(self, name: str) -> Tensor | Chunked:
        """A tensor before its chunks are put together, where it is a slot as it lies."""
        terms = self._terms(name)
        dtype, shape = self._form(name)
        if [c for _, c in terms] == [1.0]:
            return self._stored.unread(terms[0][0])
        out = torch.empty(shape, dtype=dtype)
        tensors.combine_([out], [([self._stored[key]], c) for key, c in terms])
        return out

    def release(self, name: str) -> None:
        """Gives the pages of a tensor's slots back."""
        for key, _ in self._terms(name):
            self._stored.release(key)

    def _terms(self, name: str) -> list[tuple[str, float]]:
        """The key and the coefficient of each tensor that is summed."""
        first = self._names[name]
        if first in self._copied:
            return [(f"copies/{first}", 1.0)]
        return [(prefix + first, coefficient) for prefix, coefficient in self._keys]

    def _form(self, name: str) -> Form:
        """The shape of the slots, and the widest of their dtypes."""
        held = [self._stored.form(key) for key, _ in self._terms(name)]
        widest = max(held, key=lambda form: form.dtype.itemsize)
        if any(form.shape != widest.shape for form in held):
            raise self._stored.error(f"{name}: the slots have different shapes")
        return widest
