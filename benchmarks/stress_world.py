"""One program's world: the model and its twin, the averagers, the open blocks, and the laws.

`ask` is the one door to polyak. It knows in which situations a call must be refused, and in which it
may be: a refusal anywhere else is a fault, and so is one that leaves anything changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from stress_averagers import Subject, form, vector
from stress_models import (
    Entry,
    Kind,
    Source,
    addresses,
    bits,
    contents,
    entries,
    faithful_copy,
    first_names,
    overlaps,
)
from stress_mutations import put
from stress_rules import Fault, Vector

MUST, MAY = "must", "may"
PATIENCE = 300.0  # seconds that a call in another thread may take, on a busy machine too
ERRORS = (ValueError, TypeError, RuntimeError, KeyError, FloatingPointError)

_STRUCTURE = {
    "changed": MAY,
    "changed elsewhere": MAY,
    "aliased": MAY,
    "overlap": MAY,
    "expanded": MAY,
    "lazy view": MAY,
}
_BLOCKS = {"applied": MUST, "left out of order": MAY, "other block": MAY, "other thread": MAY}
_READS = {**_STRUCTURE, **_BLOCKS, "wrong rule later": MAY}

REFUSALS: Mapping[str, Mapping[str, str]] = {
    "make": {
        "refused kind": MUST, "nothing": MUST, "wide stochastic": MUST, "expanded": MUST, "lazy view": MAY,
        "part of a refused kind": MAY, "overlap": MAY, "other block": MAY,
    },
    "update": {
        **_STRUCTURE, **_BLOCKS,
        "changed": MUST, "wrong rule": MUST, "not finite": MUST, "wrong rule later": MAY,
    },
    "average": {**_READS, "no update": MUST, "spoilt": MUST},
    "copy_to": {**_READS, "no update": MUST, "spoilt": MUST},
    "state": {**_READS, "spoilt": MUST, "own rule in a file": MAY},
    "load": {**_READS, "other forms": MAY, "own rule in a file": MAY},
    "summary": _READS,
    "enter": {
        **_READS, "applied": MAY, "restructured": MAY, "other average applied": MUST, "no update": MUST, "spoilt": MUST,
    },
    "leave": {**_STRUCTURE, "written": MAY, "restructured": MAY},
    "attach": {**_STRUCTURE, "attached": MUST, "none of its weights": MAY, "restructured": MAY},
    "step": {**_BLOCKS, "applied": MAY},
    "copy the averager": {**_READS, "spoilt": MUST},
    "EMA": {"changed": MUST, "changed elsewhere": MAY, "other block": MAY, "lazy view": MAY},
}  # fmt: skip
"""call -> situation -> whether it must or may be refused there. Anywhere else it may not be."""


@dataclass(eq=False)
class Block:
    """An open `applied()`: whose, of which average, in which thread, and what the model carries in it."""

    subject: Subject
    name: str
    manager: AbstractContextManager[None]
    thread: int
    carries: Vector
    repeated: bool


@dataclass
class Refused:
    """What a call raised where it had a reason to."""

    error: BaseException


@dataclass
class World:
    """All that one program works on.

    `clean` says that nothing but polyak wrote to the model since blocks opened, `ordered` that blocks
    were left in the opposite order, `suspects` whose blocks were written in, `restructured` that tensors were replaced or moved in a block, `misshapen` that a forward pass may fail,
    `untold` what was written to in a block while polyak has not said so.
    `epoch` counts the changes that make a graph invalid.
    """

    kind: Kind
    model: Source
    twin: Source
    folder: Path
    subjects: list[Subject] = field(default_factory=list)
    article: Any = None
    blocks: list[Block] = field(default_factory=list)
    optimizers: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    saves: list[Any] = field(default_factory=list)
    graphs: list[Any] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)
    epoch: int = 0
    clean: bool = True
    ordered: bool = True
    restructured: bool = False
    misshapen: bool = False
    suspects: set[int] = field(default_factory=set)
    untold: str = ""
    stepped_inside: bool = False
    thread: int = 0
    story: list[str] = field(default_factory=list)
    _second: ThreadPoolExecutor | None = None

    def tell(self, *what: object) -> None:
        """Notes what an operation does, for the story of a failure."""
        self.story.append(" ".join(map(str, what)))

    def both(self) -> list[Source]:
        """What training touches: inside a block the model alone, whose writes there are dropped."""
        return [self.model] if self.blocks else [self.model, self.twin]

    @property
    def trains(self) -> bool:
        """Whether it is clear what a write means: not once blocks were left out of order."""
        return self.ordered or not self.blocks

    def open_blocks(self, subject: Subject) -> list[Block]:
        return [block for block in self.blocks if block.subject is subject]

    # What is asked of polyak

    def facts(self, subject: Subject, name: str | None = None) -> set[str]:
        """The situations that an averager is in."""
        facts = set() if subject.history.times else {"no update"}
        own = self.open_blocks(subject)
        if own:
            facts.add("applied" if self.ordered else "left out of order")
            facts |= {"other average applied"} if any(b.name != name for b in own) else set()
        facts |= {"other thread"} if any(block.thread != self.thread for block in own) else set()
        mine = {*subject.averaged, *subject.copied}
        others = [block.subject for block in self.blocks if block.subject is not subject]
        theirs = {name for other in others for name in (*other.averaged, *other.copied)}
        facts |= {"other block"} if mine & theirs or self._one_storage(mine, theirs) else set()
        facts.update(self.structure(subject))
        facts |= {"restructured"} if self.restructured else set()
        if any(subject.spoilt(n) for n in subject.cases if name in (None, n)):
            facts.add("spoilt")
        facts |= {"wrong rule later" for case in subject.cases.values() if case.wrong}
        return facts

    def _one_storage(self, mine: set[str], theirs: set[str]) -> bool:
        """Whether two averagers have views of one storage, which may share a version counter."""
        there = [entry for entry in entries(self.model) if _has_memory(entry.tensor)]
        storages = {entry.name: entry.tensor.untyped_storage().data_ptr() for entry in there}
        return bool(
            {storages.get(n) for n in mine} & {storages[n] for n in theirs & storages.keys()}
        )

    def structure(self, subject: Subject) -> Iterator[str]:
        """What is not any more as it was when the averager was made."""
        found = entries(self.model)
        now = form(found, subject.options, subject.frozen, by_storage=False)
        by_storage = form(found, subject.options, subject.frozen, by_storage=True)
        shapes = {entry.name: tuple(entry.tensor.shape) for entry in found}
        if any(shapes.get(name) != shape for name, shape in subject.shapes.items()):
            yield "changed"
        elif now != subject.form:
            before, after = _stored(subject.storage_form), _stored(by_storage)
            # A name that the averager leaves out may come first among tied ones by now.
            firsts, own = first_names(found), {*subject.averaged, *subject.copied}
            stored = {name: firsts.get(name, "") for name in before.keys() & own}
            lost = any(after.get(first) != before[name] for name, first in stored.items())
            # An update looks at objects: that two share memory, all other calls notice.
            objects = first_names(found, by_storage=False)
            lost |= len({objects.get(name) for name in stored}) < len(stored)
            untied = (after.keys() - before.keys()) & subject.carried()
            yield "changed" if lost or untied else "changed elsewhere"
        if _ties(subject, first_names(found)) != _ties(subject, subject.firsts):
            yield "changed elsewhere"
        if by_storage != subject.storage_form:
            yield "aliased"
        yield from shared(found)

    def ask(self, call: str, facts: set[str], action: Callable[[], Any]) -> Any:
        """Calls polyak; `Refused` where it had a reason to refuse, and all is as it was."""
        before = self.fingerprint()
        rules = REFUSALS[call]
        try:
            value = self.perform(action)
        except ERRORS as error:
            seen = f"{call}: {type(error).__name__}: {error}"
            if not facts & rules.keys():
                raise Fault(f"refused {call}", f"{seen}; situation: {sorted(facts)}") from error
            if self.fingerprint() != before and not self._excused(call, error, before):
                raise Fault(f"refused {call} and changed something", seen) from error
            self.tell(f"  refused: {type(error).__name__}: {str(error)[:200]}")
            return Refused(error)
        must = sorted(fact for fact in facts if rules.get(fact) == MUST)
        if must:
            raise Fault(f"accepted {call}", f"although: {', '.join(must)}")
        return value

    def perform(self, action: Callable[[], Any]) -> Any:
        """Runs something in the thread whose turn it is."""
        if self.thread == 0:
            return action()
        self._second = self._second or ThreadPoolExecutor(1)
        try:
            return self._second.submit(action).result(timeout=PATIENCE)
        except TooLong:
            raise Fault("hang", f"a call in another thread took {PATIENCE:g} s") from None

    def fingerprint(self) -> Any:
        """All that a refused call must leave as it was."""
        averagers = [subject.fingerprint() for subject in self.subjects]
        article = None if self.article is None else self.article.fingerprint()
        return contents(self.model), averagers, article

    def _excused(self, call: str, error: Exception, before: Any) -> bool:
        """Whether nothing has changed but what a failed update has marked as spoilt, or its clock.

        An update that is refused since weights are not finite counts its time in the next.
        """
        model, subjects, article = self.fingerprint()
        if call not in ("update", "load") or model != before[0] or article != before[2]:
            return False
        for subject, now, was in zip(self.subjects, subjects, before[1], strict=True):
            if now[2] != was[2] or (now[1] != was[1] and not isinstance(error, FloatingPointError)):
                return False
            for name in subject.cases:
                if now[0][name] != was[0][name]:
                    if not subject.spoilt(name):
                        return False
                    subject.causes.add(name)
        return True

    # Laws

    def check(self) -> None:
        """All laws; raises `Fault` at the first that does not hold."""
        for subject in self.subjects:
            self.check_averages(subject)
        if self.article is not None:
            self.article.check()
        if not self.blocks:
            self._check_live()
            self._settle()
        elif self.clean and self.ordered and not self.restructured and not self._wrong_inside():
            self._check_inside()

    def check_averages(self, subject: Subject) -> None:
        """Clock, copies, and every average that can be read: profile @ trajectory."""
        subject.check_clock()
        subject.check_copies()
        changed = "changed" in self.structure(subject)
        for name, case in subject.cases.items():
            if subject.spoilt(name) and name not in subject.causes:
                raise Fault("spoilt", f"averager {subject.number}, {name}: {subject.spoilt(name)}")
            skipped = subject.spoilt(name) or name in subject.tainted or self.open_blocks(subject)
            if skipped or case.wrong or not subject.history.times:
                continue
            if "live" not in case.rule.readout(subject.tick(name)):
                subject.check(name, subject.history.path[-1])
            elif not changed:
                subject.check(name, subject.weights(self.model))

    def _wrong_inside(self) -> bool:
        """Whether a block carries the average of a rule that is wrong."""
        return any(block.subject.cases[block.name].wrong for block in self.blocks)

    def _check_live(self) -> None:
        """Outside blocks the model has its live weights, bit for bit."""
        wanted = contents(self.twin)
        if self.restructured:
            wanted = _as_in(self.twin, self.model)
        seen = contents(self.model)
        if seen != wanted:
            wrong = [n for n in {**wanted, **seen} if seen.get(n) != wanted.get(n)]
            raise Fault("live", f"not those of the twin: {', '.join(wrong)}")

    def _check_inside(self) -> None:
        """Inside blocks the model carries the average of the innermost one that has each tensor."""
        if any(shared(entries(self.model))):
            return
        wanted = {entry.name: vector(entry.tensor) for entry in entries(self.twin)}
        touched: set[str] = set()
        for block in self.blocks:
            start = 0
            for name in block.subject.averaged:
                end = start + len(wanted[name])
                wanted[name] = block.carries[start:end]
                start = end
            touched |= {*block.subject.averaged, *block.subject.copied}
        twins, found = contents(self.twin), entries(self.model)
        tied = self._tied(touched)
        for entry in found:
            if entry.name not in tied:
                if bits(entry.tensor) != twins[entry.name]:
                    raise Fault("inside", f"{entry.name} is not averaged and has changed")
            elif (
                entry.tensor.is_floating_point()
                and entry.name in touched
                and not self._copied(entry.name)
            ):
                self._require_near(entry, wanted[entry.name])

    def _tied(self, names: set[str]) -> set[str]:
        """These names, and those that are tied to them by now, which an averager may leave out."""
        firsts = first_names(entries(self.model))
        held = {firsts.get(name) for name in names}
        return names | {name for name, first in firsts.items() if first in held}

    def _copied(self, name: str) -> bool:
        return any(name in block.subject.copied for block in self.blocks)

    def _require_near(self, entry: Entry, wanted: Vector) -> None:
        slots = [t.dtype for b in self.blocks for t in next(iter(b.subject.slots(b.name).values()))]
        epsilon = max(torch.finfo(dtype).eps for dtype in (entry.tensor.dtype, *slots))
        seen = vector(entry.tensor)
        with np.errstate(invalid="ignore"):
            near = np.abs(seen - wanted) <= 16 * epsilon * (1 + np.abs(wanted))
        same = (seen == wanted) | (np.isnan(seen) & np.isnan(wanted)) | ~np.isfinite(wanted)
        if not (near | same).all():
            raise Fault("inside", f"{entry.name} is not the average that was applied")

    def _settle(self) -> None:
        """After the last block: the twin takes over what the block did to the structure."""
        self.clean = self.ordered = True
        self.suspects.clear()
        if self.untold:
            raise Fault(
                "untold", f"{self.untold} was written to inside a block, and nothing was said"
            )
        if self.stepped_inside:
            self.stepped_inside = False
            self.drop_optimizers()
        if self.restructured:
            self.restructured = False
            self.drop_optimizers()
            self.twin = faithful_copy(self.model)
            self.undo.clear()
        for subject in self.subjects:
            if subject.tainted and not any(shared(entries(self.model))):
                subject.renew(self.model)

    # What training does

    def drop_optimizers(self) -> None:
        """Forgets the optimizers, whose parameters are no longer the model's."""
        self.epoch += 1
        self.optimizers.clear()
        for source in (self.model, self.twin):
            for entry in entries(source):
                entry.tensor.grad = None
        for subject in self.subjects:
            if subject.attachment is not None:
                subject.attachment.remove()
                subject.attachment = subject.optimizer = None

    def writing(self, write: Callable[[], Any], *, told: bool = True, noticed: bool = True) -> Any:
        """Lets something write to the model; inside a block, notes which averages may have suffered.

        `told` says that polyak must say so, `noticed` that it can notice at all.
        """
        self.epoch += 1
        if not self.blocks:
            return write()
        before = contents(self.model)
        try:
            return write()
        finally:
            after = contents(self.model)
            names = {n for n in {**before, **after} if before.get(n) != after.get(n)}
            self._note_written(names, told and noticed, noticed)

    def _note_written(self, names: set[str], told: bool, noticed: bool) -> None:
        carried = self._tied({n for block in self.blocks for n in block.subject.carried()})
        self._keep(names - carried)
        if not names & carried:
            return
        self.clean = False
        weights = {e.name for e in entries(self.model) if e.kind != "buffer"}
        averaged = {n for b in self.blocks for n in b.subject.averaged}
        if told and (seen := names & weights & averaged):
            self.untold = ", ".join(sorted(seen))
        for block in self.blocks:
            if names & block.subject.carried():
                self.suspects.add(block.subject.number)
                block.subject.causes.add(block.name)
                if not noticed:
                    block.subject.tainted.add(block.name)

    @torch.no_grad()
    def _keep(self, names: set[str]) -> None:
        """What no open block carries is written to for good: the twin takes it over."""
        now = {entry.name: entry.tensor for entry in entries(self.model)}
        for entry in entries(self.twin):
            if entry.name not in names:
                continue
            new, old = now[entry.name].detach(), entry.tensor.data
            alike = (new.shape, new.dtype) == (old.shape, old.dtype)
            if alike and not self.restructured:
                old.copy_(new)  # another name may have the same memory, as in the model
            else:
                put(entry, new.clone())  # of its own, since the block may have untied it

    def close(self) -> None:
        """Leaves what a failed program has left open, for the next one, and ends the second thread."""
        for block in reversed(self.blocks):
            self.thread = block.thread
            with suppress(BaseException):
                self.perform(partial(block.manager.__exit__, None, None, None))
        self.blocks.clear()
        self.graphs.clear()
        if self._second is not None:
            self._second.shutdown(wait=False, cancel_futures=True)


def shared(found: list[Entry]) -> Iterator[str]:
    """Ways in which tensors lie in memory that no averager takes."""
    there = [entry for entry in found if _has_memory(entry.tensor)]
    if any(entry.tensor.is_conj() or entry.tensor.is_neg() for entry in there):
        yield "lazy view"
    strange = [entry.tensor for entry in there if not entry.tensor.is_contiguous()]
    if any(len(addresses(tensor)) < tensor.numel() for tensor in strange):
        yield "expanded"
    if overlaps(there):
        yield "overlap"


def _has_memory(tensor: torch.Tensor) -> bool:
    strided = tensor.layout == torch.strided and not tensor.is_meta
    return strided and not is_lazy(tensor) and tensor.numel() > 0


def _ties(subject: Subject, firsts: Mapping[str, str]) -> dict[str, str]:
    """All names of what an averager has -> their first names."""
    own = {*subject.averaged, *subject.copied}
    return {name: first for name, first in firsts.items() if first in own}


def _stored(held: Any) -> dict[str, object]:
    return {name: each for name, each in held.items() if each is not None}


def _as_in(source: Source, like: Source) -> dict[str, Any]:
    """The content of a model in the dtypes of another one."""
    dtypes = {entry.name: entry.tensor.dtype for entry in entries(like)}
    return {
        e.name: bits(e.tensor.detach().to(dtypes.get(e.name, e.tensor.dtype)))
        for e in entries(source)
    }
