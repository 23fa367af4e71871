"""What a pickle's data mean: values made by the reader's own tables, however the data are nested."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from polyak.checkpoints._pickles import SCALARS, Call, Name, key

_DEPTH = 100
_LEAST_VALUES = 1_000_000  # that a pickle may mean, written out, however short it is


class Meaning:
    """Turns a pickle's data into values: `meanings` says what each name means, with its arguments.

    `meanings[name]` gets the `Call` and this object; it calls it on those arguments that it needs.
    A name by itself means `constants[name]`. Raises `ValueError`, with the place in the structure,
    for nesting beyond 100 levels, for what contains itself, and for what would be far larger
    written out than in the file.
    """

    def __init__(
        self,
        meanings: Mapping[str, Callable[[Call, Meaning], object]],
        constants: Mapping[str, object],
        length: int,
    ) -> None:
        self._meanings = meanings
        self._constants = constants
        self._room = _LEAST_VALUES + 8 * length
        self._path: list[object] = []
        self._done: dict[int, tuple[object, int, object]] = {}
        self._doing: set[int] = set()
        self._count = 0

    @property
    def place(self) -> str:
        """Where in the structure the value that is being read stands: `model.weight`."""
        return ".".join(str(part)[:200] for part in self._path) or "the top"

    def __call__(self, data: object) -> Any:
        """The value of a pickle's data."""
        self._count += 1
        if isinstance(data, SCALARS):
            self._count += len(data) if isinstance(data, (str, bytes)) else 0
            return data
        if id(data) in self._done:
            value, count, _ = self._done[id(data)]
            self._count += count
        else:
            before = self._count
            value = self._guarded(data)
            self._done[id(data)] = (value, self._count - before, data)  # data, to keep its id
        if self._count > self._room:
            raise ValueError(f"{self.place}: the same parts are repeated over and over")
        return value

    def at(self, name: object, data: object) -> Any:
        """The value of a part, under its key."""
        self._path.append(name)
        value = self(data)
        self._path.pop()
        return value

    def _guarded(self, data: object) -> object:
        if id(data) in self._doing:
            raise ValueError(f"{self.place} contains itself")
        if len(self._doing) >= _DEPTH:
            raise ValueError(f"{self.place}: nested in more than {_DEPTH} levels")
        self._doing.add(id(data))
        value = self._value(data)
        self._doing.remove(id(data))
        return value

    def _value(self, data: object) -> object:
        if isinstance(data, Call):
            if data.name not in self._meanings:
                raise ValueError(f"{self.place}: a call of {data.name}, which makes no value")
            return self._meanings[data.name](data, self)
        if isinstance(data, Name):
            if data.text not in self._constants:
                raise ValueError(f"{self.place} is {data.text} itself, no value")
            return self._constants[data.text]
        if isinstance(data, dict):
            return self.pairs(data.items())
        if isinstance(data, (set, frozenset)):
            return type(data)(self.keys(data))
        if isinstance(data, list):
            return [self.at(place, part) for place, part in enumerate(data)]
        if type(data) is tuple:
            return tuple(self.at(place, part) for place, part in enumerate(data))
        if isinstance(data, (bytearray, complex)):
            return data
        raise ValueError(f"{self.place} is a storage without its tensor: save the tensor")

    def pairs(self, items: Iterable[tuple[object, object]]) -> dict[Any, Any]:
        """A dictionary of values."""
        return {self._key(name): self.at(name, value) for name, value in items}

    def keys(self, items: Iterable[object]) -> list[Any]:
        """Keys: values that are small and flat."""
        return [self._key(item) for item in items]

    def _key(self, data: object) -> Any:
        self._count += 1
        return key(self(data) if isinstance(data, (Call, Name)) else data)
