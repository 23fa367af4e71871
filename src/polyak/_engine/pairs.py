"""Pairs of tensors: one of the model, and one that keeps its content for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from polyak._engine.exchange import Exchange
from polyak._engine.memory import forms, has_memory
from polyak._engine.tracking import Entry, Tracked
from polyak._engine.watch import FORM
from polyak._modes import inference
from polyak._parts import CHUNK_BYTES
from polyak._ranks.sharding import local


class Pairs:
    """Tensors of a model, of one dtype and device, each with the one that takes its live content.

    `slots` says that those are slots of the average, which a write in the block would change.
    """

    def __init__(self, items: list[Tracked], asides: list[Tensor], *, slots: bool) -> None:
        self.items, self.asides, self.slots = items, asides, slots
        found = [item.found() for item in items]
        self.live = list(map(local, found))
        # Graphs save the objects that forward passes use: a DTensor (tensor parallelism), and the
        # objects under other names of a tied tensor. Each may have a version of its own.
        self.others: list[tuple[int, Entry, Tensor]] = [
            (i, entry, entry.found()) for i, item in enumerate(items) for entry in item.entries[1:]
        ]
        objects = [*enumerate(found), *((i, other) for i, _, other in self.others)]
        extra = {id(t): (i, t) for i, t in objects if t is not self.live[i]}
        self.extra = [i for i, _ in extra.values()]
        wrappers = [tensor for _, tensor in extra.values()]
        self.counted = [*self.live, *wrappers, *(asides if slots else ())]
        self._forms = forms(self.live)
        self._staging: list[Tensor] | None = None

    def names(self) -> list[str]:
        """The names of the live tensors, and then those of the slots."""
        names = [item.name for item in self.items]
        return names + [f"the slot of {name}" for name in names if self.slots]

    def fit(self) -> bool:
        """Whether all tensors are where they were, and in the form in which contents can be exchanged."""
        return forms(self.live) == self._forms

    def own(self) -> bool:
        """Whether the modules that had the tensors have them still, under all their names."""
        others = {entry.name: entry.now() for _, entry, _ in self.others}
        return all(
            item.own() is part for item, part in zip(self.items, self.live, strict=True)
        ) and not any(self.strays(others))

    def renewed(self, now: Mapping[str, Tensor | None]) -> Iterator[tuple[int, Tensor | None]]:
        """The places of tensors that the model no longer has under their first name; what it has."""
        for i, (item, part) in enumerate(zip(self.items, self.live, strict=True)):
            found = now.get(item.name)
            if found is None or local(found) is not part:
                yield i, None if found is None else local(found)

    def strays(self, now: Mapping[str, Tensor | None]) -> Iterator[tuple[int, Tensor | None, bool]]:
        """Tensors that another name no longer shares: place, what that name has now, if it is new."""
        for i, entry, before in self.others:
            found = now.get(entry.name)
            part = None if found is None else local(found)
            if found is not before or (
                part is not None and part.data_ptr() != self.live[i].data_ptr()
            ):
                yield i, part, found is not before

    def new(self, now: Mapping[str, Tensor | None]) -> list[tuple[int, Tensor]]:
        """The places of live tensors that were replaced by others, and these others."""
        found = [*self.renewed(now), *((i, part) for i, part, _ in self.strays(now))]
        return [(i, part) for i, part in found if part is not None]

    def moved(self) -> set[int]:
        """The places of live tensors that have other memory than they had, another form, or no memory."""
        # A copy between forms converts values: the live content would not come back bit for bit.
        there = zip(self.live, self._forms.addresses, self.asides, strict=True)
        return {
            i
            for i, (t, pointer, aside) in enumerate(there)
            if t.data_ptr() != pointer or FORM(t) != FORM(aside) or not has_memory(t)
        }

    def exchange(self) -> Exchange:
        """An exchange of all pairs, as if it had not begun."""
        return Exchange(self.live, self.asides, self._staging or self._staged())

    def _staged(self) -> list[Tensor] | None:
        """Temporary memory for slots that are one small chunk together, kept from block to block.

        A copy into it takes a third of the time of a clone of many tiny tensors.
        """
        size = sum(t.numel() for t in self.asides) * self.asides[0].element_size()
        # Temporary asides end with the block, and so would this memory: only slots repay it.
        if self.slots and size <= CHUNK_BYTES:
            with inference(False):
                self._staging = [torch.empty_like(t) for t in self.asides]
        return self._staging

    def written(self, seen: Sequence[int], version: int) -> tuple[set[int], set[int]]:
        """The places of live tensors and of asides that were written to, by the versions of `counted`."""
        # A write into an empty tensor counts up its version too, and changes nothing.
        filled = [tensor.numel() > 0 for tensor in self.counted]
        changed = [full and each != version for full, each in zip(filled, seen, strict=True)]
        live, rest = changed[: len(self.live)], changed[len(self.live) :]
        places = {i for i, each in enumerate(live) if each}
        places |= {i for i, each in zip(self.extra, rest, strict=False) if each}
        return places, {i for i, each in enumerate(rest[len(self.extra) :]) if each}

    def places(self, live: set[int], asides: set[int]) -> set[int]:
        """The places in `counted` of some live tensors and of some asides."""
        first = len(self.live)
        found = live | {first + k for k, i in enumerate(self.extra) if i in live}
        first += len(self.extra)
        return found | ({first + i for i in asides} if self.slots else set())
