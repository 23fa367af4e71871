"""Summation: the sum of coefficients times tensors in files, in pieces that fit into the processor's cache.

Each piece is read from its file into a buffer. This is faster than copying from mapped memory, and no
page of the file stays in memory. Several threads sum one piece each, with operations that are too small
for torch to divide among its own threads: those wait for each other after each operation, and for very
long when other processes use the processors too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyak._lazy import Elements

PIECE_BYTES = 1 << 20
"""The size of a piece of the sum; it is computed while one file after the other is read."""

_UNDIVIDED = 1 << 15  # elements; torch divides larger operations among its threads
_SUMMED = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_MOST_THREADS = 8  # more do not help: they share Python's lock and the bandwidth of the memory


class Summand(NamedTuple):
    """A tensor and its share: `sum <- sum + share (tensor - sum)`; the first share is 1."""

    elements: Elements
    share: float


class Threads:
    """The threads that sum: as many as torch has, at most 8. They end with this object."""

    def __init__(self) -> None:
        self.count = min(torch.get_num_threads(), _MOST_THREADS)
        self.submit = ThreadPoolExecutor(self.count, "polyak-sum").submit


class Summation:
    """The sum of summands of one shape: computed in one dtype, returned in another."""

    def __init__(
        self, summands: Sequence[Summand], dtype: torch.dtype, result: torch.dtype
    ) -> None:
        self._summands = summands
        self._size = summands[0].elements.spec.numel
        self._dtypes = dtype, result
        self.doubtful = False
        """Whether a value of the sum may be infinite or NaN, as far as it is computed."""

    def pieces(self, threads: Threads) -> Iterator[Tensor]:
        """The elements of the sum, row by row; a piece stays valid until the next is asked for.

        Each thread computes one piece and has another one waiting. Raises `ValueError` for a sum that
        the dtype of the result cannot hold, and at the end for a tensor that is damaged in its file.
        """
        yield from self._pieces(threads)
        for elements, _ in self._summands:
            elements.done()

    def _pieces(self, threads: Threads) -> Iterator[Tensor]:
        length = self._length(threads.count)
        if self._size <= length:
            yield from self._alone()
            return
        starts = range(0, self._size, length)
        spaces = [self._workspace(length) for _ in starts[: 2 * threads.count]]
        ahead: deque[Future[Tensor]] = deque()
        for i, start in enumerate(starts):
            if start + length > self._size:
                spaces[i % len(spaces)] = self._workspace(self._size - start)
            ahead.append(threads.submit(spaces[i % len(spaces)].sum_, self._summands, start))
            # All workspaces are in use: the oldest piece must be consumed before its own is used again.
            if len(ahead) == len(spaces):
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _alone(self) -> Iterator[Tensor]:
        """The only piece, if there is one, without a thread."""
        if self._size:
            yield self._workspace(self._size).sum_(self._summands, 0)

    def _length(self, threads: int) -> int:
        """The length of a piece, so that each thread computes the same number of pieces.

        Vectorised operations may round their last few elements differently. A length that is a
        multiple of `_UNDIVIDED` makes the last elements of an operation the same for any number of
        threads, except at the end of the tensor.
        """
        most = PIECE_BYTES // max(dtype.itemsize for dtype in self._dtypes)
        rounds = max(1, -(-self._size // (most * threads)))
        return -(-self._size // (rounds * threads) // _UNDIVIDED) * _UNDIVIDED or _UNDIVIDED

    def _workspace(self, length: int) -> _Workspace:
        dtypes = {elements.spec.dtype for elements, _ in self._summands}
        return _Workspace(length, *self._dtypes, dtypes, self._doubt)

    def _doubt(self) -> None:
        self.doubtful = True


class _Buffer:
    """Memory for a piece: as a whole, and as views that torch does not divide among threads."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self.tensor = torch.empty(length, dtype=dtype)
        self.views = self.tensor.split(_UNDIVIDED)


class _Workspace:
    """The buffers for one piece: for the sum, for what is read (one per dtype), and for the result."""

    def __init__(
        self,
        length: int,
        dtype: torch.dtype,
        result: torch.dtype,
        dtypes: set[torch.dtype],
        doubt: Callable[[], None],
    ) -> None:
        self._doubt = doubt
        self._sum = _Buffer(length, dtype)
        self._read = {stored: _Buffer(length, stored) for stored in {dtype, *dtypes}}
        self._result = self._sum if result == dtype else _Buffer(length, result)

    def sum_(self, summands: Sequence[Summand], start: int) -> Tensor:
        """Computes the piece from element `start` on: `sum <- sum + share * (summand - sum)` for each."""
        total, read = self._sum, self._read[self._sum.tensor.dtype]
        for elements, share in summands:
            if share == 1:
                self._read_(elements, start, total)
            else:
                self._read_(elements, start, read)
                torch._foreach_lerp_(total.views, read.views, share)
        if total.tensor.dtype in _SUMMED and not _surely_finite(total.tensor):
            self._doubt()
            if len(summands) > 1:
                self._keep_infinities_([elements for elements, _ in summands], start)
        if self._result is not total:
            _require_room(total.tensor, self._result.tensor.dtype)
            torch._foreach_copy_(self._result.views, total.views)
        return self._result.tensor

    def _read_(self, elements: Elements, start: int, into: _Buffer) -> None:
        """Reads a piece of a summand, through a buffer of its own dtype if that differs."""
        dtype = elements.spec.dtype
        if dtype == into.tensor.dtype:
            elements.read_(into.tensor, start)
        else:
            elements.read_(self._read[dtype].tensor, start)
            torch._foreach_copy_(into.views, self._read[dtype].views)

    def _keep_infinities_(self, summands: Sequence[Elements], start: int) -> None:
        """Restores infinities that all summands share, as in a mask: a lerp turns them into NaN."""
        read = self._read[self._sum.tensor.dtype]
        self._read_(summands[0], start, read)
        first = read.tensor.clone()
        shared = first.isinf()
        for elements in summands[1:]:
            self._read_(elements, start, read)
            shared &= read.tensor == first
        self._sum.tensor[shared] = first[shared]


def _surely_finite(tensor: Tensor) -> bool:
    """Whether the sum of all elements is finite. Then each element is, and this check is much faster."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.add.reduce(tensor.numpy())))


def _require_room(tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises `ValueError` if a finite number is too large for a dtype."""
    limit = torch.finfo(dtype).max
    if limit < torch.finfo(tensor.dtype).max:
        reals = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).numpy()
        largest = max(float(reals.max()), -float(reals.min()))
        if limit < largest < math.inf:
            raise ValueError(f"it has {largest:.6g}, which {dtype} cannot hold")
