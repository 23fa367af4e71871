"""The contents of a file of any library: live weights, averages, rules, a clock.

An average that a file holds as slots is read out tensor by tensor: `sum of coefficient * slot`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from polyak import _tensors as tensors
from polyak._dtypes import has_mean
from polyak._engine.changes import MOST_UPDATES
from polyak._engine.tracking import is_statistic
from polyak._lazy import Elements, LazyTensors, TensorSpec, Where
from polyak.checkpoints._open.files import Verified
from polyak.rules import LIVE, Rule, Tick
from polyak.rules._clocks import tick_after, ticked

Weights = LazyTensors
"""name -> tensor, read from its file when asked for."""
Terms = list[tuple[LazyTensors, str, float]]
"""The source, the key and the coefficient of each tensor in a sum."""


@dataclass(frozen=True)
class Clock:
    """How far a file's averages had come, as their library counts.

    `unit` says what `count` counts: "updates" of the average; "calls" of its update function: the
    1st, the (1 + every)-th, ... call updates; or "time", such as images seen. `ahead` are updates
    that the library does not count: torch_ema's copy at construction, for one. `every` is the number
    of calls per update, or None if the file does not say.
    """

    count: int
    unit: Literal["updates", "calls", "time"] = "updates"
    ahead: int = 0
    every: int | None = None

    def elapsed(self, every: int) -> list[float]:
        """The time that each update so far spans, if every `every`-th call makes an update.

        Raises `ValueError` for a count that no training reaches: a damaged file's.
        """
        if self.unit == "time":
            return [float(self.count)] if self.count else []
        updates = self._updates(every)
        return [1.0, *([float(every)] * (updates - 1))] if updates else []

    def _updates(self, every: int) -> int:
        if self.count > MOST_UPDATES:
            raise ValueError(f"{self.count} {self.unit} are counted, wanted at most {MOST_UPDATES}")
        calls = self.unit == "calls" and self.count > 0
        return 1 + (self.count - 1) // every if calls else self.count + self.ahead

    def since(self, every: int) -> int:
        """The calls since the last update."""
        return (self.count - 1) % every if self.unit == "calls" and self.count else 0

    def tick(self, rule: Rule, every: int) -> Tick:
        """The clock of a rule that made these updates."""
        if self.unit == "time":
            return ticked(rule, self.elapsed(every))
        return tick_after(rule, self._updates(every), 1.0, float(every))


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a file or folder.

    Attributes:
        path: where it was read.
        format: the layout, by name: "polyak", "ema-pytorch", "lightning", "safetensors", ...
        live: the live weights by name, or None if the file has none.
        averages: the average's name -> its weights by name; a single one is called "average".
        rules: the average's name -> its rule, if the file says.
        clock: how far the averages had come, or None if the file does not say.
        dtypes: the dtypes of the live weights by name, each tied weight once, if the file stores them
            apart from its tensors.
        ticks: the average's name -> the clock of its rule, in polyak's own files.
        aside: class -> how many objects of it lie beside the weights and were not read, since only
            their own code could make them.
        shapes: the shapes of tensors by name, if the file stores them beside its tensors.
        left: part of the file -> how many of its tensors are neither live weights nor in an average,
            such as an optimizer's state or another model; 0 if the number is not known: for a pickled
            object, and for other files of a folder that may hold weights.
        refused: the average's name -> why it is not in `averages`.
        check: what `verify` calls.

    Names are those of the plain model, without wrappers' prefixes. Tensors are views of the file where
    its layout allows it. If the file is replaced meanwhile, the old content is still read.
    """

    path: Path
    format: str
    live: Weights | None
    averages: Mapping[str, Weights]
    rules: Mapping[str, Rule] = field(default_factory=dict)
    clock: Clock | None = None
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    ticks: Mapping[str, Tick] = field(default_factory=dict)
    aside: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[], Verified] = field(default=lambda: Verified(0, 0), repr=False, compare=False)

    def average(self, name: str | None = None) -> Weights:
        """The weights of an average; `name` is needed if there are several.

        Raises `ValueError` for none, an unknown name, and an average that is refused.
        """
        if name is None and len(self.averages) == 1:
            return next(iter(self.averages.values()))
        if reason := self.refused.get(next(iter(self.refused), "") if name is None else name):
            raise ValueError(f"{self.path}: {reason}")
        if name is None and not self.averages and self.live is not None:
            raise ValueError(
                f'{self.path} has live weights and no average: to use them, name "live" (--average live)'
            )
        if name is None or name not in self.averages:
            has = ", ".join(self.averages) or "none"
            said = "name one of them (--average)" if name is None else f"there is no {name!r}"
            raise ValueError(f"{self.path} has the averages: {has}; {said}")
        return self.averages[name]

    def weights(self, name: str | None = None) -> Weights:
        """The live weights for "live", else the average `name`.

        By default it returns the live weights, or the only average of a file without live weights. An
        average that is itself called "live" is found only in a file without live weights.

        Raises `ValueError` for an unknown name, and if there are several averages to choose from.
        """
        if name in (None, LIVE) and self.live is not None:
            return self.live
        if name == LIVE and name not in self.averages:
            has = ", ".join(self.averages) or "none"
            raise ValueError(f"{self.path} has no live weights; its averages: {has}")
        return self.average(name)

    def from_live(self, name: str) -> list[str]:
        """The tensors that an average has from the live weights, since the file holds no average of them.

        Integers, booleans and running statistics are not listed. Raises what `average` raises.
        """
        weights, live = self.average(name), self.live
        return [
            tensor
            for tensor, spec in weights.specs.items()
            if live is not None
            and has_mean(spec.dtype)
            and not is_statistic(tensor)
            and tensor in live
            and live.origins(tensor) == weights.origins(tensor)
        ]

    def unused(self, name: str | None = None) -> dict[str, int]:
        """The other contents of the file, beside `weights(name)`: name -> number of tensors, as in `left`.

        These are the other averages too and, beside an average, the live weights that it lacks.
        """
        weights, live = self.weights(name), self.live
        others = {n: len(each) for n, each in self.averages.items() if each is not weights}
        if live is not None and weights is not live:
            prefix = _prefix(live, weights)
            has = {live.origins(prefix + n) for n in weights if prefix + n in live}
            lacks = [n for n in live if live.origins(n) not in has]
            others |= {
                f"live weights that the average lacks, such as {n}": len(lacks) for n in lacks[:1]
            }
        return {**self.left, **others}

    def verify(self) -> Verified:
        """Read the whole file or folder, and compare every part with the checksum that it has.

        Polyak's own files, files of torch.save and folders of torch.distributed.checkpoint have
        checksums. Plain safetensors and files of torch before 1.6 have none, so nothing is compared:
        the result counts the bytes that were compared, and those that have no checksum.
        Raises `ValueError` naming the file and the damaged part.
        """
        return self.check()

    @property
    def count(self) -> int | None:
        """The number of updates or calls that the file states, as its library counts; or None."""
        return self.clock.count if self.clock else None


def _prefix(live: Weights, weights: Weights) -> str:
    """The beginning of the live weights' names that an average's names lack, such as "model."; usually none."""
    first = next(iter(weights), "")
    found = sorted((n.removesuffix(first) for n in live if f".{n}".endswith(f".{first}")), key=len)
    return next((each for each in found if all(each + n in live for n in weights)), "")


def read_out_terms(
    rule: Rule,
    tick: Tick,
    names: Iterable[str],
    place: Callable[[str, str], tuple[LazyTensors, str]],
) -> dict[str, Terms]:
    """The sum that each tensor of an average is; `place(slot, name)` says where a slot's tensor is.

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
        parts = [(source.read(key, where), c) for source, key, c in terms]
        out = torch.empty(parts[0][0].shape, dtype=self.specs[name].dtype)
        tensors.combine_([out], [([tensor], c) for tensor, c in parts])
        return out

    def elements(self, name: str) -> Elements:
        terms = self._terms[name]
        alone = [c for *_, c in terms] == [1.0]
        return terms[0][0].elements(terms[0][1]) if alone else super().elements(name)

    def release(self, name: str) -> None:
        for source, key, _ in self._terms[name]:
            source.release(key)

    def origins(self, name: str) -> tuple[Hashable, ...]:
        terms = self._terms[name]
        return tuple(origin for source, key, _ in terms for origin in source.origins(key))

    def _spec_at(self, name: str) -> TensorSpec:
        """The shape of the slots, and the widest of their dtypes."""
        specs = [source.spec(key) for source, key, _ in self._terms[name]]
        widest = max(specs, key=lambda spec: spec.dtype.itemsize)
        if any(spec.shape != widest.shape for spec in specs):
            raise self._error(f"{name}: the slots have different shapes")
        return widest
