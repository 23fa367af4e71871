"""The ranks of a group exchange values and errors.

Everything here is collective: every rank of the group calls it, at the same point of the program.
Every wait ends by the group's own time-out (`init_process_group(timeout=...)`). A process without a
process group is a group of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch.distributed as dist

from polyak._checks import difference, report

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_T = TypeVar("_T")
_MOST_LINES = 8
_MOST_RANKS = 4  # that an error quotes


@dataclass
class Agreement:
    """The value that a rank continues with after a block; it must be equal on all ranks."""

    details: str = ""


class _Said(NamedTuple):
    """A rank's message at the end of a block: its call, its error, and the value that it continues with."""

    call: str
    problem: str | None
    details: str

    def __str__(self) -> str:
        return f"{self.call} {self.details}".strip()


@contextmanager
def together(call: str, group: ProcessGroup | None = None) -> Iterator[Agreement]:
    """Run a block that ends well on all ranks of a group, or on none.

    An error of one rank is raised there, and as a `RuntimeError` on every other rank. All ranks raise
    a `RuntimeError` if they sent different values. Nothing in the block may wait for another rank,
    since a rank that failed would not come.
    """
    agreement = Agreement()
    error: BaseException | None = None
    try:
        yield agreement
    except BaseException as raised:
        error = raised
    problem = None if error is None else f"{type(error).__name__}: {error}"
    # A rank that failed takes part in this exchange like the others, so that none waits for it.
    try:
        said = gathered(_Said(call, problem, agreement.details), group)
    except RuntimeError as lost:
        raise (error or _lost(call, lost)) from lost  # its own error says more than a lost rank
    if error is not None:
        raise error
    # A rank in another call of ours may have sent something else.
    problems = {rank: getattr(each, "problem", None) for rank, each in enumerate(said)}
    raise_failures(call, {rank: text for rank, text in problems.items() if text is not None})
    if differ := differing(list(map(str, said))):
        raise RuntimeError(
            f"{call}: Aborted on all ranks: the ranks called it with different arguments or state: "
            f"{differ}"
        )


def together_or_alone(call: str, group: ProcessGroup | None) -> AbstractContextManager[Agreement]:
    """`together` on a group that is given; without one, a block of this process alone."""
    return nullcontext(Agreement()) if group is None else together(call, group)


def raise_failures(call: str, problems: Mapping[int, str]) -> None:
    """Raise `RuntimeError` that quotes what went wrong on which rank, if anything did."""
    if problems:
        quoted = [f"rank {rank}: {text}" for rank, text in list(problems.items())[:_MOST_RANKS]]
        raise RuntimeError(f"{call}: Aborted on all ranks, because of {'; '.join(quoted)}")


def _lost(call: str, lost: RuntimeError) -> RuntimeError:
    return RuntimeError(
        f"{call}: Another rank never reached this call, or has exited ({lost}). Every rank of the "
        "group must make this call, at the same point of the program"
    )


def differing(texts: Sequence[str]) -> str:
    """Quote the texts of the ranks, each with the first rank that sent it; nothing if all are equal.

    >>> differing(["a", "b", "a"])
    'rank 0: a; rank 1: b'
    """
    first = {each: rank for rank, each in reversed(list(enumerate(texts)))}
    several = sorted((rank, each) for each, rank in first.items())
    quoted = (f"rank {rank}: {each}" for rank, each in several[:_MOST_RANKS])
    return "; ".join(quoted) if len(first) > 1 else ""


def agree(
    call: str, values: Mapping[str, object], group: ProcessGroup | None = None, remedy: str = ""
) -> None:
    """Raise `ValueError` on all ranks of a group if a rank has other values than the first rank.

    `values` is name -> what must be equal; the error lists every name and rank that differs.
    """
    wanted = chosen(call, lambda: dict(values), group)
    described = gathered(difference(wanted, values), group)
    lines = [f"rank {rank}: {line}" for rank, each in enumerate(described) for line in each]
    if lines:
        title = f"{call}: ranks do not agree with rank 0" + (f"; {remedy}" if remedy else "")
        raise ValueError(report(title, lines[:_MOST_LINES]))


def digest(*values: object) -> str:
    """A short text that is equal for objects that print equally."""
    return sha256(repr(values).encode()).hexdigest()[:12]


def chosen(call: str, choose: Callable[[], _T], group: ProcessGroup | None = None) -> _T:
    """Run a function on the first rank of a group; all ranks get its result or its error."""
    found: list[_T | None] = [None]
    with together(call, group):
        if is_first(group):
            found = [choose()]
    if not alone(group):
        dist.broadcast_object_list(found, src=first(group), group=group)
    return found[0]  # type: ignore[return-value]


def gathered(item: _T, group: ProcessGroup | None = None) -> list[_T]:
    """Gather one object from every rank of a group, in the order of ranks.

    Raises `ValueError` on a rank that is not a member of the group.
    """
    if alone(group):
        return [item]
    require_member(group)
    items: list[_T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items  # type: ignore[return-value]


def require_member(group: ProcessGroup | None) -> None:
    """Raise `ValueError` on a rank that is not a member of a group."""
    if dist.get_rank(group) < 0:
        raise ValueError(
            "This rank is not a member of `group`; call this only on the ranks of that group"
        )


def alone(group: ProcessGroup | None = None) -> bool:
    """Whether this process has no process group, and none was given."""
    return group is None and not (dist.is_available() and dist.is_initialized())


def first(group: ProcessGroup | None) -> int:
    """The first rank of a group, by its number among all ranks."""
    return 0 if group is None else dist.get_global_rank(group, 0)


def is_first(group: ProcessGroup | None) -> bool:
    """Whether this rank is the first of a group."""
    return rank_of(group) == 0


def rank_of(group: ProcessGroup | None) -> int:
    """The number of this rank in a group."""
    return 0 if alone(group) else dist.get_rank(group)
