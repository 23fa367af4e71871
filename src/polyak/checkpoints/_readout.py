"""Averages read out of their slots, tensor by tensor: `sum of coefficient * slot`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from polyak import _tensors as tensors
from polyak._engine.tracking import is_statistic
from polyak._lazy import Elements, LazyTensors, TensorSpec, Where
from polyak.rules import Rule, Tick

Terms = list[tuple[LazyTensors, str, float]]
"""The source, the key and the coefficient of each tensor in a sum."""


def read_out_terms(
    rule: Rule,
    tick: Tick,
    names: Iterable[str],
    place: Callable[[str, str], tuple[LazyTensors, str]],
) -> dict[str, Terms]:
    """The sum that each tensor of an average is; `place(slot, name)` tells where a slot's tensor lies.

    Running statistics have the rule's convex coefficients, as in the averager.
    """
    plain, convex = rule.readout(tick), rule.convex_readout(tick)
    return {
        name: [
            (*place(slot, name), c) for slot, c in (convex if is_statistic(name) else plain).items()
        ]
        for name in names
    }


class ReadOut(LazyTensors):
    """Tensors that are sums of stored ones; `error` makes the error for slots of different shapes."""

    def __init__(self, terms: Mapping[str, Terms], error: Callable[[str], ValueError]) -> None:
        self._terms = terms
        self._error = error

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: self._spec_at(name) for name in self._terms}

    def read(self, name: str, where: Where = ()) -> Tensor:
        terms = self._terms[name]
        if [c for *_, c in terms] == [1.0]:
            return terms[0][0].read(terms[0][1], where)
        held = [(source.read(key, where), c) for source, key, c in terms]
        out = torch.empty(held[0][0].shape, dtype=self.specs[name].dtype)
        tensors.combine_([out], [([tensor], c) for tensor, c in held])
        return out

    def elements(self, name: str) -> Elements:
        terms = self._terms[name]
        alone = [c for *_, c in terms] == [1.0]
        return terms[0][0].elements(terms[0][1]) if alone else super().elements(name)

    def release(self, name: str) -> None:
        for source, key, _ in self._terms[name]:
            source.release(key)

    def origins(self, name: str) -> Iterable[Hashable]:
        return [origin for source, key, _ in self._terms[name] for origin in source.origins(key)]

    def _spec_at(self, name: str) -> TensorSpec:
        """The shape of the slots, and the widest of their dtypes."""
        held = [source.spec(key) for source, key, _ in self._terms[name]]
        widest = max(held, key=lambda spec: spec.dtype.itemsize)
        if any(spec.shape != widest.shape for spec in held):
            raise self._error(f"{name}: the slots have different shapes")
        return widest
