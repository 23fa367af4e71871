"""Tensors that are known before their content is read: their specs, and mappings that read on demand.

`LazyTensors` is the one interface between a source of weights (a file, a folder, an averager, a
combination of files) and everything that uses weights. `specs` gives names, shapes and dtypes without
reading content. `read` gives a tensor or a part of it. `elements` gives a tensor piece by piece.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_PIECE = 1 << 20
_UNDIVIDED = 1 << 15  # elements; torch divides operations on more among its threads
Where = tuple[slice, ...]
"""A part of a tensor: one slice for each dimension; `()` means all of it."""


class TensorSpec(NamedTuple):
    """The shape and dtype of a tensor: all that is known of it before its content is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the content."""
        return self.dtype.itemsize * prod(self.shape)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} of shape {self.shape}"


def spec_of(tensor: Tensor) -> TensorSpec:
    """The spec of a tensor."""
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


class Place(NamedTuple):
    """Where a tensor, or a part of it, lies: in a storage of `nbytes` bytes from byte `start` on.

    `offset` and `stride` count elements, as torch's `as_strided` does. If the storage
    lies in a zip archive, which may be a part of the file, `archive` is where that begins and its
    length. `ranges` are the first index of a part and the end, for each dimension; `()` means all
    of the tensor.
    """

    path: Path
    start: int
    nbytes: int
    offset: int
    stride: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...] = ()
    archive: tuple[int, int] | None = None

    @property
    def where(self) -> Where:
        """The part of the tensor that lies here."""
        return tuple(slice(start, end) for start, end in self.ranges)

    def is_plain(self, spec: TensorSpec) -> bool:
        """Whether the tensor lies row by row, without gaps."""
        layout = torch.empty_strided(spec.shape, self.stride, dtype=spec.dtype, device="meta")
        return layout.is_contiguous()


class Elements(ABC):
    """The elements of one tensor, row by row, for a reader that takes them piece by piece.

    Pieces may be read in any order and by several threads. Call `done` once after the last piece.
    """

    spec: TensorSpec

    @abstractmethod
    def read_(self, out: Tensor, start: int) -> None:
        """Fill the flat tensor `out`, of the same dtype, with the elements from `start` on."""

    def pieces(self, length: int) -> Iterator[Tensor]:
        """The elements in order, `length` at a time; each piece is a tensor of its own."""
        for start in range(0, self.spec.numel, length):
            piece = torch.empty(min(length, self.spec.numel - start), dtype=self.spec.dtype)
            self.read_(piece, start)
            yield piece

    def done(self) -> None:  # noqa: B027  # most have nothing to compare
        """Compare what was read with its checksum.

        Raises `ValueError` if all elements were read and they are not what was written.
        """


class LazyTensors(Mapping[str, Tensor]):
    """name -> tensor, read or computed when asked for."""

    @property
    @abstractmethod
    def specs(self) -> Mapping[str, TensorSpec]:
        """name -> shape and dtype, in order; no content is read for it."""

    @abstractmethod
    def read(self, name: str, where: Where = ()) -> Tensor:
        """A tensor, or the part `where` of it."""

    def spec(self, name: str) -> TensorSpec:
        """The spec of a tensor that must be there."""
        return self.specs[name]

    def release(self, name: str) -> None:
        """Give back the memory that reading a tensor has taken; what was written to it is lost."""

    def elements(self, name: str) -> Elements:
        """The elements of a tensor for reading piece by piece."""
        return _ByParts(self, name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The elements of a tensor, row by row; a piece stays valid until the next is asked for."""
        elements = self.elements(name)
        yield from elements.pieces(_PIECE)
        elements.done()

    def origins(self, name: str) -> tuple[Hashable, ...]:
        """The stored tensors that a tensor is made of: equal for all names of one (tied weights), in any file."""
        return ((id(self), name),)

    def places(self, name: str) -> tuple[Place, ...]:  # noqa: ARG002
        """Where the parts of a tensor with elements lie in files; none if it is not stored as it is read."""
        return ()

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class Held(LazyTensors):
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: spec_of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str, where: Where = ()) -> Tensor:
        return self._tensors[name][where] if where else self._tensors[name]

    def origins(self, name: str) -> tuple[Hashable, ...]:
        tensor, again = self._tensors[name], self._tensors[name]
        start = tensor.data_ptr()
        # A mapping may make its tensors when asked: another tensor can have their address afterwards.
        if not start or again.data_ptr() != start:
            return super().origins(name)
        return ((start, tensor.dtype, tensor.shape, tensor.stride()),)


class Forwarding(LazyTensors):
    """Tensors that lie in other sources."""

    @abstractmethod
    def at(self, name: str) -> tuple[LazyTensors, str]:
        """The source of a tensor, and its name there."""

    def read(self, name: str, where: Where = ()) -> Tensor:
        source, key = self.at(name)
        return source.read(key, where)

    def release(self, name: str) -> None:
        source, key = self.at(name)
        source.release(key)

    def elements(self, name: str) -> Elements:
        source, key = self.at(name)
        return source.elements(key)

    def origins(self, name: str) -> tuple[Hashable, ...]:
        source, key = self.at(name)
        return source.origins(key)

    def places(self, name: str) -> tuple[Place, ...]:
        source, key = self.at(name)
        return source.places(key)

    def __getitem__(self, name: str) -> Tensor:
        source, key = self.at(name)
        return source[key]


class Renamed(Forwarding):
    """Tensors of one or several sources under other names: name -> (source, its name there)."""

    def __init__(self, sources: Mapping[str, tuple[LazyTensors, str]]) -> None:
        self._sources = sources

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        # One `specs` for each source: some sources compute all of theirs each time.
        of_source = {id(source): source.specs for source, _ in self._sources.values()}
        return {name: of_source[id(source)][key] for name, (source, key) in self._sources.items()}

    def at(self, name: str) -> tuple[LazyTensors, str]:
        return self._sources[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def as_lazy(weights: Mapping[str, Tensor]) -> LazyTensors:
    """Weights as `LazyTensors`: themselves, or a plain mapping of tensors in memory."""
    return weights if isinstance(weights, LazyTensors) else Held(weights)


def renamed(source: Mapping[str, Tensor], keys: Mapping[str, str]) -> Renamed:
    """Some tensors of a mapping under other names: name -> key."""
    lazy = as_lazy(source)
    return Renamed({name: (lazy, key) for name, key in keys.items()})


def distinct(weights: LazyTensors) -> dict[str, TensorSpec]:
    """The spec of each tensor, of tied ones under their first name."""
    kept: dict[Hashable, str] = {}
    for name in weights:
        kept.setdefault(weights.origins(name), name)
    return {name: weights.specs[name] for name in kept.values()}


def joined(*sources: Mapping[str, Tensor]) -> Renamed:
    """The tensors of several mappings in one; if several have a name, the last one's tensor counts."""
    return Renamed({name: (as_lazy(source), name) for source in sources for name in source})


class _ByParts(Elements):
    """Elements of a tensor that its source reads by parts (boxes of indices)."""

    def __init__(self, tensors: LazyTensors, name: str) -> None:
        self.spec = tensors.specs[name]
        self._tensors = tensors
        self._name = name

    def read_(self, out: Tensor, start: int) -> None:
        for view in out.split(_UNDIVIDED):
            done = 0
            for where in parts(self.spec.shape, start, start + len(view)):
                part = self._tensors.read(self._name, where).reshape(-1)
                view[done : done + len(part)].copy_(part)
                done += len(part)
            start += len(view)
        # If a tensor lies by columns, a piece may touch all its pages. The pages of many files add up.
        self._tensors.release(self._name)


def parts(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Where]:
    """The boxes that the elements start .. stop - 1 fill, row by row, in order.

    >>> list(parts((4, 3), 1, 7))
    [(slice(0, 1, None), slice(1, 3, None)), (slice(1, 2, None), slice(0, 3, None)), (slice(2, 3, None), slice(0, 1, None))]
    """
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    whole_rows = tuple(slice(0, n) for n in shape[1:])
    while start < stop:
        first, skip = divmod(start, row)
        if skip or stop - start < row:
            end = min(stop - first * row, row)
            for where in parts(shape[1:], skip, end):
                yield slice(first, first + 1), *where
            start = first * row + end
        else:
            yield slice(first, stop // row), *whole_rows
            start = stop // row * row
