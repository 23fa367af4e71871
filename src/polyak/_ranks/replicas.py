"""Weights that every rank of a mesh has whole (DistributedDataParallel), averaged by rows.

Fingerprints compare what the ranks have. An average that lies on the ranks in rows is gathered into
whole tensors, in buckets. Both are collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from polyak._checks import listed
from polyak._dtypes import kind
from polyak._modes import no_grad
from polyak._ranks.agreement import agree, digest, together
from polyak._ranks.sharding import rows_of_a_rank

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BUCKET_BYTES = 1 << 26
_CHUNK = 1 << 20
_SAMPLE = 1 << 12
_ODD, _OTHER = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)  # of splitmix64


def require_same(
    call: str, tensors: Mapping[str, Tensor], made_with: str, mesh: DeviceMesh
) -> None:
    """Raise `RuntimeError` on all ranks of a mesh if their tensors differ, naming the tensors. Collective.

    64 bits of each tensor are compared. Raises `ValueError` if ranks differ in the tensors' names,
    shapes, dtypes or order, or in `made_with`.
    """
    group = mesh.get_group()
    with together(call, group):
        # Integers, whose sums are the same in any order: floats would differ between devices.
        mine = [fingerprint(tensor).to(mesh.device_type) for tensor in tensors.values()]
        forms = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()}
        order = {"the order of tensors": digest(list(tensors)), "made with": made_with}
    agree(call, order | forms, group, "make the averager in the same way on all of them")
    if not mine:
        return
    # One reduction gives both ends: the maximum of ~x is ~(minimum of x). They are equal if all are.
    both = torch.cat([torch.stack(mine), ~torch.stack(mine)])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    same = (both[: len(mine)] == ~both[len(mine) :]).tolist()
    differ = [name for name, each in zip(tensors, same, strict=True) if not each]
    if differ:
        raise RuntimeError(
            f"{call}: the weights of the ranks have diverged, in {listed(differ)}: each "
            "rank averages some rows, so the average would be made of different models. Start all "
            "ranks with the same weights (DistributedDataParallel does that), and make the same "
            "optimizer steps on all of them"
        )


def fingerprint(tensor: Tensor) -> Tensor:
    """64 bits of a tensor's content: a sum over its elements of their bits, mixed with their place.

    Each term is hashed (splitmix64), since a plain sum would miss signs that change in pairs.
    """
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        mixed = bits[start : start + _CHUNK].to(torch.int64, copy=True).mul_(_ODD)
        mixed += torch.arange(start, start + mixed.numel(), device=tensor.device).mul_(_OTHER)
        for shift in (32, 29):
            mixed.bitwise_xor_(mixed >> shift).mul_(_OTHER)
        total += mixed.bitwise_xor_(mixed >> 32).sum()
    return total


def sample(tensor: Tensor) -> Tensor:
    """64 bits of a tensor's first 4096 elements: enough to distinguish trained weights."""
    return fingerprint(tensor.detach().reshape(-1)[:_SAMPLE])


class _Piece(NamedTuple):
    """The same rows of each rank's part of a tensor."""

    whole: Tensor
    part: Tensor
    first: int
    rows: int
    rank_rows: int

    @property
    def numel(self) -> int:
        return self.rows * self.whole[0].numel()


@no_grad
def gather_(pairs: Sequence[tuple[Tensor, Tensor]], mesh: DeviceMesh) -> None:
    """Fill whole tensors on every rank from the rows that the ranks have, rounded to their dtypes.

    Each pair is a whole tensor, and this rank's rows of it. Collective, in buckets of 64 MiB (more if
    one row of all ranks is larger), and this rank's share of a bucket beside it.
    """
    for bucket in _buckets(pairs, mesh):
        _gather_bucket_(bucket, mesh)


def _buckets(pairs: Sequence[tuple[Tensor, Tensor]], mesh: DeviceMesh) -> Iterator[list[_Piece]]:
    """Lists of pieces of one dtype and device that fill a bucket; a piece has at least one row."""
    bucket: list[_Piece] = []
    room = 0
    for whole, part in pairs:
        for piece in _pieces(whole, part, mesh):
            nbytes = piece.numel * whole.itemsize * mesh.size()
            if bucket and (nbytes > room or kind(bucket[0].whole) != kind(whole)):
                yield bucket
                bucket = []
            if not bucket:
                room = BUCKET_BYTES
            bucket.append(piece)
            room -= nbytes
    if bucket:
        yield bucket


def _pieces(whole: Tensor, part: Tensor, mesh: DeviceMesh) -> Iterator[_Piece]:
    if whole.numel() == 0:
        return
    rank_rows = rows_of_a_rank(whole, mesh)
    most = max(1, BUCKET_BYTES // (whole[0].numel() * whole.itemsize * mesh.size()))
    for first in range(0, rank_rows, most):
        yield _Piece(whole, part, first, min(most, rank_rows - first), rank_rows)


def _gather_bucket_(bucket: Sequence[_Piece], mesh: DeviceMesh) -> None:
    like = bucket[0].whole
    ends = list(accumulate(piece.numel for piece in bucket))
    # Zeros, since ranks at the end have fewer rows than they send; equal sizes need one call only.
    mine = like.new_zeros(1, ends[-1])
    for piece, [flat] in _columns(bucket, ends, mine):
        held = piece.part[piece.first : piece.first + piece.rows]
        flat[: len(held)].copy_(held)
    # As bytes, since not every backend knows every dtype.
    everyones = like.new_empty(mesh.size(), ends[-1])
    group = mesh.get_group()
    dist.all_gather_into_tensor(everyones.view(torch.uint8), mine.view(torch.uint8), group=group)
    for piece, theirs in _columns(bucket, ends, everyones):
        whole, first, rows, rank_rows = piece.whole, piece.first, piece.rows, piece.rank_rows
        full = len(whole) // rank_rows  # ranks that have as many rows as there can be
        of_full = whole[: full * rank_rows].unflatten(0, (full, rank_rows))
        of_full[:, first : first + rows].copy_(theirs[:full])
        rest = whole[full * rank_rows + first :][:rows]
        if len(rest):
            rest.copy_(theirs[full, : len(rest)])


def _columns(
    bucket: Sequence[_Piece], ends: Sequence[int], flat: Tensor
) -> Iterator[tuple[_Piece, Tensor]]:
    """The pieces with their columns of a matrix that has one row for each rank, in the shape of their rows."""
    for piece, end in zip(bucket, ends, strict=True):
        shape = (len(flat), piece.rows, *piece.whole.shape[1:])
        yield piece, flat[:, end - piece.numel : end].view(shape)
