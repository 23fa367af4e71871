"""The data of stacked runs: what they share is kept once, and each has its own order of batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyak.study._loop import epoch
from polyak.study._study import Part


class Rows(NamedTuple):
    """A part of the data of all runs; a dimension of 0 is the run, None is shared by all."""

    tensors: Part
    dims: tuple[int | None, ...]

    @property
    def length(self) -> int:
        """The rows of a run."""
        return self.tensors[0].shape[0 if self.dims[0] is None else 1]

    def keep(self, rows: Tensor) -> Rows:
        """The part of some of the runs."""
        pairs = zip(self.tensors, self.dims, strict=True)
        return Rows(tuple(t if dim is None else t[rows] for t, dim in pairs), self.dims)


def rows_of(several: Sequence[Part]) -> Rows:
    """The parts of several runs; what is equal in all of them is kept once."""
    tensors, dims = [], []
    for column in zip(*several, strict=True):
        shared = all(torch.equal(column[0], other) for other in column[1:])
        tensors.append(column[0] if shared else torch.stack(column))
        dims.append(None if shared else 0)
    return Rows(tuple(tensors), tuple(dims))


class Batches:
    """Batches (runs, rows, ...) of the training parts, in each run's own order."""

    def __init__(
        self, several: Sequence[Part], batch_size: int, orders: Sequence[torch.Generator]
    ) -> None:
        self._whole, self._rows = rows_of(several), len(several[0][0])
        self._batch_size, self._orders = batch_size, list(orders)
        self._left = torch.empty(len(orders), 0, dtype=torch.int64)

    def next(self) -> Rows:
        """The next batch of every run."""
        if not self._left.numel():
            self._left = torch.stack([epoch(self._rows, order) for order in self._orders])
        rows, self._left = self._left[:, : self._batch_size], self._left[:, self._batch_size :]
        runs = torch.arange(len(rows))[:, None]
        pairs = zip(*self._whole, strict=True)
        batch = tuple(t[rows] if dim is None else t[runs, rows] for t, dim in pairs)
        return Rows(batch, tuple(0 for _ in batch))

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the runs."""
        self._whole, self._left = self._whole.keep(rows), self._left[rows]
        self._orders = [self._orders[number] for number in rows.tolist()]
