"""Moving: slots move towards the live weights, all of them or none, whatever exception comes.

A signal handler may raise between any two lines of an update. `Motion` then goes on where it was
broken off: an average of which some tensors have moved and others have not would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from polyak import _tensors as tensors
from polyak._engine import lending, signals
from polyak._engine.infinities import Infinities
from polyak._engine.rounding import compensated_lerp_, stochastic_lerp_
from polyak._parts import Stages, chunk_length, parts
from polyak._tensors import Groups, Journal, Kept


class Move(NamedTuple):
    """A slot's tensors in the groups of the live weights, how far they move, and how they are rounded.

    `seeds` are for each group's own random numbers, apart from those of training.
    """

    slots: Groups
    fraction: float
    infinities: Infinities
    residues: Groups | None = None
    seeds: Sequence[int] | None = None


_FRACTION = attrgetter("fraction")


class Motion:
    """`slot <- lerp(slot, live, fraction)` for every move, in one pass over the live weights.

    `ok` is a 0-dim bool tensor; if it is False, nothing changes. It is never synchronised to the
    host. `stages` are those of the model (`ModelTensors.stages`).
    """

    __slots__ = ("_journal", "_kept", "_live", "_moves", "_ok", "_stages")

    def __init__(
        self,
        live: Groups,
        moves: Sequence[Move],
        ok: Tensor | None = None,
        stages: Stages | None = None,
    ) -> None:
        self._live, self._ok, self._stages = live, ok, stages
        self._moves = list(filter(_FRACTION, moves))  # a lerp by 0 would make NaN of an infinity
        self._kept: Kept | None = None
        self._journal = Journal()

    @property
    def begun(self) -> bool:
        """Whether a slot may have been written to."""
        return self._journal.begun

    def run(self) -> None:
        """Moves the slots."""
        if self._kept is None:  # what slots share with weights before any of them moves
            kept: Kept = []
            for move in self._moves:
                if move.fraction == 1:
                    move.infinities.forget()
                elif move.infinities.none_in is not move.slots:
                    kept += move.infinities.shared(move.slots, self._live, move.residues)
            self._kept = kept
        plain = []
        for move in self._moves:
            if self._ok is None and move.residues is None and move.seeds is None:
                plain.append(move)
            else:
                self._move_alone_(move)
        for g, weights in enumerate(self._live if plain else ()):
            slots, fractions = [move.slots[g] for move in plain], [move.fraction for move in plain]
            tensors.lerp_all_(slots, weights, fractions, self._stages, g, self._journal)
        if self._kept:
            tensors.keep_(self._kept)

    def finish(self) -> None:
        """Goes on where an exception has broken `run` off."""
        self._journal.again()
        self.run()

    def _move_alone_(self, move: Move) -> None:
        """A move that is rounded in its own way, or that `ok` may take back."""
        for g, weights in enumerate(self._live):
            columns = [move.slots[g], *([] if move.residues is None else [move.residues[g]])]
            generator = _generator(move, g)
            if self._ok is None:
                _rounded_move_(move.fraction, columns, weights, generator, self._journal)
            else:
                _masked_move_(move.fraction, columns, weights, generator, self._ok, self._journal)


@signals.critical
def undisturbed(action: Callable[[], object]) -> None:
    """Runs an action while signal handlers wait; then it lets them run."""
    try:
        signals.hold()
        action()
    finally:
        lending.hear_signals()


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


@torch.no_grad()
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
