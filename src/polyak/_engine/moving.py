"""How far one slot moves towards the live weights, and how the move is rounded or masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyak import _tensors as tensors
from polyak._engine.infinities import Infinities
from polyak._engine.rounding import compensated_lerp_, stochastic_lerp_
from polyak._modes import no_grad
from polyak._parts import chunk_length, parts
from polyak._tensors import Groups, Journal


class Move(NamedTuple):
    """A slot's tensors in the groups of the live weights, how far they move, and how they are rounded.

    `seeds` are for each group's own random numbers, apart from those of training.
    """

    slots: Groups
    fraction: float
    infinities: Infinities
    residues: Groups | None = None
    seeds: Sequence[int] | None = None

    def alone_(self, live: Groups, ok: Tensor | None, journal: Journal) -> None:
        """A move that is rounded in its own way, or that `ok` may mask."""
        for g, weights in enumerate(live):
            columns = [self.slots[g], *([] if self.residues is None else [self.residues[g]])]
            generator = _generator(self, g)
            if ok is None:
                _rounded_move_(self.fraction, columns, weights, generator, journal)
            else:
                _masked_move_(self.fraction, columns, weights, generator, ok, journal)


def _generator(move: Move, g: int) -> torch.Generator | None:
    if move.seeds is None:
        return None
    return torch.Generator(move.slots[g][0].device).manual_seed(move.seeds[g])


def _rounded_move_(
    fraction: float,
    columns: list[list[Tensor]],
    live: list[Tensor],
    generator: torch.Generator | None,
    journal: Journal | None,
) -> None:
    """A move of some tensors of a slot, with its rounding; `columns` are slots, and residues if any."""
    slots, *residues = columns
    if residues:
        compensated_lerp_(slots, residues[0], live, fraction, journal or Journal())
    elif generator is not None:
        stochastic_lerp_(slots, live, fraction, generator, journal or Journal())
    else:
        tensors.lerp_all_([slots], live, [fraction], journal=journal)


@no_grad
def _masked_move_(
    fraction: float,
    columns: list[list[Tensor]],
    live: list[Tensor],
    generator: torch.Generator | None,
    ok: Tensor,
    journal: Journal,
) -> None:
    """A move that is made beside the slots, part by part, and kept if `ok` is True.

    A fraction of 0 instead would make NaN of a NaN times 0.
    """
    here = ok.to(columns[0][0].device)
    length = chunk_length([live[0], columns[0][0]], temporaries=3)
    for weights, *rows in parts([live, *columns], length):
        moved = [[tensor.clone() for tensor in row] for row in rows]
        _rounded_move_(fraction, moved, weights, generator, None)
        journal.copy_(
            [
                (row, [torch.where(here, new, was) for new, was in zip(each, row, strict=True)])
                for row, each in zip(rows, moved, strict=True)
            ]
        )
