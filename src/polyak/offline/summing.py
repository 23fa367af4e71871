"""Summing: tensors in files times coefficients, in parts that stay in the processor's cache.

Each part is read from its file into a buffer, which is faster than to copy from mapped memory, and
leaves nothing resident. Several parts are summed at once, each by a thread with operations too small
for torch to divide: torch's own threads wait for each other after each of them, and without end
where others use the processors too.
"""

from __future__ import annotations

import cmath
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from polyak.checkpoints import mapped

PART_BYTES = 1 << 19
"""As much of a sum is made while one file after the other is read."""

PIECE_BYTES = 1 << 20
"""As much of a sum is handed on at a time; each thread makes a piece, and another ahead."""

_UNDIVIDED = 3 << 13  # elements; torch divides an operation on 2**15 among its threads
_MOST_THREADS = 8  # they share Python's lock and the memory's bandwidth


class Term(NamedTuple):
    """A tensor and its share: `sum <- sum + share (tensor - sum)`; the first share is 1."""

    tensor: Tensor
    share: float


class Threads:
    """The threads that sum: as many as torch has, up to 8. They end with this object."""

    def __init__(self) -> None:
        self.count = min(torch.get_num_threads(), _MOST_THREADS)
        self.submit = ThreadPoolExecutor(self.count, "polyak-sum").submit


class Summation:
    """The sum of terms of one shape: made in one dtype, handed on in another."""

    def __init__(self, terms: Sequence[Term], dtype: torch.dtype, result: torch.dtype) -> None:
        self._terms = [(_Reader(term.tensor), term.share) for term in terms]
        self._size = terms[0].tensor.numel()
        self._dtype = dtype
        self._result = result

    def pieces(self, threads: Threads) -> Iterator[Tensor]:
        """The elements of the sum, row by row; each piece holds until the next is asked for.

        Raises `ValueError` for a sum that the dtype of the result cannot hold.
        """
        each = self._piece(threads.count)
        starts = range(0, self._size, each)
        outs = [torch.empty(each, dtype=self._result) for _ in starts[: 2 * threads.count]]

        def begin(i: int) -> Future[Tensor]:
            out = outs[i % len(outs)][: self._size - starts[i]]
            return threads.submit(self._sum_, out, starts[i])

        ahead = deque(begin(i) for i in range(len(outs)))
        for i in range(len(starts)):
            yield ahead.popleft().result()
            if i + len(outs) < len(starts):
                ahead.append(begin(i + len(outs)))
            for reader, _ in self._terms:
                reader.release()

    def _piece(self, threads: int) -> int:
        """The length of a piece: the same number of them for each thread.

        The last elements of an operation may be rounded otherwise than the rest. For the result not
        to depend on the threads, only a tensor's last are the last of one.
        """
        most = PIECE_BYTES // self._result.itemsize
        rounds = max(1, -(-self._size // (most * threads)))
        return -(-self._size // (rounds * threads) // _UNDIVIDED) * _UNDIVIDED or _UNDIVIDED

    def _sum_(self, out: Tensor, start: int) -> Tensor:
        """Writes the elements of the sum from `start` on, and gives them back."""
        length = PART_BYTES // max(self._dtype.itemsize, self._result.itemsize)
        buffers = None
        for part in out.split(length):
            if buffers is None or len(buffers.sum.tensor) != len(part):
                dtypes = [reader.dtype for reader, _ in self._terms]
                buffers = _Buffers(len(part), self._dtype, dtypes)
            buffers.combine_(self._terms, start)
            _narrow_(part, buffers.sum)
            start += len(part)
        return out


class _Buffer:
    """Memory for a part of a tensor: whole, in views that torch does not divide, and as bytes."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self.tensor = torch.empty(length, dtype=dtype)
        self.views = self.tensor.split(_UNDIVIDED)
        self.bytes = self.tensor.view(torch.uint8).numpy().data


class _Buffers:
    """What a thread needs to sum parts of one length."""

    def __init__(self, length: int, dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> None:
        self.sum = _Buffer(length, dtype)
        self._read = {each: _Buffer(length, each) for each in {dtype, *dtypes}}

    def combine_(self, terms: Sequence[tuple[_Reader, float]], start: int) -> None:
        """`sum <- sum + share (term - sum)`, term by term."""
        for reader, share in terms:
            if share == 1:
                self._read_(reader, start, self.sum)
            else:
                read = self._read[self.sum.tensor.dtype]
                self._read_(reader, start, read)
                torch._foreach_lerp_(self.sum.views, read.views, share)
        # A sum is a finite number only of finite numbers, and far cheaper than asking each.
        if not all(cmath.isfinite(view.sum().item()) for view in self.sum.views):
            self._keep_infinities_([reader for reader, _ in terms], start)

    def _read_(self, reader: _Reader, start: int, into: _Buffer) -> None:
        """Reads a part, by way of a buffer of its own dtype where that is another."""
        if reader.dtype == into.tensor.dtype:
            reader.read_(into, start)
        else:
            reader.read_(self._read[reader.dtype], start)
            torch._foreach_copy_(into.views, self._read[reader.dtype].views)

    def _keep_infinities_(self, readers: Sequence[_Reader], start: int) -> None:
        """Infinities that all terms share stay, as in a mask; lerps make NaN of them."""
        read = self._read[self.sum.tensor.dtype]
        self._read_(readers[0], start, read)
        first = read.tensor.clone()
        shared = first.isinf()
        for reader in readers[1:]:
            self._read_(reader, start, read)
            shared &= read.tensor == first
        self.sum.tensor[shared] = first[shared]


class _Reader:
    """Parts of a tensor: read from its file where it lies there row by row, else copied."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._tensor = tensor
        self._place = mapped.place(tensor)

    def read_(self, into: _Buffer, start: int) -> None:
        """Fills a buffer with the elements from `start` on."""
        if self._place is not None:
            self._place.read(into.bytes, start * self.dtype.itemsize)
            return
        for view in into.views:
            view.copy_(elements(self._tensor, start, start + len(view)))
            start += len(view)

    def release(self) -> None:
        """Gives the memory back that copying from a mapped file has taken."""
        if self._place is None:
            mapped.release(self._tensor)


def elements(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The elements start .. stop - 1 of a tensor, row by row; copied only where they lie otherwise.

    >>> elements(torch.arange(6).view(2, 3).T, 1, 4)
    tensor([3, 1, 4])
    """
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    row = tensor[0].numel()
    first, last = start // row, (stop - 1) // row
    if first == last:
        return elements(tensor[first], start - first * row, stop - first * row)
    if row <= stop - start:
        return tensor[first : last + 1].reshape(-1)[start - first * row : stop - first * row]
    middle = last * row
    return torch.cat([elements(tensor, start, middle), elements(tensor, middle, stop)])


def _narrow_(out: Tensor, found: _Buffer) -> None:
    """Copies to another dtype; raises `ValueError` where a finite number is too large for it."""
    if _limit(out.dtype) < _limit(found.tensor.dtype):
        for view in found.views:
            reals = torch.view_as_real(view) if view.is_complex() else view
            largest = max(abs(float(each)) for each in reals.aminmax())
            if _limit(out.dtype) < largest < math.inf:
                raise ValueError(f"it has {largest:.6g}, which {out.dtype} cannot hold")
    torch._foreach_copy_(out.split(_UNDIVIDED), found.views)


def _limit(dtype: torch.dtype) -> float:
    """The largest number of a dtype, where it may be too small."""
    return torch.finfo(dtype).max if dtype.is_floating_point or dtype.is_complex else math.inf
