"""Reading an average by name, one tensor at a time, so that no second copy is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from torch import Tensor

from polyak._engine import open_swaps
from polyak._engine.live import ModelTensors
from polyak._engine.slots import Average
from polyak._lazy import LazyTensors, TensorSpec, Where, spec_of
from polyak._ranks.sharding import as_distributed


class AverageWeights(LazyTensors):
    """An average as it is now: name -> a fresh tensor, computed when it is read.

    Tied tensors appear under all their names; frozen ones are read from the model. `read` gives this
    rank's shard; `[name]` gives a DTensor where the model has one. Raises `RuntimeError` after the next
    update.
    """

    def __init__(self, live: ModelTensors, average: Average, copies: Sequence[Tensor]) -> None:
        self._live = live
        self._average = average
        self._tick = average.tick
        self._copies = {item.name: copy for item, copy in zip(live.copied, copies, strict=True)}
        self._frozen = {item.name: item for item in live.frozen}
        self._places = {item.name: i for i, item in enumerate(live.averaged)}
        self._items = {item.name: item for item in live.readable()}
        self._names = {
            n: item.name for item in self._items.values() for n in (item.name, *item.aliases)
        }

    def __getitem__(self, name: str) -> Tensor:
        return as_distributed(self.read(name), self._items[self._names[name]].held())

    @open_swaps.in_turn
    def read(self, name: str, where: Where = ()) -> Tensor:
        """This rank's shard of the tensor, or the slice `where` of it; nothing else is computed."""
        self._require_current(name)
        first = self._names[name]
        if first in self._copies:
            return self._copies[first][where].clone()
        if first in self._frozen:
            return self._model_s_own(first)[where].clone()
        return self._average.read(self._live, [self._places[first]], where)[0]

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """name -> shape and dtype of this rank's shard."""
        specs = self._average.specs(self._live)
        specs |= {name: spec_of(copy) for name, copy in self._copies.items()}
        specs |= {name: spec_of(item.local()) for name, item in self._frozen.items()}
        return {name: specs[first] for name, first in self._names.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def whole(self) -> dict[str, Tensor]:
        """The whole average in memory, by one pass over all tensors; tied names share one tensor."""
        return self._named(self._held() | {name: self.read(name) for name in self._frozen})

    def beside(self) -> dict[str, Tensor]:
        """The result of `whole`, with the model's own frozen tensors in place of copies."""
        frozen = {name: self._model_s_own(name) for name in self._frozen}
        return self._named(self._held() | frozen)

    def _model_s_own(self, name: str) -> Tensor:
        """A frozen tensor; raises `RuntimeError` where it holds an average, in another averager's block."""
        open_swaps.refuse_swapped("the average", [self._frozen[name]])
        return self._frozen[name].local()

    @open_swaps.in_turn
    def _held(self) -> dict[str, Tensor]:
        """This rank's shards of what is not frozen, under their first names."""
        self._require_current("the average")
        parts = dict(zip(self._places, self._average.read(self._live), strict=True))
        return parts | {name: copy.clone() for name, copy in self._copies.items()}

    def _named(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Shards under all their names, as DTensors where the model's are."""
        read = {
            name: as_distributed(parts[name], item.held()) for name, item in self._items.items()
        }
        return {name: read[first] for name, first in self._names.items()}

    def _require_current(self, name: str) -> None:
        if self._average.swapped:
            raise RuntimeError(
                f"{name}: inside applied() this average is in the model, and its own tensors may hold "
                "the live weights; leave the block first"
            )
        if self._average.tick != self._tick:
            raise RuntimeError(
                f"{name}: the average was updated after weights() was called; call it again"
            )
