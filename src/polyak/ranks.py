"""Ranks: what the processes of a group tell each other. All of it is collective: every rank calls it.

Every wait ends by the group's own time-out (`init_process_group(timeout=...)`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_T = TypeVar("_T")


@contextmanager
def together(call: str, group: ProcessGroup | None = None) -> Iterator[None]:
    """A block that ends well on all ranks of a group or on none.

    What it raises on one rank is raised there, and on every other as a `RuntimeError` that tells of
    it. Within the block a rank waits for no other: one that has failed would not come.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    problem = None if error is None else f"{type(error).__name__}: {error}"
    problems = gathered(problem, group)
    if error is not None:
        raise error
    failed = [f"rank {rank}: {told}" for rank, told in enumerate(problems) if told is not None]
    if failed:
        raise RuntimeError(f"{call}: given up on all ranks, as {'; '.join(failed[:4])}")


def chosen(call: str, choose: Callable[[], _T], group: ProcessGroup | None = None) -> _T:
    """What the first rank of a group finds, told to all; what it raises there is raised on all."""
    found: list[_T | None] = [None]
    with together(call, group):
        if dist.get_rank(group) == 0:
            found = [choose()]
    dist.broadcast_object_list(found, src=_first(group), group=group)
    return found[0]  # type: ignore[return-value]


def gathered(item: _T, group: ProcessGroup | None = None) -> list[_T]:
    """What every rank of a group gives, in their order."""
    items: list[_T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items  # type: ignore[return-value]


def _first(group: ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_global_rank(group, 0)
