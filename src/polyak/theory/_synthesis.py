"""An average made from stored averages, by least squares on profiles.

The profile of each stored tensor is a column, the wanted profile is the target. Both come from
running the rules, so stored averages of any rules can give any other rule's average, and the error
is known before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from polyak._checks import as_number, is_integer, require
from polyak._shown import Charted, Table
from polyak.rules import LIVE, Rule
from polyak.theory._profiles import (
    NOTHING,
    Moves,
    Profile,
    checked_times,
    coefficients,
    response,
    run,
)

Norm = Literal["profile", "increments"]

# Updates in memory at once, as a dense block with one column for every stored slot.
_BLOCK = 2**14
# Columns that differ by less than this share of their norm count as stored twice.
_SAME = 1e-10


class Column(NamedTuple):
    """A stored tensor: a slot of a rule after a number of updates, counted from 1.

    `rule` is None for the slot "live": the live weights at that update, a plain checkpoint.
    """

    rule: Rule | None
    slot: str
    updates: int


@dataclass(frozen=True, eq=False)
class Fit(Charted):
    """The combination of stored tensors that comes closest to the wanted average.

    `coefficients`, one for each column, sum to 1. `relative_error` is 0 if the average is exact. By
    the norm "profile" it is |columns @ coefficients - target| / |target|, in L2 over updates. By the
    norm "increments" it is the same for tail sums, as a share of the target's distance from the last
    live weights. `amplification`, the sum of |coefficients|, bounds the growth of the rounding errors
    of the stored tensors. It is 1 if no coefficient is negative.
    """

    coefficients: Profile
    relative_error: float
    amplification: float

    def tables(self) -> list[Table]:
        """The coefficients, in the order of the columns."""
        rows = [(str(i), f"{c:.6g}") for i, c in enumerate(self.coefficients.tolist())]
        return [Table(("column", "coefficient"), rows)]

    def heading(self) -> list[str]:
        """How exact it is."""
        return [str(self)]

    def __str__(self) -> str:
        return (
            f"{len(self.coefficients)} columns: relative error {self.relative_error:.2g}, "
            f"amplification {self.amplification:.3g}"
        )


def fit(
    columns: Sequence[Column],
    rule: Rule | str,
    elapsed: Sequence[float],
    *,
    norm: Norm = "profile",
    convex: bool = False,
) -> Fit:
    """Find the coefficients of stored tensors, with sum 1, that come nearest to a rule's average.

    They minimise `|sum_k c_k profile_k - target|` over the updates. The target is
    `coefficients(rule, elapsed)`; the profile of a column is that of its slot at its time. If several
    solutions exist, it is the one with the smallest sum of squares, so a tensor stored twice counts
    half each time. `elapsed[i]` is the time that update i spans, for all updates up to the wanted
    moment. The stored rules were updated at the same times.

    The norm "profile" assumes that the live weights of neighbouring updates are unrelated. So a
    synthesised average differs from the wanted one by at most
    `relative_error * |target| * |live - centre|`, where the last factor is the L2 norm of the
    distances of the live weights from any one centre. A plain checkpoint is one update and does not
    count for its neighbours. The norm "increments" assumes that the steps between updates are
    unrelated: an average is `x_0 + sum_i W_i (x_i - x_{i-1})`, W_i the tail sums of its profile, and
    the coefficients minimise the difference in W. On a random walk, `relative_error` is then the
    error of the synthesised average, as a share of the target's distance from the last live weights,
    |1 - W|.

    With `convex` no coefficient is below 0, and the target is `coefficients(rule, elapsed,
    convex=True)`: the nearest average for running statistics, which must not be extrapolated.

    >>> from polyak.rules import Power
    >>> stored = [Column(Power.from_relative_std(s), "average", n)
    ...           for s in (0.05, 0.1) for n in range(500, 20_001, 500)]
    >>> made = fit(stored, "exponential(half_life=1000)", [1.0] * 20_000)
    >>> made.coefficients.shape, round(made.relative_error, 5), round(made.amplification, 2)
    ((80,), 0.00026, 1.23)

    A million updates take about a second for each rule. Raises `ValueError` without columns; for a
    column that is not a slot of its rule, that has no value yet or lies beyond the updates; for
    another norm; and for `elapsed` as `coefficients` does.
    Source: EDM2 (arXiv 2312.02696, section 3.2), there for power functions in continuous time; the
    increments: Sandler et al. (arXiv 2301.02312).
    """
    require(norm in get_args(Norm), "norm", norm, '"profile" or "increments"')
    columns = [each._replace(updates=as_number(each.updates)) for each in columns]
    target = coefficients(rule, elapsed, convex=convex)
    _require_columns(columns, len(target))
    moves = _moves(columns, checked_times(elapsed))
    summed = norm == "increments"
    triangle = _reduced(_rows(columns, moves, target, summed=summed))
    found = (_solved_convex if convex else _solved)(triangle[:, :-1], triangle[:, -1])
    missed = float(np.linalg.norm(triangle @ np.append(found, -1.0)))
    whole = float(np.linalg.norm(_earlier(target) if summed else target))
    # The live weights themselves have distance 0: their error is in steps.
    return Fit(found, missed / (whole or 1.0), float(np.abs(found).sum()))


def _earlier(profile: Profile) -> Profile:
    """1 - W: at each update the sum of all earlier entries. 1 minus a sum next to 1 would lose it."""
    return np.concatenate([np.zeros_like(profile[:1]), np.cumsum(profile[:-1], axis=0)])


def _require_columns(columns: Sequence[Column], updates: int) -> None:
    if len(columns) == 0:
        raise ValueError("there are no columns, wanted one for every stored tensor")
    for index, (rule, slot, count) in enumerate(columns):
        where = f"columns[{index}]"
        holds = rule is None or isinstance(rule, Rule)
        require(holds, f"{where}.rule", rule, "a polyak rule, or None for the live weights")
        slots = (LIVE,) if rule is None else rule.slots
        owner = "the live weights" if rule is None else rule
        require(slot in slots, f"{where}.slot", slot, f"a slot of {owner}: {', '.join(slots)}")
        holds = is_integer(count, 1) and count <= updates
        require(holds, f"{where}.updates", count, f"an integer from 1 to the {updates} of elapsed")


_Slot = tuple[Rule | None, str]


def _moves(columns: Sequence[Column], elapsed: list[float]) -> dict[_Slot, Moves]:
    """The moves of every stored slot. Each rule runs once. A plain checkpoint is a copy at its update."""
    copied = np.array(sorted({each.updates - 1 for each in columns if each.rule is None}), np.int64)
    moves: dict[_Slot, Moves] = {(None, LIVE): Moves(copied, np.ones(len(copied)))}
    for stored in dict.fromkeys(column.rule for column in columns if column.rule is not None):
        done, _ = run(stored, elapsed)
        moves |= {(stored, slot): of_slot for slot, of_slot in done.items()}
    for index, (rule, slot, updates) in enumerate(columns):
        holds = (rule, slot) in moves and moves[rule, slot].updates[0] < updates
        wanted = f"a later one: slot {slot!r} of {rule} has no value before its first copy"
        require(holds, f"columns[{index}].updates", updates, wanted)
    return {slot: moves[slot] for slot in dict.fromkeys(column[:2] for column in columns)}


def _rows(
    columns: Sequence[Column], moves: dict[_Slot, Moves], target: Profile, *, summed: bool
) -> Iterator[Profile]:
    """A few rows for each stretch of updates, with the lengths and angles of [columns, target].

    No tensor is stored within a stretch. So all columns of a slot are multiples of one vector there:
    what the slot's moves leave at the end of the stretch. The multiple is the share that later moves
    keep. Therefore only slots and target need a QR decomposition. With `summed` the columns are
    1 - W: the earlier entries of the vector, plus the constant sum of all updates before the stretch.
    """
    stored = np.array([column.updates for column in columns])
    order = {slot: index for index, slot in enumerate(moves)}
    of_slot = np.array([order[column[:2]] for column in columns])
    kept, before = np.zeros(len(columns)), _earlier(target)
    for start, end in _stretches(stored, len(target)):
        kept[stored == end] = 1.0
        left, old = zip(*(_left(each, start, end) for each in moves.values()), strict=True)
        vectors = np.column_stack([*left, target[start:end]])
        if summed:
            vectors = np.column_stack([np.ones(end - start), _earlier(vectors)])
        core = _triangle(vectors)
        rows = np.column_stack([core[:, summed:-1][:, of_slot] * kept, core[:, -1]])
        kept *= np.array(old)[of_slot]
        kept[kept < NOTHING] = 0.0
        # A profile sums to 1: the earlier updates hold what this stretch leaves of it.
        constant = np.append(np.where(stored > start, kept, 1.0), before[start])
        yield rows + np.outer(core[:, 0], constant) if summed else rows


def _stretches(stored: npt.NDArray[np.int64], updates: int) -> list[tuple[int, int]]:
    """Stretches [start, end) of updates, the last one first, of at most a block.

    They are cut where a tensor was stored.
    """
    cuts = np.unique([*range(0, updates, _BLOCK), *stored, updates])[::-1].tolist()
    return list(zip(cuts[1:], cuts[:-1], strict=True))


def _left(moves: Moves, start: int, end: int) -> tuple[Profile, float]:
    """The coefficients of a stretch's updates in a slot at its end, and the share of its old value."""
    within = slice(*np.searchsorted(moves.updates, (start, end)))
    left = np.zeros(end - start)
    left[moves.updates[within] - start], old = response(moves.fractions[within])
    return left, old


def _reduced(blocks: Iterator[Profile]) -> Profile:
    """The triangle of stacked blocks of rows; only a few blocks are in memory at a time."""
    kept: list[Profile] = []
    for block in blocks:
        kept.append(block)
        if sum(map(len, kept)) > 4 * block.shape[1]:
            kept = [_triangle(np.concatenate(kept))]
    return _triangle(np.concatenate(kept))


def _triangle(rows: Profile) -> Profile:
    """R of the QR decomposition: few rows, with the same lengths and angles of the columns."""
    return np.asarray(np.linalg.qr(rows, mode="r"))


def _solved(a: Profile, b: Profile) -> Profile:
    """The x with sum 1 and the least |a x - b|; if there are several, the shortest.

    x = 1 / K + Z y, the columns of Z orthonormal and of sum 0: |x|^2 = 1 / K + |y|^2.
    """
    size = a.shape[1]
    even = np.full(size, 1 / size)
    basis = np.linalg.qr(np.ones((size, 1)), mode="complete")[0][:, 1:]
    left, lengths, right = np.linalg.svd(a @ basis, full_matrices=False)
    apart = lengths > _SAME * np.linalg.norm(a, 2)
    y = right[apart].T @ ((b - a @ even) @ left[:, apart] / lengths[apart])
    x: Profile = even + basis @ y
    x += (1 - x.sum()) / size
    return x


def _solved_convex(a: Profile, b: Profile) -> Profile:
    """The x >= 0 with sum 1 and the least |a x - b|, by an active set, as Lawson and Hanson's NNLS.

    At the solution all columns in use have the same slope, and no other column has a lower one. So
    the column with the lowest slope is taken into use, until no slope is lower.
    """
    x = np.zeros(a.shape[1])
    x[np.argmin(((a - b[:, None]) ** 2).sum(axis=0))] = 1.0
    least = _SAME * np.linalg.norm(a, 2) ** 2
    for _ in range(3 * len(x)):
        slope = a.T @ (a @ x - b)
        below = np.where(x > 0, 0.0, slope - slope[x > 0].mean())
        if below.min() > -least:
            break
        x = _descended(a, b, x, int(below.argmin()))
    return x


def _descended(a: Profile, b: Profile, x: Profile, new: int) -> Profile:
    """The best x on the columns in use and a new one. Columns that would go below 0 are dropped."""
    used = x > 0
    used[new] = True
    while True:
        best = np.zeros(len(x))
        best[used] = _solved(a[:, used], b)
        falling = used & (best <= 0)
        if not falling.any():
            return best
        step = (x[falling] / (x[falling] - best[falling])).min()
        x = x + step * (best - x)
        # Rounding may leave a little of the column that ended the step.
        used &= ~(falling & (x <= _SAME))
        x = np.where(used, x, 0.0)
