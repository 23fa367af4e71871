"""Lists of tensors in parts that fit a cache, converted to the dtype and device of their slots.

All operations of averaging are elementwise, so where tensors are cut never changes a result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from polyak._dtypes import Kind, kind
from polyak._modes import ordinary

CHUNK_BYTES = 1 << 20
"""The most bytes of a temporary tensor on a CPU, so that it stays in the cache."""

DEVICE_CHUNK_BYTES = 1 << 25
"""The same on other devices, where one call costs as much as moving some hundred KiB."""


def chunk_length(tensors: Sequence[Tensor], *, temporaries: int = 1) -> int:
    """The most elements of a part, so that its temporaries fit into one chunk."""
    size = DEVICE_CHUNK_BYTES if any(t.device.type != "cpu" for t in tensors) else CHUNK_BYTES
    return size // temporaries // max(t.element_size() for t in tensors)


class Stage:
    """A reused buffer in which weights take on the dtype and device of their slots, part by part.

    A `.to` for each tensor is a Python call and an allocation for each. One foreach copy of many
    tensors, into views that are made once, takes a third of the time. A part has at most `length`
    elements. All weights and slots have the shapes of `slots`; their layouts may differ.
    """

    @ordinary
    def __init__(self, slots: list[Tensor], length: int, buffer: Tensor) -> None:
        numels = [slot.numel() for slot in slots]
        self._length, self._buffer = length, buffer
        self._runs = [(*run, self._views(slots[slice(*run)])) for run in _runs(numels, length)]

    def parts(
        self, live: list[Tensor], columns: list[list[Tensor]]
    ) -> Iterator[list[list[Tensor]]]:
        """Converted weights, then the slots of each column beside them. The next part overwrites."""
        for start, stop, views in self._runs:
            rows = [column[start:stop] for column in columns]
            if views:
                torch._foreach_copy_(views, live[start:stop])
                yield [views, *rows]
            else:
                for piece, *slots in _pieces(
                    [live[start], *(row[0] for row in rows)], self._length
                ):
                    yield [[self._converted(piece)], *([slot] for slot in slots)]

    def _views(self, slots: list[Tensor]) -> list[Tensor]:
        """The buffer divided into views like the slots; none where a single slot exceeds it."""
        if slots[0].numel() > self._length:
            return []
        views, start = [], 0
        for slot in slots:
            flat = self._buffer[start : start + slot.numel()]
            # With the slot's own strides, copy and lerp run through memory in order.
            strided = not slot.is_contiguous() and _flat(slot) is not None
            size = slot.size()
            views.append(flat.as_strided(size, slot.stride()) if strided else flat.view(size))
            start += slot.numel()
        return views

    def _converted(self, piece: Tensor) -> Tensor:
        if piece.numel() > self._length:  # a long tensor with another layout than its slot
            return piece.to(self._buffer.device, self._buffer.dtype)
        # Not `copy_`: from float32 to float16 it takes a negative view (`_neg_view`) for what is stored.
        part = self._buffer[: piece.numel()]
        torch._foreach_copy_([part], [piece])
        return part


class Stages:
    """The stages of a model's groups, made when first needed. Slots of one kind share one buffer."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, Kind], Stage] = {}
        self._buffers: dict[Kind, Tensor] = {}

    def of(self, group: int, slots: list[Tensor], length: int) -> Stage:
        """The stage for the slots of a group, whose parts have at most `length` elements."""
        key = group, kind(slots[0])
        if key not in self._made:
            self._made[key] = Stage(slots, length, self._buffer(slots, length))
        return self._made[key]

    @ordinary
    def _buffer(self, slots: list[Tensor], length: int) -> Tensor:
        wanted, (dtype, device) = min(length, sum(map(Tensor.numel, slots))), kind(slots[0])
        buffer = self._buffers.get((dtype, device))
        if buffer is None or buffer.numel() < wanted:
            buffer = torch.empty(wanted, dtype=dtype, device=device)
            self._buffers[dtype, device] = buffer
            # Stages of other groups would keep the smaller buffer alive: they are made anew.
            self._made = {key: stage for key, stage in self._made.items() if key[1] != kind(buffer)}
        return buffer


def _runs(numels: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """Ranges of tensors with at most `length` elements together; a longer tensor is alone."""
    start = elements = 0
    for i, numel in enumerate(numels):
        if i > start and elements + numel > length:
            yield start, i
            start, elements = i, 0
        elements += numel
    yield start, len(numels)


def parts(lists: list[list[Tensor]], length: int) -> Iterator[list[list[Tensor]]]:
    """Cuts parallel lists of tensors into parts of at most `length` elements, where layouts allow."""
    gathered: list[tuple[Tensor, ...]] = []
    elements = 0
    for row in zip(*lists, strict=True):
        numel = row[0].numel()
        if gathered and elements + numel > length:
            yield [list(column) for column in zip(*gathered, strict=True)]
            gathered, elements = [], 0
        if numel > length:
            yield from ([[piece] for piece in pieces] for pieces in _pieces(row, length))
        else:
            gathered.append(row)
            elements += numel
    if gathered:
        yield [list(column) for column in zip(*gathered, strict=True)]


def _pieces(row: Sequence[Tensor], length: int) -> Iterator[tuple[Tensor, ...]]:
    """Views that cover tensors of one shape in step; the whole tensors where layouts differ."""
    flat = [_flat(tensor) for tensor in row]
    if any(f is None for f in flat) or len({t.stride() for t in row}) > 1:
        yield tuple(row)
        return
    yield from zip(*(torch.split(f, length) for f in flat if f is not None), strict=True)


def _flat(tensor: Tensor) -> Tensor | None:
    """A one-dimensional view in memory order, or None if elements overlap or leave gaps."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else None
