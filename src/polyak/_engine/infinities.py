"""Constant infinities, as in an attention mask, which updates leave as they are.

`lerp(inf, inf)` is NaN, because it computes `inf - inf`. To look for infinities at every update would
read all slots once more. A slot gets the infinities of constant weights with its copy, so one look
after each copy is enough; only the tensors that it finds cost more at later updates. Weights that
become infinite later are not constant: their average is infinite once, and NaN from then on.
"""

from __future__ import annotations

import torch

from polyak._tensors import Groups, Kept, equal_infinities, infinite


class Infinities:
    """The tensors of one slot that hold infinities, as of the first lerp after its last copy."""

    def __init__(self) -> None:
        self.none_in: Groups | None = None
        """The slots, if they hold no infinity: the usual case, which needs no further check."""
        self._looked_at: Groups | None = None
        self._places: list[tuple[int, list[int]]] = []

    def forget(self) -> None:
        """The slot is copied: look again at the next lerp."""
        self._looked_at = self.none_in = None

    def shared(self, slots: Groups, live: Groups, residues: Groups | None) -> Kept:
        """Where a slot and the weights hold the same infinity; what rounding dropped there is 0."""
        if self._looked_at is not slots:
            found = ((g, infinite(group)) for g, group in enumerate(slots))
            self._places = [(g, places) for g, places in found if places]
            self._looked_at = slots
            self.none_in = None if self._places else slots
        kept: Kept = []
        for g, places in self._places:
            held = equal_infinities([slots[g][j] for j in places], [live[g][j] for j in places])
            kept += held
            if residues is not None:
                lows = [residues[g][j] for j in places]
                pairs = zip(lows, held, strict=True)
                kept += [(low, same, torch.zeros_like(low)) for low, (_, same, _) in pairs]
        return kept
