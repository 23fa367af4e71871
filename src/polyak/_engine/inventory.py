"""A module as a search has found it, to see whether another search would find the same.

A walk looks at every tensor by name, layout and memory, and makes some ten objects for each. Most
calls find nothing new, so they compare with the inventory first, which makes none that stay.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = {Tensor, nn.Parameter}


class Inventory:
    """The tables of all modules, with their names and objects, and where the tensors' memory is."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        if any(isinstance(each, torch.jit.ScriptModule) for each in modules):
            modules = []  # their tables are copies, which never change
        self._modules = [(each, each._modules, each._parameters, each._buffers) for each in modules]
        self._tables: list[dict[str, Any]] = []
        for _, children, parameters, buffers in self._modules:
            self._tables += [children, parameters, buffers]
        self._names = list(chain.from_iterable(self._tables))
        self._objects = list(self._objects_now())
        self._unsaved = [set(each._non_persistent_buffers_set) for each in modules]
        self._tensors = [each for each in self._objects if isinstance(each, Tensor)]
        # Subclasses keep what matters elsewhere: a DTensor in its local tensor and its placements.
        self._complete = bool(modules) and all(type(each) in _PLAIN for each in self._tensors)
        self._stamps = list(map(_stamp, self._tensors)) if self._complete else []

    def holds(self) -> bool:
        """Whether nothing has changed that a walk depends on; False if that is unknown."""
        return (
            self._complete
            and self._same_tables()
            and list(chain.from_iterable(self._tables)) == self._names
            and all(map(operator.is_, self._objects_now(), self._objects))
            and all(map(operator.eq, map(_stamp, self._tensors), self._stamps))
        )

    def _same_tables(self) -> bool:
        """Whether every module has the tables that it had; `__setstate__` replaces them."""
        for (each, children, parameters, buffers), unsaved in zip(
            self._modules, self._unsaved, strict=True
        ):
            if (
                each._modules is not children
                or each._parameters is not parameters
                or each._buffers is not buffers
                or each._non_persistent_buffers_set != unsaved
            ):
                return False
        return True

    def _objects_now(self) -> chain[object]:
        return chain.from_iterable(table.values() for table in self._tables)


def _stamp(tensor: Tensor) -> tuple[object, ...]:
    """A value that changes if a tensor gets other memory, or is read in another way (`.data`, `set_`)."""
    return (
        tensor.data_ptr(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.is_conj(),
        tensor.is_neg(),
    )
