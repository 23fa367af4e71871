"""Summing: tensors in files times coefficients, in parts that stay in the processor's cache.

Each part is read from its file into a buffer, which is faster than to copy from mapped memory, and
leaves nothing resident. Several parts are summed at once, each by a thread with operations too small
for torch to divide: torch's own threads wait for each other after each of them, and without end
where others use the processors too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyak.checkpoints import _mapped as mapped
from polyak.checkpoints._parts import Chunked

PIECE_BYTES = 1 << 20
"""As much of a sum is made while one file after the other is read."""

_UNDIVIDED = 1 << 15  # elements; operations on more are divided among torch's threads
_MOST_THREADS = 8  # they share Python's lock and the memory's bandwidth


class Summand(NamedTuple):
    """A tensor and its share: `sum <- sum + share (tensor - sum)`; the first share is 1."""

    tensor: Tensor | Chunked
    share: float


class Threads:
    """The threads that sum: as many as torch has, up to 8. They end with this object."""

    def __init__(self) -> None:
        self.count = min(torch.get_num_threads(), _MOST_THREADS)
        self.submit = ThreadPoolExecutor(self.count, "polyak-sum").submit


class Summation:
    """The sum of summands of one shape: made in one dtype, handed on in another."""

    def __init__(
        self, summands: Sequence[Summand], dtype: torch.dtype, result: torch.dtype
    ) -> None:
        self._summands = [(_Reader(summand.tensor), summand.share) for summand in summands]
        self._others = [reader for reader, _ in self._summands if not reader.from_file]
        self._size = summands[0].tensor.numel()
        self._dtypes = dtype, result

    def pieces(self, threads: Threads) -> Iterator[Tensor]:
        """The elements of the sum, row by row; each piece holds until the next is asked for.

        Each thread makes a piece, and has another one ahead. Raises `ValueError` for a sum that the
        dtype of the result cannot hold.
        """
        each = self._length(threads.count)
        if self._size <= each:
            yield from self._alone()
            return
        starts = range(0, self._size, each)
        places = [self._place(each) for _ in starts[: 2 * threads.count]]
        ahead: deque[Future[Tensor]] = deque()
        for i, start in enumerate(starts):
            if start + each > self._size:
                places[i % len(places)] = self._place(self._size - start)
            ahead.append(threads.submit(places[i % len(places)].sum_, self._summands, start))
            if len(ahead) == len(places):
                yield self._done(ahead)
        while ahead:
            yield self._done(ahead)

    def _alone(self) -> Iterator[Tensor]:
        """The only piece, if there is one: no thread is worth while."""
        if self._size:
            yield self._place(self._size).sum_(self._summands, 0)

    def _length(self, threads: int) -> int:
        """The length of a piece: the same number of them for each thread.

        The last elements of an operation may be rounded otherwise than the rest. For the result not
        to depend on the threads, only a tensor's last are the last of one.
        """
        most = PIECE_BYTES // max(dtype.itemsize for dtype in self._dtypes)
        rounds = max(1, -(-self._size // (most * threads)))
        return -(-self._size // (rounds * threads) // _UNDIVIDED) * _UNDIVIDED or _UNDIVIDED

    def _place(self, length: int) -> _Workspace:
        return _Workspace(length, *self._dtypes, {reader.dtype for reader, _ in self._summands})

    def _done(self, ahead: deque[Future[Tensor]]) -> Tensor:
        piece = ahead.popleft().result()
        for reader in self._others:
            reader.release()
        return piece


class _Buffer:
    """Memory for a piece: whole, in views that torch does not divide, and as bytes."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self.tensor = torch.empty(length, dtype=dtype)
        self.views = self.tensor.split(_UNDIVIDED)
        self.bytes = self.tensor.view(torch.uint8).numpy().data


class _Workspace:
    """Where a piece of a sum is made: buffers for it, for what is read, and for the result."""

    def __init__(
        self, length: int, dtype: torch.dtype, result: torch.dtype, dtypes: set[torch.dtype]
    ) -> None:
        self._sum = _Buffer(length, dtype)
        self._read = {each: _Buffer(length, each) for each in {dtype, *dtypes}}
        self._result = self._sum if result == dtype else _Buffer(length, result)

    def sum_(self, summands: Sequence[tuple[_Reader, float]], start: int) -> Tensor:
        """Makes the piece from element `start` on: `sum <- sum + share (summand - sum)`, summand by summand."""
        total, read = self._sum, self._read[self._sum.tensor.dtype]
        for reader, share in summands:
            if share == 1:
                self._read_(reader, start, total)
            else:
                self._read_(reader, start, read)
                torch._foreach_lerp_(total.views, read.views, share)
        if len(summands) > 1 and not _surely_finite(total.tensor):
            self._keep_infinities_([reader for reader, _ in summands], start)
        if self._result is not total:
            _require_room(total.tensor, self._result.tensor.dtype)
            torch._foreach_copy_(self._result.views, total.views)
        return self._result.tensor

    def _read_(self, reader: _Reader, start: int, into: _Buffer) -> None:
        """Reads a piece of a summand, by way of a buffer of its own dtype where that is another."""
        if reader.dtype == into.tensor.dtype:
            reader.read_(into, start)
        else:
            reader.read_(self._read[reader.dtype], start)
            torch._foreach_copy_(into.views, self._read[reader.dtype].views)

    def _keep_infinities_(self, readers: Sequence[_Reader], start: int) -> None:
        """Infinities that all summands share stay, as in a mask; lerps make NaN of them."""
        read = self._read[self._sum.tensor.dtype]
        self._read_(readers[0], start, read)
        first = read.tensor.clone()
        shared = first.isinf()
        for reader in readers[1:]:
            self._read_(reader, start, read)
            shared &= read.tensor == first
        self._sum.tensor[shared] = first[shared]


class _Reader:
    """Parts of a tensor: read from its file where it lies there row by row, else copied."""

    def __init__(self, tensor: Tensor | Chunked) -> None:
        self.dtype = tensor.dtype
        self._tensor = tensor
        self._file = mapped.place(tensor) if isinstance(tensor, Tensor) else None
        self.from_file = self._file is not None

    def read_(self, into: _Buffer, start: int) -> None:
        """Fills a buffer with the elements from `start` on."""
        if self._file is not None:
            self._file.read(into.bytes, start * self.dtype.itemsize)
            return
        for view in into.views:
            view.copy_(elements(self._tensor, start, start + len(view)))
            start += len(view)

    def release(self) -> None:
        """Gives the memory back that copying from a mapped file has taken."""
        if isinstance(self._tensor, Tensor):
            mapped.release(self._tensor)
        else:
            self._tensor.release()


def elements(tensor: Tensor | Chunked, start: int, stop: int) -> Tensor:
    """The elements start .. stop - 1 of a tensor, row by row; copied only where they lie otherwise.

    >>> elements(torch.arange(6).view(2, 3).T, 1, 4)
    tensor([3, 1, 4])
    """
    if not isinstance(tensor, Tensor):
        return tensor.elements(start, stop)
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


def _surely_finite(tensor: Tensor) -> bool:
    """Whether the sum of all is a finite number: only if each is, and far cheaper to ask."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.add.reduce(tensor.numpy())))


def _require_room(tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises `ValueError` where a finite number is too large for a dtype."""
    limit = torch.finfo(dtype).max
    if limit < torch.finfo(tensor.dtype).max:
        reals = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).numpy()
        largest = max(float(reals.max()), -float(reals.min()))
        if limit < largest < math.inf:
            raise ValueError(f"it has {largest:.6g}, which {dtype} cannot hold")
