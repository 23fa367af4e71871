"""Signs that the averaged tensors are still those that were found.

`ModelTensors.unchanged` checks it at every update.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, cycle
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyak._engine.memory import Forms, forms
from polyak._engine.tracking import Entry, Source, Table, Tracked
from polyak._ranks.sharding import Shards, is_distributed, local
from polyak._tensors import Groups

LEAST_LOOKS = 8
ELEMENTS_A_LOOK = 16384
"""To look at a tensor's shape and dtype takes as long as to move some 200 elements of its average."""

FORM = operator.attrgetter("shape", "dtype", "device")
_END = {None: None}.values()  # without it, an entry added behind the last would not be seen


class Watch:
    """Checks that `groups` are still the averaged tensors of a model, without a walk.

    Objects are compared by identity: the tensors, the modules, and the tables that modules keep them
    in. Tensors that were moved in place (`.to`) are noticed by the first of their group, since models
    move as a whole. A tensor that got another shape in place (`.data`, `resize_`) must be noticed
    before a lerp stretches it over its slot, or fails halfway. Each update looks at as many tensors,
    in turn, as cost about one percent of its time: at all of them, unless most are tiny. It always
    looks at the first of each group.
    """

    def __init__(
        self,
        model: Source,
        stored: Sequence[Tracked],
        modules: Sequence[nn.Module],
        groups: Groups,
    ) -> None:
        averaged = [item for item in stored if item.policy == "average"]
        entries = [entry for item in averaged for entry in item.entries]
        self.parameters = _tables(entries, "_parameters")
        self.buffers = _tables(entries, "_buffers")
        self.families = [(m, m._modules) for m in modules if m._modules and not _is_scripted(m)]
        tables: list[Mapping[str, object]] = [] if modules else [cast(Any, model)]
        for watched in (self.parameters, self.buffers, self.families):
            tables += [table for _, table in watched]
        self.views = [*(table.values() for table in tables), _END]
        self.seen = list(chain.from_iterable(self.views))
        whole = [item.found() for item in averaged]
        divided = [t for item, t in zip(averaged, whole, strict=True) if item.mesh is not None]
        spread = bool(divided) or any(map(is_distributed, whole))
        self.shards = Shards(whole, divided) if spread else None
        tied = list(filter(_is_unseen_tie, stored))
        self.tied = Places(tied) if tied else None
        self._names = [item.name for item in averaged]
        self._tensors = list(map(local, whole))
        self._forms = list(map(FORM, self._tensors))
        self._looks = max(LEAST_LOOKS, sum(map(Tensor.numel, self._tensors)) // ELEMENTS_A_LOOK)
        firsts = [group[0] for group in groups] if self._looks < len(whole) else []
        starts = range(0, len(whole), self._looks)
        parts = [[*self._tensors[i : i + self._looks], *firsts] for i in starts]
        self.parts = cycle([(part, list(map(FORM, part))) for part in parts])

    def overlooked(self) -> str:
        """The tensors of another shape, if earlier updates may have averaged them unseen."""
        if self._looks >= len(self._tensors):
            return ""
        looks = zip(self._names, self._tensors, self._forms, strict=True)
        return ", ".join([name for name, tensor, form in looks if _differs(tensor, *form)][:8])


def refuse_scripted(tracked: Iterable[Tracked]) -> None:
    """Raises `ValueError` for averaged weights of a module of TorchScript, which may replace them unseen."""
    for item in tracked:
        if item.policy == "average" and any(_is_scripted(entry.owner) for entry in item.entries):
            raise ValueError(
                f"{item.name} belongs to a scripted or traced module (torch.jit), which can replace it "
                "unseen: average the module that it was made from, give the averager "
                "dict(model.named_parameters()) as its model, or leave the weight out with `select`"
            )


def _is_scripted(owner: object) -> bool:
    return isinstance(owner, torch.jit.ScriptModule)


class Places:
    """Where the tensors of some items are, under all their names.

    A name of a tied tensor may get a tensor of its own, while the first name keeps its tensor.
    """

    def __init__(self, items: Iterable[Tracked]) -> None:
        self._entries = [entry for item in items for entry in item.entries]
        self._tensors = [entry.found() for entry in self._entries]
        self._spread = any(map(is_distributed, self._tensors))
        self._forms = self._forms_now()

    def same(self) -> bool:
        """Whether every name has the tensor that it had, in the same memory and form."""
        now = map(Entry.now, self._entries)
        return all(map(operator.is_, now, self._tensors)) and self._forms_now() == self._forms

    def _forms_now(self) -> Forms:
        return forms(list(map(local, self._tensors)) if self._spread else self._tensors)


def _is_unseen_tie(item: Tracked) -> bool:
    """Whether one name of an item may lose the tensor, and the tables and first names stay the same."""
    objects = {id(entry.found()) for entry in item.entries}
    return len(objects) > 1 or (item.policy == "copy" and len(item.entries) > 1)


def _tables(entries: Iterable[Entry], table: Table) -> list[tuple[nn.Module, Mapping[str, object]]]:
    """The modules that hold entries in one of their tables, each once, with that table."""
    owners = {id(entry.owner): entry.owner for entry in entries if entry.table == table}
    return [(cast(nn.Module, owner), getattr(owner, table)) for owner in owners.values()]


def _differs(tensor: Tensor, shape: torch.Size, dtype: torch.dtype, _: object) -> bool:
    """Whether a tensor has another shape, or values of another domain: integer, real or complex."""
    to, back = torch.can_cast(tensor.dtype, dtype), torch.can_cast(dtype, tensor.dtype)
    return tensor.shape != shape or not (to and back)
