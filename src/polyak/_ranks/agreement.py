"""Ranks: what the processes of a group tell each other. All of it is collective: every rank calls it.

Every wait ends by the group's own time-out (`init_process_group(timeout=...)`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch.distributed as dist

from polyak._checks import difference, report

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_T = TypeVar("_T")
_MOST = 8  # lines of an error that tells of ranks


@dataclass
class Agreement:
    """What a rank goes on with after a block; all ranks must tell the same."""

    told: str = ""


class _Said(NamedTuple):
    """What a rank says at the end of a block: in which call, what went wrong, what it goes on with."""

    call: str
    problem: str | None
    told: str

    def __str__(self) -> str:
        return f"{self.call} {self.told}".strip()


@contextmanager
def together(call: str, group: ProcessGroup | None = None) -> Iterator[Agreement]:
    """A block that ends well on all ranks of a group or on none.

    What it raises on one rank is raised there, and on every other as a `RuntimeError` that tells of
    it; so is what ranks tell, where they differ. Within the block a rank waits for no other: one
    that has failed would not come.
    """
    agreement = Agreement()
    error: BaseException | None = None
    try:
        yield agreement
    except BaseException as raised:
        error = raised
    problem = None if error is None else f"{type(error).__name__}: {error}"
    try:
        said = gathered(_Said(call, problem, agreement.told), group)
    except RuntimeError as lost:
        raise (error or _alone(call, lost)) from lost
    if error is not None:
        raise error
    problems = [getattr(each, "problem", None) for each in said]
    if failed := [f"rank {rank}: {told}" for rank, told in enumerate(problems) if told is not None]:
        raise RuntimeError(f"{call}: given up on all ranks, as {'; '.join(failed[:4])}")
    if differ := differing(list(map(str, said))):
        raise RuntimeError(f"{call}: given up on all ranks, as they are not at the same: {differ}")


def _alone(call: str, lost: RuntimeError) -> RuntimeError:
    return RuntimeError(
        f"{call}: another rank did not come, or has ended ({lost}). Every rank of the group must make "
        "this call, at the same place of the program"
    )


def differing(told: Sequence[str]) -> str:
    """What ranks tell, given in their order, where it is not all the same: each, and who tells it first.

    >>> differing(["a", "b", "a"])
    'rank 0: a; rank 1: b'
    """
    first = {each: rank for rank, each in reversed(list(enumerate(told)))}
    several = sorted((rank, each) for each, rank in first.items())
    return "; ".join(f"rank {rank}: {each}" for rank, each in several[:4]) if len(first) > 1 else ""


def agree(
    call: str, told: Mapping[str, object], group: ProcessGroup | None = None, remedy: str = ""
) -> None:
    """Raises `ValueError` on all ranks of a group where one tells something else than the first.

    `told` is name -> what must be equal; the error lists every name and rank that differs.
    """
    wanted = chosen(call, lambda: dict(told), group)
    described = gathered(difference(wanted, told), group)
    lines = [f"rank {rank}: {line}" for rank, each in enumerate(described) for line in each]
    if lines:
        title = f"{call}: ranks do not agree with rank 0" + (f"; {remedy}" if remedy else "")
        raise ValueError(report(title, lines[:_MOST]))


def digest(*told: object) -> str:
    """A short text that is equal for equal objects, as far as they print."""
    return sha256(repr(told).encode()).hexdigest()[:12]


def chosen(call: str, choose: Callable[[], _T], group: ProcessGroup | None = None) -> _T:
    """What the first rank of a group finds, told to all; what it raises there is raised on all."""
    found: list[_T | None] = [None]
    with together(call, group):
        if is_first(group):
            found = [choose()]
    dist.broadcast_object_list(found, src=first(group), group=group)
    return found[0]  # type: ignore[return-value]


def gathered(item: _T, group: ProcessGroup | None = None) -> list[_T]:
    """What every rank of a group gives, in their order.

    Raises `ValueError` on a rank that is none of the group.
    """
    require_member(group)
    items: list[_T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items  # type: ignore[return-value]


def require_member(group: ProcessGroup | None) -> None:
    """Raises `ValueError` on a rank that is none of a group."""
    if dist.get_rank(group) < 0:
        raise ValueError(
            "the group given is one of which this rank is none: let its ranks alone call"
        )


def time_out(group: ProcessGroup) -> timedelta:
    """How long a rank of a group waits for another."""
    found: timedelta = group._get_backend(group._device_types[0]).options._timeout
    return found


def first(group: ProcessGroup | None) -> int:
    """The first rank of a group, by its number among all ranks."""
    return 0 if group is None else dist.get_global_rank(group, 0)


def is_first(group: ProcessGroup | None) -> bool:
    """Whether this rank is the first of a group."""
    return dist.get_rank(group) == 0
