"""Reading an average by name, one tensor at a time, so that no second copy is in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from polyak._engine.live import ModelTensors
from polyak._engine.slots import Average
from polyak._ranks.sharding import as_distributed


class NamedTensors(Mapping[str, Tensor]):
    """name -> tensor, read or computed when asked for; whether a name is there costs nothing."""

    @property
    @abstractmethod
    def known(self) -> Mapping[str, object]:
        """What is known by each name before its tensor is read, in order."""

    def __contains__(self, name: object) -> bool:
        return name in self.known

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


class AverageWeights(NamedTensors):
    """An average as it is now: name -> a fresh tensor, computed when it is read.

    Tied tensors appear under all their names. Tensors are DTensors where the model's are. Raises
    `RuntimeError` after the next update.
    """

    def __init__(self, live: ModelTensors, average: Average, copies: Sequence[Tensor]) -> None:
        self._live = live
        self._average = average
        self._tick = average.tick
        self._copies = {item.name: copy for item, copy in zip(live.copied, copies, strict=True)}
        self._places = {item.name: i for i, item in enumerate(live.averaged)}
        self._items = {item.name: item for item in live.stored()}
        self._names = {
            n: item.name for item in self._items.values() for n in (item.name, *item.aliases)
        }

    def __getitem__(self, name: str) -> Tensor:
        return as_distributed(self.part(name), self._items[self._names[name]].held())

    def part(self, name: str, where: tuple[slice, ...] = ()) -> Tensor:
        """This rank's shard of the tensor, or the slice `where` of it; nothing else is computed."""
        self._require_current(name)
        first = self._names[name]
        if first in self._copies:
            return self._copies[first][where].clone()
        return self._average.read(self._live, [self._places[first]], where)[0]

    @property
    def known(self) -> Mapping[str, str]:
        """name -> the first name of the same tensor."""
        return self._names

    def whole(self) -> dict[str, Tensor]:
        """The whole average in memory, by one pass over all tensors; tied names share one tensor."""
        self._require_current("the average")
        parts = dict(zip(self._places, self._average.read(self._live), strict=True))
        parts |= {name: copy.clone() for name, copy in self._copies.items()}
        read = {
            name: as_distributed(parts[name], item.held()) for name, item in self._items.items()
        }
        return {name: read[first] for name, first in self._names.items()}

    def _require_current(self, name: str) -> None:
        if self._average.tick != self._tick:
            raise RuntimeError(
                f"{name}: the average was updated after weights() was called; call it again"
            )
