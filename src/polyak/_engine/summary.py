"""The decisions of an averager about every tensor, as data that prints as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from polyak._dtypes import dtype_name
from polyak._engine.live import ModelTensors
from polyak._engine.rounding import stalled
from polyak._engine.slots import Average
from polyak._engine.tracking import Tracked, is_statistic
from polyak._lazy import TensorSpec
from polyak._ranks.sharding import is_distributed, shape
from polyak._shown import Table, Tabled

WORTH_SAYING = 0.01


@dataclass(frozen=True)
class Row:
    """One tensor: its name and kind, what is done with it and why, and its dtypes.

    The shape of a sharded one is that of this rank's part.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    slot_dtype: torch.dtype | None
    policy: str
    reason: str
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Summary(Tabled):
    """All that an averager decided; `str` of it is a table.

    `memory` is the bytes that the averager holds now; `count` its updates so far; `stalled` the
    share, by average, of the weights that rounding would keep from moving at the next update.
    """

    rules: dict[str, str]
    count: int
    memory: int
    stalled: dict[str, float]
    rows: tuple[Row, ...]

    def heading(self) -> list[str]:
        """The rules, the updates, the memory, and a warning of averages that do not move."""
        head = [f"{name}: {rule}" for name, rule in self.rules.items()]
        head.append(f"{self.count} updates, {self.memory / 2**20:.1f} MiB stored")
        shares = self.stalled.items()
        return head + [_warning(name, share) for name, share in shares if share > WORTH_SAYING]

    def tables(self) -> list[Table]:
        """A line for every tensor."""
        header = ("tensor", "shape", "dtype", "policy", "stored as", "reason")
        return [Table(header, [_cells(row) for row in self.rows], left=len(header))]


def _warning(name: str, share: float) -> str:
    return (
        f"warning: rounding stops {share:.0%} of the weights of {name}: their next step is smaller than "
        'half a unit of the last digit; use rounding="compensated", a wider dtype, or a larger '
        "every"
    )


def _cells(row: Row) -> tuple[str, str, str, str, str, str]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    tied = f" (tied: {', '.join(row.aliases)})" if row.aliases else ""
    kept = "-" if row.slot_dtype is None else dtype_name(row.slot_dtype)
    return row.name, shape, dtype_name(row.dtype), row.policy, kept, row.reason + tied


def summarise(
    averages: Mapping[str, Average],
    live: ModelTensors,
    copies: list[torch.Tensor],
    *,
    elapsed: float,
) -> Summary:
    """The summary of averages over live weights."""
    first = next(iter(averages.values()))
    specs = first.specs(live)
    leading = [name for name, average in averages.items() if average.extrapolates()]
    where = f" (of {', '.join(leading)})" if len(averages) > 1 else ""
    convex = f"; read out without extrapolation{where}" if leading else ""
    rows = tuple(_row(item, specs, convex) for item in live.tracked)
    held = [t for a in averages.values() for slot in a.slots.values() for t in slot] + copies
    memory = sum(t.numel() * t.element_size() for t in held)
    rules = {name: str(average.rule) for name, average in averages.items()}
    shares = {name: _stalled(average, live, elapsed) for name, average in averages.items()}
    return Summary(rules, first.tick.n, memory, shares, rows)


def _stalled(average: Average, live: ModelTensors, elapsed: float) -> float:
    """The share of the weights that should move at the next update, and that rounding would stop.

    It is 0 before the first update, and with the roundings that never stop a weight.
    """
    rule, tick = average.rule, average.tick
    if tick.n == 0 or average.rounding != "nearest":
        return 0.0
    stay = move = 0
    for slot, fraction in rule.fractions(rule.tick(tick, elapsed)).items():
        if slot in average.slots and fraction < 1:
            for slots, weights in zip(average.groups(live, slot), live.trained(), strict=True):
                counted = stalled(slots, weights, fraction)
                stay, move = stay + counted[0], move + counted[1]
    return stay / move if move else 0.0


def _row(item: Tracked, specs: Mapping[str, TensorSpec], convex: str) -> Row:
    """A tensor's row; `convex` is what to say of running statistics that are averaged."""
    tensor = item.local()
    kept = tensor.dtype if item.policy == "copy" else None
    if item.name in specs:
        kept = specs[item.name].dtype
    head = (item.name, item.kind, tuple(tensor.shape), tensor.dtype, kept)
    part = f"; part of {shape(item.held())}" if is_distributed(item.held()) else ""
    said = convex if item.policy == "average" and is_statistic(item.name) else ""
    return Row(*head, item.policy, item.reason + said + part, item.aliases)
