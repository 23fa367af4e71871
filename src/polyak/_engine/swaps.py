"""A swap: an average is in a model for a while, and afterwards the live weights return.

During a swap each tensor of the model holds the average, and a tensor beside it (a slot of the
average, or a temporary one) holds the live content (`polyak._engine.swapped`).

An exception may interrupt any call here at any line; calling it again finishes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol
from weakref import WeakMethod

from torch import Tensor

from polyak._engine.exchange import failure
from polyak._engine.pairs import Pairs
from polyak._engine.swapped import VERSIONS, SwappedPairs
from polyak._modes import forget_computed, no_grad, ordinary

_MOST = 8  # problems in a message


class Owner(NamedTuple):
    """The thread that has entered a block, and its asyncio task if it runs one."""

    thread: int
    task: int | None
    name: str


class Swappable(Protocol):
    """The attributes of an average that a swap sets: whether slots hold live weights, and what damaged them."""

    swapped: bool
    damaged: str


class Watched(Protocol):
    """The methods of the model's tensors that a swap needs."""

    def reshard(self) -> None: ...

    def unchanged(self) -> bool: ...

    def check(self, call: str) -> None: ...

    def by_name(self) -> dict[str, Tensor]: ...


class Swap:
    """One average in a model, for one block or several. `ended` is called by `close`.

    A swap does not keep the owner of `ended`: its blocks end when nothing could leave them any more.
    """

    def __init__(
        self,
        label: str,
        average: Swappable,
        pairs: Sequence[Pairs],
        model: Watched,
        owner: Owner,
        ended: WeakMethod[Callable[[], None]],
    ) -> None:
        self.label, self.owner = label, owner
        self.strayed = False
        """Whether the block has replaced or moved tensors."""
        self.out = False
        """Whether the model has the average, as far as the swap comes before others."""
        self.model = model
        self._average, self._pairs, self._ended = average, pairs, ended
        self._swapped = [SwappedPairs(each) for each in pairs]
        self._problems: dict[str, None] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """All memory with other contents than it had: the model's at the start, and slots of the average."""
        return [tensor for pairs in self._swapped for tensor in pairs.tensors]

    @property
    def names(self) -> list[str]:
        """The names of `tensors`."""
        return [name for each in self._pairs for name in each.names()]

    def carriers(self) -> tuple[list[Tensor], list[str]]:
        """All tensors that hold the average or the live weights now, and their names.

        They are `tensors`, and those that the block has moved, or put in the place of some.
        """
        tensors, names = self.tensors, self.names
        if not self.same():
            now = self.model.by_name()
            for pairs in self._pairs:
                new = [(i, pairs.live[i]) for i in pairs.moved()] + pairs.new(now)
                tensors += [t for _, t in new]
                names += [pairs.items[i].name for i, _ in new]
        return tensors, names

    def same(self) -> bool:
        """Whether no tensor was replaced or moved, as far as every block checks this."""
        return self.model.unchanged() and all(pairs.untouched() for pairs in self._swapped)

    @no_grad
    def put_in(self) -> None:
        """Writes the average into the model: for the first time, or again after `take_back`."""
        self._average.swapped = True  # before the first write: an error may come after any of them
        self.model.reshard()  # what FSDP2 has gathered would hide the average from the forward pass
        for pairs in self._swapped:
            pairs.begin()
        try:
            for pairs in self._swapped:
                pairs.put()
        except RuntimeError:
            self.model.check(f"applied({self.label!r})")  # it names the tensor that has changed
            raise
        # After all copies, since each of them counts versions up.
        version = VERSIONS.fresh()
        for pairs in self._swapped:
            pairs.mark(version)
        forget_computed()
        self.out = True

    @no_grad
    def take_back(self) -> None:
        """Restores the live weights, as many of them as possible."""
        if error := failure(
            self.model.reshard
        ):  # a root left whole by a forward pass has the average
            self._problems = {f"resharding failed ({error})": None}
        if self.out:
            self.strayed = not self.same()
            now = self.model.by_name() if self.strayed else None
            for pairs in self._swapped:
                pairs.look(now)
            self.out = False  # a repeated call must not look again: some contents are back by then
        for pairs in self._swapped:
            pairs.take()
        # Old versions come last: copies count up, and pairs may share a counter (views of one storage).
        for pairs in self._swapped:
            pairs.restore()
        forget_computed()

    def part(self) -> None:
        """From now on, writes by `follow` of other swaps change no content of this one."""
        for each in () if self.strayed else self._swapped:
            each.part(set(), exchanged=self.out)

    @no_grad
    def follow(self, swapped: Sequence[Tensor]) -> None:
        """Writes what the swapped memory holds now into tensors that have left it, or come in their place.

        `swapped` is the memory of all swaps, which stays as it is.
        """
        for each in self._swapped:
            each.follow(swapped)

    @ordinary
    def fork(self) -> None:
        """In a child process: a block on weights that both processes share is the parent's."""
        lacking = [pairs.fork() for pairs in self._swapped if self.out]
        if any(lacking):
            memory = "weights in shared memory, and its parent has the average"
            self._average.damaged = f"The process was forked inside a block on {memory}"

    def close(self) -> None:
        """After the last `take_back`: the average can be used again, unless its slots were changed."""
        if any(pairs.damaged for pairs in self._swapped):
            self._average.damaged = self.report()
        self._average.swapped = False
        if (ended := self._ended()) is not None:
            ended()

    def report(self) -> str:
        """Describe the changes that the block made to weights and average; empty if it made none."""
        problems = list(self._problems)
        for pairs in self._swapped:
            problems += pairs.problems
        if not problems:
            return ""
        damaged = any(pairs.damaged for pairs in self._swapped)
        fate = "the average is damaged" if damaged else "what was put there is dropped"
        return (
            f"applied: inside the block {'; '.join(problems[:_MOST])}. The live weights are back and "
            f"{fate}: train, load and move the model outside the block"
        )
