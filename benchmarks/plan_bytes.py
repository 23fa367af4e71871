"""The arithmetic of the plan: which elements of a model lie on which rank, and what follows in bytes.

A cut divides one dimension of a parameter among ranks as `torch.chunk` does: the first ranks have
`ceil(length / parts)` rows each, one may have fewer, and the last may have none. Cuts of one parameter
are made one after the other, each of what the one before has left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from plan_models import Model, Parameters

FLOAT32, BFLOAT16 = 4, 2


class Cut(NamedTuple):
    """Dimension `dim` in `parts`; rank r has part `r // stride % parts`."""

    dim: int
    parts: int
    stride: int = 1


Cuts = Callable[[Parameters], tuple[Cut, ...]]


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks; `copies` is how often each element is held."""

    name: str
    ranks: int
    cuts: Cuts
    copies: int = 1


def rows(length: int, parts: int, index: int) -> int:
    """How many of `length` rows part `index` of `parts` has: 10 in 4 parts are 3, 3, 3, 1."""
    each = -(-length // parts)
    return max(0, min(each, length - index * each))


def part(parameters: Parameters, layout: Layout, rank: int) -> tuple[int, ...]:
    """The shape of a rank's part of each of some parameters."""
    shape = list(parameters.shape)
    for dim, parts, stride in layout.cuts(parameters):
        shape[dim] = rows(shape[dim], parts, rank // stride % parts)
    return tuple(shape)


def elements(model: Model, layout: Layout, rank: int) -> int:
    """How many elements of a model a rank holds; no rank holds more than rank 0."""
    return sum(p.count * math.prod(part(p, layout, rank)) for p in model.parameters)


def unevenness(model: Model, layout: Layout) -> float:
    """The elements of the fullest rank over their mean."""
    return elements(model, layout, 0) / (model.numel * layout.copies / layout.ranks)


def fully_sharded(ranks: int) -> Layout:
    """FSDP2, and `Averager(..., shard=)` under DDP: the rows of every parameter over all ranks."""
    return Layout("rows over all ranks", ranks, lambda _: (Cut(0, ranks),))


def hybrid(ranks: int, shard: int) -> Layout:
    """HSDP: rows over `shard` ranks, the same on each of the groups of so many ranks."""
    name = f"rows over {shard} ranks, replicated"
    return Layout(name, ranks, lambda _: (Cut(0, shard),), copies=ranks // shard)


def tensor_parallel(ranks: int, tensor: int) -> Layout:
    """FSDP2 over tensor parallelism: columns or rows over `tensor` ranks, then rows over the others."""
    data = Cut(0, ranks // tensor, tensor)
    first = {"column": (Cut(0, tensor),), "row": (Cut(1, tensor),)}
    name = f"tensor parallel {tensor}, rows over the others"
    return Layout(name, ranks, lambda p: (*first.get(p.kind, ()), data))


def expert_parallel(ranks: int, experts: int) -> Layout:
    """FSDP2 with experts spread over `experts` ranks, their rows over the others, as torchtitan does."""
    spread = (Cut(0, experts), Cut(1, ranks // experts, experts))
    name = f"experts over {experts} ranks, rows over the others"
    return Layout(name, ranks, lambda p: spread if p.kind == "expert" else (Cut(0, ranks),))


def moved(live: int, slot: int, averages: int) -> int:
    """Bytes of an update: the live weights read once, each slot read and written."""
    return live + 2 * slot * averages


def received(model: Model, layout: Layout, itemsize: int) -> int:
    """Bytes that a rank gets from the others when an average is gathered: parts are as long as the fullest."""
    return (layout.ranks - 1) * elements(model, layout, 0) * itemsize
