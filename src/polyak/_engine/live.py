"""The live weights: a model's tensors, found again at every use, in groups for one foreach call."""

from __future__ import annotations

import operator
from collections.abc import Container, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from polyak._checks import difference, listed, report
from polyak._dtypes import Kind, kind
from polyak._engine import open_swaps
from polyak._engine.inventory import Inventory
from polyak._engine.refusals import CHANGE_FIRST
from polyak._engine.tracking import Choice, Entry, ModelWalk, Source, Tracked, by_name, track
from polyak._engine.watch import FORM, Watch, refuse_scripted
from polyak._parts import Stages
from polyak._ranks.sharding import Shape, reshard
from polyak._tensors import Groups

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Form = tuple[Shape | str, ...]
"""The properties of a tensor that may not change: its shape, its policy, and whether it is complex."""


class ModelTensors:
    """The tensors of a model that are averaged or copied, and where they are now.

    Tensors keep the order of the first look, or that of the model `like` this one, even where the
    model's order changes later: lists in parallel to `averaged` and `copied` stay right. `indices` are those of
    `averaged` that one foreach call can take, group by group. `streams` name the groups; they are
    equal on ranks that have the same parts. `generation` counts how often tensors were found to be
    replaced or moved, so that callers know when to group their own tensors again.
    """

    tracked: list[Tracked]
    averaged: list[Tracked]
    copied: list[Tracked]
    frozen: list[Tracked]
    indices: list[list[int]]
    groups: Groups
    streams: list[str]
    stages: Stages
    _copied_entries: list[Entry]
    _copied_here: list[Tensor]
    _copied_forms: list[tuple[object, ...]]
    _watch: Watch
    _inventory: Inventory

    def __init__(
        self,
        model: Source,
        choice: Choice,
        *,
        mesh: DeviceMesh | None = None,
        like: ModelTensors | None = None,
    ) -> None:
        self.model = model
        self._options = (choice, mesh)
        self.generation = 0
        self.suspect = ""
        """Why averages of these tensors may be wrong."""
        self._forms: dict[str, Form] = {} if like is None else like._forms
        self.reshard()
        found = self._look()
        if like is None:
            _require_averaged(found.tracked)
            self._forms = _forms(found.tracked)
            self._ties = _ties(found.tracked)
            self._order = {item.name: place for place, item in enumerate(found.tracked)}
        else:
            self._ties, self._order = like._ties, like._order
            if lines := self._changes(found.tracked):
                raise ValueError(
                    report("EMA: ema_model and the model have different tensors", lines)
                )
        self._adopt(found)

    def __getstate__(self) -> dict[str, Any]:
        """The attributes that a copy is made from: all that a walk through the model does not find."""
        kept = ("model", "_options", "_forms", "_ties", "_order", "generation", "suspect")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._inventory = Inventory([])  # of nothing, so that the copy is looked at
        self.check("copy")

    def trained(self, call: str = "update") -> Groups:
        """The averaged weights as they are trained, in groups of one dtype and device: the hot path.

        Raises `RuntimeError` if they or copied tensors hold an average, in a block of any averager.
        """
        if open_swaps.OPEN:
            open_swaps.refuse_swapped(call, self.stored())
        if not self.unchanged():
            self.check(call)
        return self.groups

    def current(self, call: str) -> Groups:
        """The averaged weights as the model has them, in groups of one dtype and device.

        What `Watch` does not notice of tensors that moved is still averaged rightly.
        """
        if not self.unchanged():
            self.check(call)
        return self.groups

    def unchanged(self) -> bool:
        """Whether `averaged` are the tensors that were found last, as far as an update looks.

        Objects are compared by identity; what `Watch` says of tensors that change in place holds.
        """
        watch = self._watch
        tensors, forms = next(watch.parts)
        return (
            all(map(operator.is_, chain.from_iterable(watch.views), watch.seen))
            and list(map(FORM, tensors)) == forms
            and not self._replaced()
            and (watch.shards is None or watch.shards.unmoved())
            and (watch.tied is None or watch.tied.same())
        )

    def _replaced(self) -> bool:
        """Whether a module has another table than it had: weights in the old one are dead.

        `__setstate__`, `__dict__.update` and who assigns a table replace it.
        """
        # Plain loops: each step is half the price of a call of `map(operator.attrgetter(...))`.
        for module, table in self._watch.parameters:
            if module._parameters is not table:
                return True
        for module, table in self._watch.buffers:
            if module._buffers is not table:
                return True
        for module, table in self._watch.families:  # noqa: SIM110
            if module._modules is not table:
                return True
        return False

    def group(self, flat: Sequence[Tensor]) -> Groups:
        """Tensors in the order of `averaged`, in the groups of the live weights."""
        return [[flat[i] for i in indices] for indices in self.indices]

    def copied_now(self) -> list[Tensor]:
        """The tensors to copy, in the order of `copied`.

        Raises `RuntimeError` if one is gone, has another shape, or became complex.
        """
        found = list(map(Entry.now, self._copied_entries))
        if not all(map(operator.is_, found, self._copied_here)):  # replaced, or spread over ranks
            found = [tensor for tensor in map(Tracked.own, self.copied) if tensor is not None]
        if list(map(FORM, found)) != self._copied_forms:
            self.check("update")
            found = [item.local() for item in self.copied]
        return cast("list[Tensor]", found)

    def check(self, call: str) -> None:
        """Looks all tensors up again; raises `RuntimeError` if names, ties, shapes or policies differ."""
        self.reshard()
        if self._inventory.holds() and not self.thawed():
            return
        try:
            found = self._look()
        except ValueError as error:
            lines = [str(error), *self._suspect()]
            raise RuntimeError(report(f"{call}: the model has changed", lines)) from error
        if lines := self._changes(found.tracked):
            lines += self._suspect()
            if _forms(found.tracked) != self._forms:
                lines.append(CHANGE_FIRST)
            title = f"{call}: not the tensors that the averager was made with"
            raise RuntimeError(report(title, lines))
        if not open_swaps.is_swapped(self):  # a swap needs the old tensors to see what was replaced
            self._adopt(found)

    def thawed(self) -> bool:
        """Whether a frozen parameter trains now, which no average follows."""
        return any(item.trains for item in self.frozen)

    def _suspect(self) -> list[str]:
        """Marks averages that may hold tensors of another shape, which updates have overlooked; says so."""
        if names := self._watch.overlooked():
            how = "got another shape or dtype in place (.data, resize_, set_)"
            self.suspect = f"{names} {how}, and earlier updates may have averaged that"
        return [self.suspect] if self.suspect else []

    def reshard(self) -> None:
        """Puts a sharded model's shards back in place of the gathered weights of a forward pass."""
        reshard(self.model)

    def by_name(self) -> dict[str, Tensor]:
        """Name -> the tensor that the model has now, also where modules were replaced."""
        return by_name(self.model)

    def stored(self) -> list[Tracked]:
        """All that is averaged or copied, in order."""
        return [item for item in self.tracked if item.stored]

    def readable(self) -> list[Tracked]:
        """All that an average has when it is read, in order: what is stored, and what is frozen."""
        return [item for item in self.tracked if item.policy != "skip"]

    def _look(self) -> ModelWalk:
        tracked, modules = track(self.model, *self._options)
        refuse_scripted(tracked)
        return ModelWalk([_by_known_name(item, self._forms) for item in tracked], modules)

    def _changes(self, tracked: Sequence[Tracked]) -> list[str]:
        """Lines that say how names, ties, shapes and policies differ from those of the start."""
        changed = difference(self._forms, _forms(tracked))
        return changed + _changed_ties(self._ties, _ties(tracked)) + _thawed(tracked)

    def _adopt(self, found: ModelWalk) -> None:
        last = len(self._order)
        tracked = sorted(found.tracked, key=lambda item: self._order.get(item.name, last))
        averaged = [item for item in tracked if item.policy == "average"]
        here = [item.local() for item in averaged]
        indices: dict[tuple[Kind, str], list[int]] = {}
        for i, (item, tensor) in enumerate(zip(averaged, here, strict=True)):
            indices.setdefault((kind(tensor), item.stream()), []).append(i)
        groups = [[here[i] for i in each] for each in indices.values()]
        copied = [item for item in tracked if item.policy == "copy"]
        copied_here = [item.local() for item in copied]
        stored = [item for item in tracked if item.stored]
        new = {
            "tracked": tracked,
            "averaged": averaged,
            "copied": copied,
            "frozen": [item for item in tracked if item.policy == "frozen"],
            "indices": list(indices.values()),
            "streams": [f"{dtype} {each}" for (dtype, _), each in indices],
            "stages": Stages(),
            "generation": self.generation + 1,
            "groups": groups,
            "_copied_entries": [item.entries[0] for item in copied],
            "_copied_here": copied_here,
            "_copied_forms": list(map(FORM, copied_here)),
            "_watch": Watch(self.model, stored, found.modules, groups),
            "_inventory": Inventory(found.modules),
        }
        vars(self).update(new)  # in one step, in which no signal handler can raise


def _require_averaged(tracked: Sequence[Tracked]) -> None:
    if not any(item.policy == "average" for item in tracked):
        raise ValueError(
            f"nothing to average among {len(tracked)} tensors: wanted at least one selected "
            "floating-point parameter; check `model` and `select`"
        )


def _by_known_name(item: Tracked, known: Container[str]) -> Tracked:
    """A tied tensor by the name that it had before: the model's order may have changed since."""
    if item.name in known or len(item.entries) == 1:
        return item
    entries = sorted(item.entries, key=lambda entry: entry.name not in known)
    return item._replace(entries=tuple(entries))


def _forms(tracked: Sequence[Tracked]) -> dict[str, Form]:
    """name -> shape and policy of every tensor that an average has, frozen ones by their name alone."""
    return {item.name: _form(item) for item in tracked if item.policy != "skip"}


def _form(item: Tracked) -> Form:
    if not item.stored:
        return (), item.policy
    form = item.shape(), item.policy
    return (*form, "complex") if item.found().is_complex() else form


def _ties(tracked: Sequence[Tracked]) -> dict[str, str]:
    """Every name but the first of a tensor that an average has -> that first name."""
    kept = (item for item in tracked if item.policy != "skip")
    return {entry.name: item.name for item in kept for entry in item.entries[1:]}


def _thawed(tracked: Sequence[Tracked]) -> list[str]:
    """Lines that say which frozen parameters train now: no average follows them."""
    names = [item.name for item in tracked if item.policy == "frozen" and item.trains]
    if not names:
        return []
    return [
        f"trains now and was frozen: {listed(names)}",
        'make the averager after requires_grad is set, or with select="*", which averages frozen '
        "parameters too",
    ]


def _changed_ties(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Lines that say which names mean one tensor now and did not before, and the reverse."""
    pairs = sorted(set(now.items()) - set(before.items()))
    lines = [f"tied since: {name} to {first}" for name, first in pairs]
    pairs = sorted(set(before.items()) - set(now.items()))
    return lines + [f"no longer tied: {name} to {first}" for name, first in pairs]
