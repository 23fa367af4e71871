"""Parts: what a rank needs of tensors that files hold whole, or in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from polyak._checks import difference, report
from polyak._ranks.shard_geometry import Box, box, whole
from polyak._ranks.sharding import as_distributed, is_distributed
from polyak.checkpoints._tensorfile import Form


class Chunked:
    """A tensor that lies in chunks, before any is read; `read(chunk)` gives one.

    `release` gives the memory back that reading has taken.
    """

    def __init__(
        self,
        form: Form,
        chunks: Sequence[Box],
        read: Callable[[Box], Tensor],
        release: Callable[[], object],
    ) -> None:
        self.dtype, self.shape = form
        self.release = release
        self._chunks = chunks
        self._read = read

    def numel(self) -> int:
        return prod(self.shape)

    def part(self, wanted: Box) -> Tensor:
        """A part of it, of which only the chunks are read that it lies in; of one chunk it is a view."""
        overlaps = [(chunk, chunk.overlap(wanted)) for chunk in self._chunks]
        met = [(chunk, common) for chunk, common in overlaps if 0 not in common.shape]
        if len(met) == 1:
            return self._read(met[0][0])[wanted.within(met[0][0])]
        out = torch.empty(wanted.shape, dtype=self.dtype)
        for chunk, common in met:
            out[common.within(wanted)].copy_(self._read(chunk)[common.within(chunk)])
        return out

    def whole(self) -> Tensor:
        """All of it."""
        return self.part(whole(self.shape))

    def elements(self, start: int, stop: int) -> Tensor:
        """The elements start .. stop - 1, row by row."""
        boxes = list(_boxes(self.shape, start, stop))
        return torch.cat([self.part(each).reshape(-1) for each in boxes])


def unread(weights: Mapping[str, Tensor], name: str) -> Tensor | Chunked:
    """A tensor by its name, before its chunks are put together, where it lies in chunks."""
    find: Callable[[str], Tensor | Chunked] = getattr(weights, "unread", weights.__getitem__)
    return find(name)


def cut(held: Tensor | Chunked, like: Tensor | None) -> Tensor:
    """This rank's part of a whole tensor, as a DTensor spread like another; all of it for none.

    A DTensor is such a part already.
    """
    if like is None or is_distributed(held):
        return held.whole() if isinstance(held, Chunked) else held
    assert is_distributed(like)
    own = box(like)
    part = held.part(own) if isinstance(held, Chunked) else held[own.within(whole(held.shape))]
    return as_distributed(part, like)


def cut_all(
    path: Path, where: str, tensors: Mapping[str, Tensor | Chunked], held: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """This rank's part of each tensor, all of those that the model has whole or not at all."""
    sharded = {name: held[name] for name in tensors if is_distributed(held.get(name))}
    wanted = {name: tuple(tensor.shape) for name, tensor in sharded.items()}
    if lines := difference(wanted, {name: tuple(tensors[name].shape) for name in wanted}):
        raise ValueError(report(f"{path}: {where}: other tensors", lines))
    return {name: cut(tensor, sharded.get(name)) for name, tensor in tensors.items()}


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes that elements start .. stop - 1 fill, row by row, in order.

    >>> [each.shape for each in _boxes((4, 3), 1, 11)]
    [(1, 2), (2, 3), (1, 2)]
    """
    if not shape:
        yield Box((), ())
        return
    rows, row = shape[0], prod(shape[1:])
    while start < stop:
        first, skip = divmod(start, row)
        if skip or stop - start < row:
            end = min(stop - first * row, row)
            for each in _boxes(shape[1:], skip, end):
                yield Box((first, *each.offsets), (1, *each.shape))
            start = first * row + end
        else:
            some = min(rows, stop // row) - first
            yield Box((first,) + (0,) * (len(shape) - 1), (some, *shape[1:]))
            start += some * row
