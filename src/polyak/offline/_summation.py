"""Sum coefficients times tensors in files, in pieces that fit into the processor's cache.

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
from polyak._modes import ordinary

PIECE_BYTES = 1 << 20
"""The size of a piece of the sum; it is computed while one file after the other is read."""

_UNDIVIDED = 1 << 15  # elements; torch divides larger operations among its threads
_SUMMED = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_MOST_THREADS = 8  # more do not help: they share Python's lock and the bandwidth of the memory


class Summand(NamedTuple):
    """A tensor and its share: `sum <- sum + share (tensor - sum)`; the first share is 1."""

    elements: Elements
    share: float


class _Dtypes(NamedTuple):
    """The dtypes of a sum, of its result, and of all that is read for it."""

    sum: torch.dtype
    result: torch.dtype
    read: frozenset[torch.dtype]

    @property
    def most(self) -> int:
        """The most elements of a piece."""
        return max(PIECE_BYTES // max(self.sum.itemsize, self.result.itemsize), _UNDIVIDED)


class Threads:
    """The threads that sum: as many as torch has, at most 8. They end with this object.

    It keeps the workspaces for the next tensor: the system clears memory that is newly allocated.
    """

    def __init__(self) -> None:
        self.count = min(torch.get_num_threads(), _MOST_THREADS)
        self.submit = ThreadPoolExecutor(self.count, "polyak-sum").submit
        self._idle: dict[_Dtypes, list[_Workspace]] = {}

    def take(self, dtypes: _Dtypes, count: int) -> list[_Workspace]:
        """Workspaces that nothing else uses."""
        idle = self._idle.pop(dtypes, [])
        return [*idle, *(_Workspace(dtypes) for _ in range(count - len(idle)))]

    def give_back(self, dtypes: _Dtypes, spaces: list[_Workspace]) -> None:
        """Keeps workspaces in which nothing is computed any more."""
        self._idle[dtypes] = spaces


class Summation:
    """The sum of summands of one shape: computed in one dtype, returned in another."""

    def __init__(
        self, summands: Sequence[Summand], dtype: torch.dtype, result: torch.dtype
    ) -> None:
        self._summands = summands
        self._size = summands[0].elements.spec.numel
        read = frozenset(summand.elements.spec.dtype for summand in summands)
        self._dtypes = _Dtypes(dtype, result, read | {dtype})
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
        starts = range(0, self._size, length)
        spaces = threads.take(self._dtypes, min(len(starts), 2 * threads.count))
        if len(starts) == 1:  # without a thread
            yield self._sum(spaces[0], 0, length)
        else:
            ahead: deque[Future[Tensor]] = deque()
            for i, start in enumerate(starts):
                ahead.append(threads.submit(self._sum, spaces[i % len(spaces)], start, length))
                # All workspaces are in use: the oldest piece must be consumed before its own is used again.
                if len(ahead) == len(spaces):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        # Not after an exception: threads may still be in them.
        threads.give_back(self._dtypes, spaces)

    def _sum(self, space: _Workspace, start: int, length: int) -> Tensor:
        """The piece from element `start` on."""
        return space.sum_(self._summands, start, min(length, self._size - start), self._doubt)

    def _length(self, threads: int) -> int:
        """The length of a piece, so that each thread computes the same number of pieces.

        Vectorised operations may round their last few elements differently. A length that is a
        multiple of `_UNDIVIDED` makes the last elements of an operation the same for any number of
        threads, except at the end of the tensor.
        """
        rounds = max(1, -(-self._size // (self._dtypes.most * threads)))
        return -(-self._size // (rounds * threads) // _UNDIVIDED) * _UNDIVIDED or _UNDIVIDED

    def _doubt(self) -> None:
        self.doubtful = True


class _Buffer:
    """Memory for a piece: as a whole, and as views that torch does not divide among threads."""

    def __init__(self, most: int, dtype: torch.dtype) -> None:
        self._memory = torch.empty(most, dtype=dtype)

    def fit(self, length: int) -> None:
        """Makes it as long as a piece."""
        self.tensor = self._memory[:length]
        self.views = self.tensor.split(_UNDIVIDED)


class _Workspace:
    """The buffers for one piece: for the sum, for what is read (one per dtype), and for the result."""

    @ordinary
    def __init__(self, dtypes: _Dtypes) -> None:
        self._sum = _Buffer(dtypes.most, dtypes.sum)
        self._read = {stored: _Buffer(dtypes.most, stored) for stored in dtypes.read}
        own = dtypes.result != dtypes.sum
        self._result = _Buffer(dtypes.most, dtypes.result) if own else self._sum
        self._length = -1

    def sum_(
        self,
        summands: Sequence[Summand],
        start: int,
        length: int,
        doubt: Callable[[], None],
    ) -> Tensor:
        """Computes `length` elements of the sum: `sum <- sum + share * (summand - sum)` for each.

        It calls `doubt` if one may be infinite or NaN.
        """
        if length != self._length:
            for buffer in (self._sum, self._result, *self._read.values()):
                buffer.fit(length)
            self._length = length
        total, read = self._sum, self._read[self._sum.tensor.dtype]
        for elements, share in summands:
            if share == 1:  # it replaces what the buffer held before, which may be NaN
                self._read_(elements, start, total)
            else:
                self._read_(elements, start, read)
                # A list of short views: torch divides one long operation among its own threads.
                torch._foreach_lerp_(total.views, read.views, share)
        if total.tensor.dtype in _SUMMED and not _surely_finite(total.tensor):
            doubt()
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
