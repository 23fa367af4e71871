"""How the tensors of two checkpoints differ, with one piece of each in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from polyak._dtypes import dtype_name, has_mean
from polyak._lazy import LazyTensors, TensorSpec, as_lazy, renamed
from polyak.checkpoints._checkpoint import Weights

PIECE = 3 << 13
"""The number of elements compared at a time; torch divides 2^15 and more among its threads, which wait."""

_BEYOND_FLOAT64 = {torch.int64, torch.uint64}


@dataclass(frozen=True)
class Difference:
    """How two tensors of one name differ: the dtypes and shapes of both, and their distance.

    `relative` is |a - b| / |a| with L2 norms over the elements, infinite if a is all zeros. `largest` is
    the largest |a - b| of an element, `elements` the number of elements that differ. All are None if
    the shapes differ. NaN equals NaN here, and is infinitely far from a number.
    """

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    relative: float | None = None
    largest: float | None = None
    elements: int | None = None

    @property
    def equal(self) -> bool:
        """Whether dtype, shape and all numbers are the same."""
        return self.elements == 0 and self.dtypes[0] == self.dtypes[1]


@dataclass(frozen=True)
class Comparison:
    """How two sets of weights differ.

    `only_a` and `only_b` are the names that only one of them has. `tensors` are those of both: first
    those whose shapes differ, then the others by `relative`, the largest first. `relative` is
    |a - b| / |a| over all floating-point and complex tensors of equal shape, taken as one vector.
    """

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    tensors: tuple[Difference, ...]
    relative: float

    @property
    def different(self) -> tuple[Difference, ...]:
        """The tensors of both that are not equal."""
        return tuple(difference for difference in self.tensors if not difference.equal)

    @property
    def equal(self) -> bool:
        """Whether both have the same names, dtypes, shapes and numbers."""
        return not (self.only_a or self.only_b or self.different)

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain data, for JSON."""
        return {"equal": self.equal, **asdict(self)}


def compare(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Comparison:
    """Compare two sets of weights: names, dtypes, shapes and numbers.

    Numbers are compared in float64, integers exactly; -0 equals 0. `progress(bytes of a compared,
    bytes in all)` is called after each tensor.

    >>> a = {"w": torch.tensor([3.0, 4.0]), "steps": torch.tensor(7)}
    >>> found = compare(a, {"w": torch.tensor([3.0, 4.5]), "steps": torch.tensor(7)})
    >>> found.relative, found.equal, [each.name for each in found.different]
    (0.1, False, ['w'])
    """
    a, b = of_one_model(as_lazy(a), as_lazy(b))
    of_a, of_b = a.specs, b.specs
    shared = [name for name in of_a if name in of_b]
    total, done = sum(of_a[name].nbytes for name in shared), 0
    found, sums = [], _Sums()
    for name in shared:
        difference, of_name = _difference(name, a, b, of_a[name], of_b[name])
        found.append(difference)
        # A counter of steps would outweigh all weights.
        counts = has_mean(of_a[name].dtype) and has_mean(of_b[name].dtype)
        sums += of_name if counts else _Sums()
        done += of_a[name].nbytes
        if progress is not None:
            progress(done, total)
    only_a = tuple(name for name in of_a if name not in of_b)
    only_b = tuple(name for name in of_b if name not in of_a)
    return Comparison(only_a, only_b, tuple(sorted(found, key=_order)), sums.relative)


def of_one_model(*sources: LazyTensors) -> list[LazyTensors]:
    """The sources without the names of tied tensors that another source leaves out, as some files do."""
    shared = set.intersection(*(set(source.specs) for source in sources))
    return [_without_ties(source, shared) for source in sources]


def _without_ties(source: LazyTensors, kept: set[str]) -> LazyTensors:
    """The source without the names of tensors that it also has under a name that is kept."""
    more = set(source.specs) - kept
    origins = {source.origins(name) for name in kept} if more else set()
    tied = {name for name in more if source.origins(name) in origins}
    return renamed(source, {n: n for n in source if n not in tied}) if tied else source


@dataclass(frozen=True)
class _Sums:
    """Sums over elements of |a - b|^2 and |a|^2, the number of differences, and the largest."""

    apart: float = 0.0
    whole: float = 0.0
    elements: int = 0
    largest: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.apart + other.apart,
            self.whole + other.whole,
            self.elements + other.elements,
            max(self.largest, other.largest),
        )

    @property
    def relative(self) -> float:
        if self.elements == 0:
            return 0.0
        finite = self.whole > 0 and math.isfinite(self.apart)
        return math.sqrt(self.apart / self.whole) if finite else math.inf


def _difference(
    name: str, a: Weights, b: Weights, of_a: TensorSpec, of_b: TensorSpec
) -> tuple[Difference, _Sums]:
    dtypes = (dtype_name(of_a.dtype), dtype_name(of_b.dtype))
    shapes = (of_a.shape, of_b.shape)
    if of_a.shape != of_b.shape:
        return Difference(name, dtypes, shapes), _Sums()
    first, second = a.elements(name), b.elements(name)
    sums = sum(map(_sums, first.pieces(PIECE), second.pieces(PIECE)), _Sums())
    first.done()
    second.done()
    found = (sums.relative, sums.largest, sums.elements)
    return Difference(name, dtypes, shapes, *found), sums


def _sums(a: Tensor, b: Tensor) -> _Sums:
    # In float64, since float32 sums of many squares lose the small ones.
    wide_a, wide_b = wide(a), wide(b)
    if a.dtype.is_complex or b.dtype.is_complex or {a.dtype, b.dtype} & _BEYOND_FLOAT64:
        return _careful_sums(a, b, wide_a, wide_b)
    apart = wide_a - wide_b
    sums = float(apart.square().sum()), float(wide_a.square().sum())
    if not math.isfinite(sum(sums)):
        return _careful_sums(a, b, wide_a, wide_b)
    low, high = map(float, apart.aminmax())
    return _Sums(*sums, int(apart.count_nonzero()), max(-low, high))


def _careful_sums(a: Tensor, b: Tensor, wide_a: Tensor, wide_b: Tensor) -> _Sums:
    """The sums for infinities and NaN, complex numbers, and integers of 64 bits."""
    differs = (wide_a != wide_b) & ~(wide_a.isnan() & wide_b.isnan())
    if a.dtype == b.dtype and a.dtype in _BEYOND_FLOAT64:
        differs = a.view(torch.int64) != b.view(torch.int64)
    apart = (wide_a - wide_b).abs().masked_fill(~differs, 0.0)
    apart = apart.nan_to_num(nan=math.inf, posinf=math.inf)
    size = wide_a.abs()
    whole = size.masked_fill(~size.isfinite(), 0.0)
    sums = float(apart.square().sum()), float(whole.square().sum())
    return _Sums(*sums, int(differs.sum()), float(apart.max()))


def wide(piece: Tensor) -> Tensor:
    """A tensor as float64 or complex128."""
    return piece.to(torch.complex128 if piece.dtype.is_complex else torch.float64)


def _order(difference: Difference) -> float:
    return -math.inf if difference.relative is None else -difference.relative
