"""Which names of a model mean one tensor, and which different tensors overlap in memory.

Two tensor objects can lie on the same memory: `nn.Parameter(other.weight)`, `detach()`, a parameter
and a buffer, slices of a flat buffer. Where they cover the same elements in the same order they are
one tied tensor. Any other overlap would make `applied` exchange some elements twice and lose them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain, combinations, repeat
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from polyak._ranks.sharding import is_distributed, local, shape

FEW = 32
"""Up to this many tensors on one stretch of memory, each pair is compared; above, elements are marked."""

MOST_STEPS = 10_000
"""A pair that takes more steps to tell apart counts as overlapping. Views made by slicing take tens."""

_OTHER = ""


def identity(tensor: Tensor) -> Hashable:
    """A value that is equal for objects that are one tensor: where its elements are, and how they are read."""
    part = local(tensor)
    start = address(part)
    if start is None:
        return id(part)
    sizes: tuple[int, ...] = part.shape
    strides = part.stride()
    if 1 in sizes:  # the stride of a dimension of size 1 means nothing
        strides = tuple(s for n, s in zip(sizes, strides, strict=True) if n > 1)
    layout = shape(tensor) if is_distributed(tensor) else sizes
    return part.device, start, part.dtype, part.is_conj(), part.is_neg(), layout, strides


class Forms(NamedTuple):
    """Where tensors are, and how their contents are read."""

    addresses: list[int | None]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]


def forms(tensors: Sequence[Tensor]) -> Forms:
    """The forms of many tensors, in one pass for each attribute: a block looks at all of them."""
    return Forms(addresses(tensors), [t.dtype for t in tensors], [t.shape for t in tensors])


def addresses(tensors: Sequence[Tensor]) -> list[int | None]:
    """Where the contents of many tensors begin; an address tells the device as well."""
    try:
        return list(map(Tensor.data_ptr, tensors))
    except RuntimeError:
        return list(map(address, tensors))


def is_freed(tensor: Tensor) -> bool:
    """Whether a tensor has elements and no memory for them, as while a framework has freed them."""
    gone = address(tensor) is None and tensor.numel() > 0
    return gone and tensor.untyped_storage().nbytes() == 0


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor can be written to; writing to one whose storage was freed ends the process."""
    return tensor.data_ptr() != 0 or tensor.numel() == 0


def renew(tensor: Tensor) -> None:
    """Allocates the memory of a tensor whose storage was freed, with any content."""
    if not has_memory(tensor):
        start = int(tensor.storage_offset()) * tensor.element_size()
        tensor.untyped_storage().resize_(start + _reach(tensor))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor are one place in memory, as in an expanded one."""
    if tensor.is_contiguous():
        return False
    dims = sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    reach = 0
    for stride, size in dims:
        if stride <= reach:
            return _returns_to_zero(dims)
        reach += (size - 1) * stride
    return False


def overlap(tensors: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The names of two tensors that share memory; None where there are none. n log n in time.

    Tensors that interleave without an element in common (columns of one matrix) do not overlap.
    """
    collisions = map(_collision, _clusters(tensors))
    return next((found for found in collisions if found is not None), None)


def of_one_storage(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[int]:
    """The places in `a` of views of a storage that `b` has views of: they may share a version counter."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in b if tensor.numel()}
    return [i for i, t in enumerate(a) if t.untyped_storage().data_ptr() in storages]


def meeting(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[int]:
    """The places in `a` of tensors that share memory with one in `b`."""
    names = chain(map(str, range(len(a))), repeat(_OTHER))
    found = []
    for spans in _clusters(zip(names, (*a, *b), strict=False)):
        others = [span for span in spans if span.name == _OTHER]
        mine = (span for span in spans if span.name != _OTHER)
        found += [int(each.name) for each in mine if any(_overlap(each, o) for o in others)]
    return sorted(found)


class _Stretch(NamedTuple):
    """The stretch of memory from a tensor's first byte to behind its last."""

    start: int
    stop: int
    name: str
    tensor: Tensor


class _Span(NamedTuple):
    """A stretch with the tensor's dimensions in bytes."""

    name: str
    start: int
    stop: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


def _span(stretch: _Stretch) -> _Span:
    start, stop, name, tensor = stretch
    itemsize = tensor.element_size()
    strides = tuple(itemsize * stride for stride in tensor.stride())
    return _Span(name, start, stop, tuple(tensor.shape), strides, itemsize)


def _reach(tensor: Tensor) -> int:
    """How many bytes lie from a tensor's first to its last, its gaps included."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def address(tensor: Tensor) -> int | None:
    """Where a tensor's content begins; None where it has none, as an empty or a fake tensor."""
    try:
        return tensor.data_ptr() or None if tensor.numel() else None
    except RuntimeError:  # fake tensors have no address
        return None


def _clusters(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[_Span]]:
    """Groups of tensors of one device whose memory meets, in the order of their addresses."""
    devices: dict[torch.device, list[_Stretch]] = {}
    for name, tensor in tensors:
        part = local(tensor)
        start = address(part)
        if start is not None:
            bytes_ = part.nbytes if part.is_contiguous() else _reach(part)
            stretch = _Stretch(start, start + bytes_, name, part)
            devices.setdefault(part.device, []).append(stretch)
    for stretches in devices.values():
        for run in _meeting_runs(sorted(stretches, key=lambda stretch: stretch[:3])):
            yield list(map(_span, run))


def _meeting_runs(stretches: Sequence[_Stretch]) -> Iterator[list[_Stretch]]:
    """Runs of stretches, sorted by address, that meet; those that lie alone are left out."""
    cluster: list[_Stretch] = []
    end = 0
    for stretch in stretches:
        if stretch.start >= end:
            if len(cluster) > 1:
                yield cluster
            cluster = []
        end = max(end, stretch.stop)
        cluster.append(stretch)
    if len(cluster) > 1:
        yield cluster


def _collision(cluster: list[_Span]) -> tuple[str, str] | None:
    """Two tensors of a cluster that share an element."""
    if len(cluster) > FEW:
        return _marked_twice(cluster)
    return next(((a.name, b.name) for a, b in combinations(cluster, 2) if _overlap(a, b)), None)


def _marked_twice(cluster: list[_Span]) -> tuple[str, str] | None:
    """The first tensor that covers an element which another one has marked, and that other one.

    A model cut into thousands of interleaved columns would need millions of comparisons.
    """
    base, stop = cluster[0].start, max(span.stop for span in cluster)
    unit = stop - base
    for span in cluster:
        unit = gcd(unit, span.start - base, span.itemsize, *span.strides)
    taken = torch.zeros((stop - base) // unit, dtype=torch.bool)
    for i, span in enumerate(cluster):
        sizes = (*span.sizes, span.itemsize // unit)
        strides = (*(stride // unit for stride in span.strides), 1)
        own = taken.as_strided(sizes, strides, (span.start - base) // unit)
        if own.any():
            return next((other.name, span.name) for other in cluster[:i] if _overlap(other, span))
        own.fill_(True)
    return None


def _overlap(a: _Span, b: _Span) -> bool:
    """Whether two tensors have a byte in common.

    A byte of `a` is at `a.start + sum of stride * index`, and so for `b`. They meet where the
    difference of the two sums is `b.start - a.start`. Indices of equal strides are one unknown.
    """
    if a.stop <= b.start or b.stop <= a.start:
        return False
    ranges: dict[int, tuple[int, int]] = {}
    for n, stride in (*zip(a.sizes, a.strides, strict=True), (a.itemsize, 1)):
        low, high = ranges.get(stride, (0, 0))
        ranges[stride] = low, high + n - 1
    for n, stride in (*zip(b.sizes, b.strides, strict=True), (b.itemsize, 1)):
        low, high = ranges.get(stride, (0, 0))
        ranges[stride] = low - (n - 1), high
    return _Sum(ranges).reaches(b.start - a.start)


def _returns_to_zero(dims: Sequence[tuple[int, int]]) -> bool:
    """Whether indices, not all 0, lead back to the same place: `sum of stride * difference = 0`."""
    ordered = sorted(dims, reverse=True)
    for i, (stride, size) in enumerate(ordered):
        if stride == 0:
            return True
        rest: dict[int, tuple[int, int]] = {}
        for other, n in ordered[i + 1 :]:
            low, high = rest.get(other, (0, 0))
            rest[other] = low - (n - 1), high + n - 1
        others = _Sum(rest)
        if any(others.reaches(stride * step) for step in range(1, min(size, MOST_STEPS))):
            return True
    return False


class _Sum:
    """The values of `sum of stride * index` over integer indices, each in its range."""

    def __init__(self, ranges: dict[int, tuple[int, int]]) -> None:
        self._terms = [(s, *ranges[s]) for s in sorted(ranges, reverse=True) if s]
        lows, highs, common = [0], [0], [0]
        for stride, low, high in reversed(self._terms):
            lows.append(lows[-1] + stride * low)
            highs.append(highs[-1] + stride * high)
            common.append(gcd(common[-1], stride))
        self._lows, self._highs, self._common = lows[::-1], highs[::-1], common[::-1]
        self._steps = 0

    def reaches(self, target: int, first: int = 0) -> bool:
        """Whether the terms from the `first` on, the longest strides before the shorter, sum to it."""
        self._steps += 1
        if self._steps > MOST_STEPS:
            return True
        if not self._lows[first] <= target <= self._highs[first]:
            return False
        if first == len(self._terms):
            return True
        if target % self._common[first]:
            return False
        stride, low, high = self._terms[first]
        # What is left for the shorter strides is within their reach for a few indices alone.
        least = max(low, -((self._highs[first + 1] - target) // stride))
        most = min(high, (target - self._lows[first + 1]) // stride)
        return any(self.reaches(target - stride * i, first + 1) for i in range(least, most + 1))
