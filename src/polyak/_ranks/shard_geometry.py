"""Which box of a whole tensor lies on which rank, and how boxes are cut and laid out.

A box is a range of indices in each dimension. Nothing here communicates: a DTensor knows its layout, and
from that every rank knows where every other rank's part lies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from polyak._checks import prefixed
from polyak._ranks.sharding import local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Box(NamedTuple):
    """Where a box begins in a whole tensor, and its shape.

    >>> Box((2, 0), (2, 3)).overlap(Box((3, 1), (5, 9)))
    Box(offsets=(3, 1), shape=(1, 2))
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def overlap(self, other: Box) -> Box:
        """The box that lies in both; it has no elements if they do not meet."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = [min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True)]
        return Box(starts, tuple(max(e - s, 0) for s, e in zip(starts, ends, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """The indices of this box in a tensor that holds the box `outer`."""
        starts = [a - b for a, b in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(a, a + n) for a, n in zip(starts, self.shape, strict=True))


def whole(shape: Sequence[int]) -> Box:
    """The box that covers a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def part_of(shape: tuple[int, ...], where: tuple[slice, ...]) -> Box:
    """The box that is a part of a tensor: one slice for each dimension, or `()` for all of it."""
    if not where:
        return whole(shape)
    ranges = [part.indices(size) for part, size in zip(where, shape, strict=True)]
    starts = tuple(start for start, _, _ in ranges)
    return Box(starts, tuple(max(stop - start, 0) for start, stop, _ in ranges))


def box(tensor: DTensor) -> Box:
    """The box of the whole tensor that lies on this rank.

    torch's own functions for this are wrong for a tensor that is cut twice into uneven pieces, as 9
    rows are by tensor parallelism over 2 ranks and then by FSDP2 over 4 ranks.

    Raises `ValueError` if this rank is not on the tensor's mesh, if the parts are not boxes (partial
    sums are whole on every rank), and if the part has another shape than its box.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"it lies on the ranks {_ranks(tensor)}, and this rank is not one of them")
    found = box_at(tensor, coordinate)
    if found.shape != tuple(local(tensor).shape):
        raise ValueError(
            f"this rank's shard of {tuple(tensor.shape)} as {tensor.placements} has shape "
            f"{tuple(local(tensor).shape)}, wanted {found.shape}"
        )
    return found


def box_of(name: str, tensor: DTensor) -> Box:
    """`box`, with errors that begin with the tensor's name."""
    with prefixed(name):
        return box(tensor)


def box_at(tensor: DTensor, coordinate: Sequence[int]) -> Box:
    """The box of the rank at a coordinate of the mesh; the one at (0, ..., 0) is the largest."""
    return _box(tensor, _cuts(tensor), coordinate)


def boxes(tensor: DTensor) -> dict[int, Box]:
    """Rank -> its box, for ranks that together hold the tensor exactly once: the first of each replica.

    Ranks are numbered as in the default group. Raises as `box` does.
    """
    mesh, cuts = tensor.device_mesh, _cuts(tensor)
    found = {}
    for coordinate in product(*map(range, mesh.mesh.shape)):
        each = _box(tensor, cuts, coordinate)
        if each.numel and _is_first(tensor, coordinate):
            found[int(mesh.mesh[coordinate])] = each
    return found


def missing_parts(tensor: DTensor, ranks: Collection[int]) -> list[int]:
    """For each part that none of these ranks has, the first rank that has it."""
    mesh, cuts = tensor.device_mesh, _cuts(tensor)
    if set(mesh.mesh.flatten().tolist()) <= set(ranks):
        return []  # before the loop below, which takes long on a large mesh
    holders: dict[Box, list[int]] = {}
    for coordinate in product(*map(range, mesh.mesh.shape)):
        holders.setdefault(_box(tensor, cuts, coordinate), []).append(int(mesh.mesh[coordinate]))
    return [each[0] for box, each in holders.items() if box.numel and not set(each) & set(ranks)]


def is_first_replica(tensor: DTensor) -> bool:
    """Whether this rank is among those that together hold the tensor once, even if its part is empty."""
    coordinate = tensor.device_mesh.get_coordinate()
    return coordinate is not None and _is_first(tensor, coordinate)


def windows(box: Box, most: int) -> Iterator[Box]:
    """Cut a box into boxes of at most `most` elements, each of which is contiguous within it.

    >>> [each.shape for each in windows(whole((5, 3)), 7)]
    [(2, 3), (2, 3), (1, 3)]
    >>> [each.offsets for each in windows(whole((2, 5)), 3)]
    [(0, 0), (0, 3), (1, 0), (1, 3)]
    """
    if box.numel <= most:
        yield from [box] * (box.numel > 0)
        return
    (first, *offsets), (rows, *shape) = box
    row = Box(tuple(offsets), tuple(shape))
    # As many whole rows as fit. A row that is too long itself is cut in the loop.
    step = max(most // row.numel, 1)
    for skip in range(0, rows, step):
        some = min(step, rows - skip)
        for each in [row] if some * row.numel <= most else windows(row, most):
            yield Box((first + skip, *each.offsets), (some, *each.shape))


def runs(shape: Sequence[int], box: Box) -> Iterator[tuple[int, int]]:
    """The contiguous runs of a box in the whole tensor, row by row: first element and count of each.

    >>> list(runs((3, 4), Box((1, 0), (2, 4))))
    [(4, 8)]
    >>> list(runs((3, 4), Box((1, 2), (2, 2))))
    [(6, 2), (10, 2)]
    """
    inner = max(len(shape) - 1, 0)  # from this dimension on, rows of the box follow each other
    while inner > 0 and box.shape[inner] == shape[inner]:
        inner -= 1
    steps = [prod(shape[d + 1 :]) for d in range(len(shape))]
    begin = sum(first * step for first, step in zip(box.offsets, steps, strict=True))
    for index in product(*map(range, box.shape[:inner])):
        skipped = sum(i * step for i, step in zip(index, steps, strict=False))
        yield begin + skipped, prod(box.shape[inner:])


def _box(tensor: DTensor, cuts: dict[int, list[int]], coordinate: Sequence[int]) -> Box:
    """The box of the rank at a coordinate of the mesh: one `torch.chunk` for each cut, in order."""
    offsets, shape = [0] * tensor.dim(), list(tensor.shape)
    for dim, axes in cuts.items():
        for axis in axes:
            length = -(-shape[dim] // tensor.device_mesh.size(axis))
            # Ranks at the end get a smaller piece or none, where the length is not a multiple.
            skip = min(length * coordinate[axis], shape[dim])
            offsets[dim] += skip
            shape[dim] = min(length, shape[dim] - skip)
    return Box(tuple(offsets), tuple(shape))


def _cuts(tensor: DTensor) -> dict[int, list[int]]:
    """Tensor dimension -> the mesh dimensions that cut it, in the order in which they do.

    That is the order of the mesh, except for a mesh dimension with a split factor (`_StridedShard`, as
    FSDP2 makes over tensor parallelism): later mesh dimensions have cut the tensor into that many
    pieces before, and it cuts these pieces again.
    """
    cuts: dict[int, list[int]] = {}
    # From the last mesh dimension to the first, so that those which cut before are known.
    for axis, placement in reversed(list(enumerate(tensor.placements))):
        if placement.is_replicate():
            continue
        later = cuts.setdefault(getattr(placement, "dim", -1), [])
        pieces = [prod(map(tensor.device_mesh.size, later[:i])) for i in range(len(later) + 1)]
        factor = getattr(placement, "split_factor", 1)
        if placement.is_partial() or factor not in pieces:
            raise ValueError(
                f"it is spread as {tensor.placements} on the ranks {_ranks(tensor)}, wanted parts "
                "that are contiguous in every dimension: redistribute it"
            )
        # The factor is the number of pieces before this cut, and so says its place in the order.
        later.insert(pieces.index(factor), axis)
    return cuts


def _is_first(tensor: DTensor, coordinate: Sequence[int]) -> bool:
    pairs = zip(tensor.placements, coordinate, strict=True)
    # Ranks that differ only along a replicated dimension hold the same part.
    return all(at == 0 for placement, at in pairs if placement.is_replicate())


def _ranks(tensor: DTensor) -> object:
    return tensor.device_mesh.mesh.tolist()
