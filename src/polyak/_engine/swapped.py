"""Tensors of a model that have exchanged contents with other tensors, and get them back.

Autograd's version counters follow the contents: swapped tensors have a version of their own, so autograd
refuses a graph that was recorded under other contents. When the old contents are back, so is
the old version, or the one after it where something else may have changed: outside of blocks,
versions stay far below those of blocks.

An exception may interrupt any call here at any line; calling it again finishes it. So a step is marked
as done after it, in one assignment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from polyak import _system
from polyak._engine.exchange import Exchange, failure
from polyak._engine.memory import has_memory, identity, meeting, renew
from polyak._engine.pairs import Pairs
from polyak._ranks.sharding import local
from polyak._tensors import set_versions, versions

_MOST = 8  # names in a message


class _Versions:
    """Versions that no tensor has had, far above those that a count of writes reaches."""

    def __init__(self) -> None:
        self._next = 1 << 31

    def fresh(self) -> int:
        """The next one. A tensor that is written to counts on from it."""
        self._next += 1
        return self._next - 1

    def used(self, seen: Sequence[int]) -> None:
        """Notes how far tensors have counted on."""
        self._next = max(self._next, *seen, 0) + 1


VERSIONS = _Versions()


class SwappedPairs:
    """Pairs whose contents are exchanged for a while.

    After `look`, `problems` says what the block did to them, and `damaged` that slots have changed.
    """

    def __init__(self, pairs: Pairs) -> None:
        self.problems: dict[str, None] = {}  # a set in the order of finding
        self.damaged = False
        self.slots = pairs.slots
        self._pairs = pairs
        # A tensor may leave its memory in the block. Swaps below and above have that memory too.
        self._memory = [tensor.data for tensor in pairs.live]
        self._exchange = pairs.exchange()
        self._before: list[int] | None = None  # old versions, until the old contents are back
        self._version = 0
        self._moved: set[int] | None = None
        self._places = pairs.live
        self._left: set[int] = set()  # what a forked process does not exchange back
        self._now: Mapping[str, Tensor] | None = None
        self._changed_live: set[int] = set()
        self._changed_slots: set[int] = set()

    @property
    def tensors(self) -> list[Tensor]:
        """The model's memory at the start, and slots of the average."""
        return [*self._memory, *(self._pairs.asides if self.slots else ())]

    def begin(self) -> None:
        """Notes the old versions, before any of them changes: views of one storage share a counter."""
        if self._before is None:
            self._changed_live = self._changed_slots = set()
            before = versions(self._pairs.counted)
            VERSIONS.used(before)  # of a swap below, in which tensors were written to
            self._before = before

    def put(self) -> None:
        """Puts into the model what is aside."""
        self._exchange.to(True)

    def mark(self, version: int) -> None:
        """Sets a version; `look` finds it again in all tensors that were not written to."""
        set_versions(self._pairs.counted, [version] * len(self._pairs.counted))
        self._version = version

    def untouched(self) -> bool:
        """Whether every tensor is in its place and form, and its module's own.

        `Watched.unchanged` checks the tensors that have slots.
        """
        return (self._pairs.slots or self._pairs.own()) and self._pairs.fit()

    def look(self, now: Mapping[str, Tensor] | None) -> None:
        """Notes what the block has done, while the contents are still exchanged.

        `now` are the model's tensors by name, if the block has replaced or moved any.
        """
        seen = versions(self._pairs.counted)
        VERSIONS.used(seen)
        self._now, self._moved = now, None
        # One version for all, so that the usual block, which writes nothing, costs one comparison.
        if now is not None or seen != [self._version] * len(seen):
            self._judge(*self._pairs.written(seen, self._version))

    def take(self) -> None:
        """Restores the live content, wherever the block has left the tensors."""
        if self._before is None:
            return
        self._sort_out()
        self._exchange_back()

    def restore(self) -> None:
        """Sets the old versions, where the old contents are back."""
        if self._before is not None:
            counted, before = self._pairs.counted, self._before
            set_versions(counted, before)
            changed = sorted(self._pairs.places(self._changed_live, self._changed_slots))
            set_versions([counted[i] for i in changed], [before[i] + 1 for i in changed])
            self._before = None

    def _judge(self, written: set[int], slots: set[int]) -> None:
        pairs, moved = self._pairs, self._pairs.moved()
        renewed = self._renewed()
        changes = {
            i: renewed.get(i) or ("moved" if i in moved else "written to" if i in written else "")
            for i, item in enumerate(pairs.items)
            if pairs.slots
            or item.kind != "buffer"  # BatchNorm writes to buffers, which are kept aside
        }
        problems = [
            f"{pairs.items[i].name} was {change}" for i, change in changes.items() if change
        ]
        problems += [
            f"the slot of {pairs.items[i].name} was written to, and its live weight with it"
            for i in sorted(slots)
        ]
        self.problems = self.problems | dict.fromkeys(problems)
        # Not valid again: a graph that has saved a view of the memory where a tensor was, and one
        # that has saved another part of a storage, which alone may have been written to.
        unsure = {i for i in written if not _fills_storage(pairs.live[i])}
        self._changed_live = moved | slots | unsure
        self._changed_slots = written | moved | slots
        self.damaged = self.damaged or (pairs.slots and bool(self._changed_slots))

    def _renewed(self) -> dict[int, str]:
        """The places of tensors that the model no longer has, and what was done to them."""
        if self._now is None:
            return {}
        strays = {i: "replaced" for i, _, new in self._pairs.strays(self._now) if new}
        renewed = self._pairs.renewed(self._now)
        return strays | {i: "removed" if now is None else "replaced" for i, now in renewed}

    def _sort_out(self) -> set[int]:
        """The tensors that have left their memory; contents are exchanged where they are from now on."""
        if self._moved is None:
            moved = set() if self._now is None else self._pairs.moved()
            for i in moved:
                renew(self._memory[i])
            if self._now is not None:
                self.part(moved, exchanged=True)
            self._moved = moved
        return self._moved

    def part(self, moved: set[int], *, exchanged: bool) -> None:
        """Exchanges contents from now on where they are, whatever happens to the tensors."""
        live = enumerate(self._pairs.live)
        self._places = [self._memory[i] if i in moved else t.detach() for i, t in live]
        both = zip(self._places, self._pairs.asides, strict=True)
        kept = [pair for i, pair in enumerate(both) if i not in self._left]
        self._exchange = Exchange([a for a, _ in kept], [b for _, b in kept], exchanged=exchanged)

    def fork(self) -> bool:
        """Leaves weights in shared memory to the parent process; returns whether a slot lacks its average."""
        asides = self._pairs.asides
        for aside, shared in zip(asides, shared_memory(asides), strict=True):
            if shared:  # since the block began: both processes have live weights there
                aside.data = aside.clone()
        self._left = {i for i, shared in enumerate(shared_memory(self._memory)) if shared}
        if self._left:
            self.part(set(), exchanged=True)
        return self.slots and bool(self._left)

    def _exchange_back(self) -> None:
        error = failure(lambda: self._exchange.to(False))
        if error:
            # The live content comes first: it is copied, and the average in its place is lost.
            names = ", ".join(item.name for item in self._pairs.items[:_MOST])
            self.damaged = self._pairs.slots
            self._changed_slots = set(range(len(self._pairs.live)))
            for lost in self._exchange.give_up():
                self._tell(f"one of {names} could not be given back", lost)
            self._tell(f"{names} could not be exchanged", error)

    def _tell(self, problem: str, error: str) -> None:
        self.problems[f"{problem} ({error})"] = None

    def follow(self, swapped: Sequence[Tensor]) -> None:
        """Writes the content also into tensors that have left its memory, or come in their place.

        `swapped` is the memory of all swaps: a tensor that lies in it, or shares memory with another one
        of the model, gets memory of its own.
        """
        if self._now is None:
            return
        items, gone = self._pairs.items, {i for i, _ in self._pairs.renewed(self._now)}
        free = {name for i in gone for name in items[i].names}
        names: dict[int, set[str]] = {}
        for name, tensor in self._now.items():
            names.setdefault(id(local(tensor)), set()).add(name)
        new = [(i, self._pairs.live[i]) for i in sorted(self._sort_out())]
        new = [(i, t) for i, t in new if names.get(id(t), set()) & set(items[i].names)]
        for i, tensor in self._pairs.new(self._now):
            ties = names[id(tensor)] - set(items[i].names)
            for other in ties:
                self._tell(
                    f"{items[i].name} could not be given back", f"{other} is the same tensor"
                )
            if ties <= free:
                new.append((i, tensor))
        new = [(i, t) for i, t in new if identity(t) != identity(self._places[i])]
        mine = {name for i, _ in new for name in items[i].names}
        others = [local(t) for name, t in self._now.items() if name not in mine]
        shared = set(meeting([t for _, t in new], [*others, *swapped]))
        for k, (i, tensor) in enumerate(new):
            self._write(i, tensor, self._places[i], anew=k in shared)

    def _write(self, i: int, tensor: Tensor, content: Tensor, *, anew: bool) -> None:
        """Writes content into a tensor, which keeps its dtype and device but not another shape."""

        def write() -> None:
            if tensor.shape != content.shape or not has_memory(tensor):
                tensor.data = content.clone()
            elif anew:
                tensor.data = content.to(tensor.device, tensor.dtype, copy=True)
            else:
                tensor.copy_(content)

        if error := failure(write):
            self._tell(f"{self._pairs.items[i].name} could not be given back", error)


def shared_memory(tensors: Sequence[Tensor]) -> list[bool]:
    """Which tensors other processes, such as forked ones, may share. A forked process cannot use a GPU's."""
    told = _system.shared([t.data_ptr() for t in tensors])
    if told is None:
        told = [t.is_shared() for t in tensors]
    return [t.is_cpu and each for t, each in zip(tensors, told, strict=True)]


def _fills_storage(tensor: Tensor) -> bool:
    return tensor.nbytes == tensor.untyped_storage().nbytes()
