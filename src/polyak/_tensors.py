"""Tensors: the few in-place operations that averaging needs, on lists of plain tensors.

Nothing here knows a rule, a slot's name or a model. Names end in `_` where they write. Everything
is elementwise, so layout, shape and place of a tensor never matter to the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Kind = tuple[torch.dtype, torch.device]
Groups = list[list[Tensor]]

CHUNK_BYTES = 1 << 20
"""No temporary on a CPU is larger than this: it stays in its cache and is not noticed."""

DEVICE_CHUNK_BYTES = 1 << 25
"""The same on other devices, where a call costs as much as moving some hundred KiB."""

SHARED_BYTES = 1 << 22
"""As much of the live weights as is moved into every average before the next part is read."""


FEW = 8
"""Up to so many tensors, one call for all averages costs less than a call for each."""


def chunk_length(tensors: Sequence[Tensor], *, temporaries: int = 1) -> int:
    """How many elements a part may have so that its temporaries stay within a chunk."""
    size = DEVICE_CHUNK_BYTES if any(t.device.type != "cpu" for t in tensors) else CHUNK_BYTES
    return size // temporaries // max(t.element_size() for t in tensors)


def kind(tensor: Tensor) -> Kind:
    """What tensors must share to be updated by one foreach call: dtype and device."""
    return tensor.dtype, tensor.device


def slot_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype in which weights of `dtype` are averaged: `wanted`, or float32 if `dtype` is narrower.

    A bfloat16 average of decay .999 never moves: its half-unit is larger than the step.

    >>> slot_dtype(torch.bfloat16, None), slot_dtype(torch.complex64, torch.float64)
    (torch.float32, torch.complex128)
    """
    if wanted is not None:
        return wanted.to_complex() if dtype.is_complex else wanted
    if dtype == torch.complex32:
        return torch.complex64
    return torch.float32 if not dtype.is_complex and dtype.itemsize < 4 else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its module: "float32"."""
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def lerp_(slots: list[Tensor], live: list[Tensor], fraction: float) -> None:
    """`slot <- slot + fraction (live - slot)` for each pair; dtypes and devices may differ.

    A fraction of 1 is a copy, since a lerp by 1 into a slot that holds inf or NaN stays NaN.
    lerp, not multiply and add: a constant input is then a fixed point, bit for bit.
    """
    lerp_all_([slots], live, [fraction])


@torch.no_grad()
def lerp_all_(averages: list[list[Tensor]], live: list[Tensor], fractions: list[float]) -> None:
    """`lerp_` of several lists of slots towards the same live weights, which are read once.

    Each list is of one dtype and device. Bytes moved for k lists: 1 + 2k instead of 3k.
    """
    lerps = []
    for slots, fraction in zip(averages, fractions, strict=True):
        if fraction == 1:
            torch._foreach_copy_(slots, live)
        elif fraction != 0:
            lerps.append((slots, fraction))
    if lerps and all(_alike(slots, live) for slots, _ in lerps):
        _lerp_together_(lerps, live)
    elif lerps:
        _lerp_in_parts_(lerps, live)


def _lerp_together_(lerps: list[tuple[list[Tensor], float]], live: list[Tensor]) -> None:
    """Slots of the weights' own kind: as much of the weights at a time as stays in the cache."""
    if len(lerps) == 1:
        _lerp_alike_(lerps[0][0], live, lerps[0][1])
        return
    length = (SHARED_BYTES if live[0].is_cpu else DEVICE_CHUNK_BYTES) // live[0].element_size()
    columns = [slots for slots, _ in lerps]
    whole = sum(map(Tensor.numel, live)) <= length
    for weights, *rows in [[live, *columns]] if whole else parts([live, *columns], length):
        if len(weights) > FEW:
            for slots, (_, fraction) in zip(rows, lerps, strict=True):
                _lerp_alike_(slots, weights, fraction)
        else:
            fractions = [fraction for _, fraction in lerps for _ in weights]
            _lerp_alike_([slot for slots in rows for slot in slots], weights * len(rows), fractions)


def _lerp_alike_(slots: list[Tensor], live: list[Tensor], fraction: float | list[float]) -> None:
    """One foreach call; where a tensor turns out to be of another kind, the rest one by one."""
    try:
        torch._foreach_lerp_(slots, live, fraction)
    except RuntimeError:
        alike = [
            a.dtype == b.dtype and a.device == b.device for a, b in zip(slots, live, strict=True)
        ]
        if all(alike):
            raise
        first = alike.index(False)  # the call goes through the list and has moved those before
        fractions = fraction if isinstance(fraction, list) else [fraction] * len(slots)
        rest = zip(slots[first:], live[first:], fractions[first:], strict=True)
        for slot, weight, each in rest:
            _lerp_in_parts_([([slot], each)], [weight])


def _lerp_in_parts_(lerps: list[tuple[list[Tensor], float]], live: list[Tensor]) -> None:
    """Slots of another kind: each part of the weights is converted once for all of one kind."""
    length = chunk_length([live[0], *(slots[0] for slots, _ in lerps)])
    for weights, *columns in parts([live, *(slots for slots, _ in lerps)], length):
        converted: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for slots, (_, fraction) in zip(columns, lerps, strict=True):
            kind = slots[0].dtype, slots[0].device
            if kind not in converted:
                converted[kind] = [weight.to(kind[1], kind[0]) for weight in weights]
            _lerp_alike_(slots, converted[kind], fraction)


def parts(lists: list[list[Tensor]], length: int) -> Iterator[list[list[Tensor]]]:
    """Parts of parallel lists of tensors, each of at most `length` elements where layouts allow."""
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


@torch.no_grad()
def combine_(out: list[Tensor], terms: list[tuple[list[Tensor], float]]) -> None:
    """`out <- sum of coefficient * tensor`, for coefficients that sum to 1.

    By lerps, `out <- out + c / (sum of c so far) (tensor - out)`: equal terms give themselves, bit
    for bit. Coefficients above 0 come first, so that no sum so far is 0.
    """
    total = 0.0
    counting = [term for term in terms if term[1] != 0]
    for tensors, coefficient in sorted(counting, key=lambda term: term[1] < 0):
        total += coefficient
        lerp_(out, tensors, coefficient / total)


@torch.no_grad()
def exchange_(a: list[Tensor], b: list[Tensor]) -> None:
    """Exchanges the contents of tensors of one dtype, pair by pair, by chunks; pointers stay.

    An exception on the way (no memory) leaves all as they were. It writes through `.data`, which
    autograd does not count: weights that come back bit for bit leave a graph valid.
    """
    done: list[list[list[Tensor]]] = []
    both = [[tensor.data for tensor in each] for each in (a, b)]
    for x, y in parts(both, chunk_length([a[0]])):
        stage = 0
        try:
            kept = [tensor.clone() for tensor in x]
            stage = 1
            torch._foreach_copy_(x, y)
            stage = 2
            torch._foreach_copy_(y, kept)
        except BaseException:
            if stage == 2:
                torch._foreach_copy_(y, x)
            if stage >= 1:
                torch._foreach_copy_(x, kept)
            for before in done:
                exchange_(*before)
            raise
        del kept  # before the next chunk's
        done.append([x, y])


def _alike(slots: list[Tensor], live: list[Tensor]) -> bool:
    """Whether the lists agree in dtype and device: each list is of one kind, so one pair tells."""
    return slots[0].dtype == live[0].dtype and slots[0].device == live[0].device


def _pieces(row: Sequence[Tensor], length: int) -> Iterator[tuple[Tensor, ...]]:
    """Views that cover tensors of one shape in step; one of each whole where layouts differ."""
    flat = [_flat(tensor) for tensor in row]
    if any(f is None for f in flat) or len({t.stride() for t in row}) > 1:
        yield tuple(row)
        return
    yield from zip(*(torch.split(f, length) for f in flat if f is not None), strict=True)


def _flat(tensor: Tensor) -> Tensor | None:
    """A one-dimensional view in memory order, or None where elements overlap or leave gaps."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else None
