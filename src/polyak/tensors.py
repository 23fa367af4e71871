"""Tensors: the few in-place operations that averaging needs, on lists of plain tensors.

Nothing here knows a rule, a slot's name or a model. Names end in `_` where they write. Everything
is elementwise, so layout, shape and place of a tensor never matter to the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 19
"""A temporary is no larger than this: it fits a CPU's cache and adds nothing that is noticed."""


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


@torch.no_grad()
def lerp_(slots: list[Tensor], live: list[Tensor], fraction: float) -> None:
    """`slot <- slot + fraction (live - slot)` for each pair; dtypes and devices may differ.

    A fraction of 1 is a copy, since a lerp by 1 into a slot that holds inf or NaN stays NaN.
    lerp, not multiply and add: a constant input is then a fixed point, bit for bit.
    """
    if fraction == 1:
        torch._foreach_copy_(slots, live)
    elif _alike(slots, live):
        torch._foreach_lerp_(slots, live, fraction)
    elif fraction != 0:
        for slot, weight in zip(slots, live, strict=True):
            for a, b in _chunks(slot, weight):
                a.lerp_(b.to(a.device, a.dtype), fraction)


@torch.no_grad()
def combine_(out: list[Tensor], terms: list[tuple[list[Tensor], float]]) -> None:
    """`out <- sum of coefficient * tensor`, for coefficients that sum to 1.

    By lerps, `out <- out + c / (sum of c so far) (tensor - out)`: equal terms give themselves, bit
    for bit. The sums so far must not be 0.
    """
    total = 0.0
    for tensors, coefficient in terms:
        total += coefficient
        lerp_(out, tensors, coefficient / total)


@torch.no_grad()
def exchange_(a: Tensor, b: Tensor) -> None:
    """Exchanges the contents of two tensors of one dtype by chunks; pointers stay.

    An exception on the way (no memory, Ctrl-C) leaves both as they were. It writes through `.data`,
    which autograd does not count: weights that come back bit for bit leave a graph valid.
    """
    done: list[tuple[Tensor, Tensor]] = []
    for x, y in _chunks(a.data, b.data):
        kept = x.clone(), y.clone()
        try:
            x.copy_(y)
            y.copy_(kept[0])
            done.append((x, y))
        except BaseException:
            x.copy_(kept[0])
            y.copy_(kept[1])
            for before in done:
                exchange_(*before)
            raise


def _alike(slots: list[Tensor], live: list[Tensor]) -> bool:
    """Whether the lists agree in dtype and device: each list is of one kind, so one pair tells."""
    return slots[0].dtype == live[0].dtype and slots[0].device == live[0].device


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views that cover both tensors, of at most `CHUNK_BYTES` where the layouts agree."""
    flat_a, flat_b = _flat(a), _flat(b)
    if flat_a is None or flat_b is None or (a.stride() != b.stride() and a.numel() > 1):
        yield a, b
        return
    length = CHUNK_BYTES // max(a.element_size(), b.element_size())
    yield from zip(torch.split(flat_a, length), torch.split(flat_b, length), strict=True)


def _flat(tensor: Tensor) -> Tensor | None:
    """A one-dimensional view in memory order, or None where elements overlap or leave gaps."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else None
