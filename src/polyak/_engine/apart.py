"""Whether a model has slots of its own average, as after `load_state_dict(assign=True)` of a state.

Training then changes the average. Autograd's versions of the slots tell whether it has: they are noted
when an averager gives its slots to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from polyak._engine.memory import meeting
from polyak._engine.tracking import Tracked
from polyak._tensors import set_versions, versions


class SharedSlot(NamedTuple):
    """The name of a weight that is a slot, or was one before; whether it still is; whether slots changed."""

    name: str
    shared: bool
    written: bool


class Apart:
    """Looks whether weights are slots. A slot that was one stays suspect until the model has its own."""

    def __init__(self) -> None:
        self._noted: list[int] = []
        self._before = ""

    def note(self, slots: Sequence[Tensor]) -> None:
        """Notes how often the slots were written to."""
        self._noted = versions(slots)

    def written(self, slots: Sequence[Tensor]) -> list[int]:
        """The places of the slots that were written to since `note`."""
        now = versions(slots)
        if now == self._noted:
            return []
        return [i for i, (a, b) in enumerate(zip(now, self._noted, strict=True)) if a != b]

    def look(self, averaged: Sequence[Tracked], slots: Sequence[Tensor]) -> SharedSlot:
        """Compares the memory of the weights with that of the slots."""
        weights = [item.local() for item in averaged]
        places = meeting(weights, slots)
        name = averaged[places[0]].name if places else self._before
        self._before = averaged[places[0]].name if places else ""
        if not name:
            return SharedSlot("", shared=False, written=False)
        intact = versions(slots) == self._noted
        intact = intact and _counted_together(slots, [weights[i] for i in places])
        return SharedSlot(name, bool(places), not intact)


def _counted_together(slots: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether a write to a weight counts as one to its slot; it does not if `.data` or `set_` gave it."""
    before, seen = versions(slots), versions(weights)
    set_versions(slots, [version + 1 for version in before])
    apart = [a for a, b in zip(versions(weights), seen, strict=True) if a == b]
    set_versions(slots, before)
    return not apart
