"""Signals for the stress command: they come in the midst of a call.

Most signals are sent at the so-manieth call inside polyak, so that a failure happens again; some come
by a timer, as a time-out does.
"""

from __future__ import annotations

import copy
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import numpy as np
import torch

import polyak
from polyak._engine import signals
from stress_article import Article, called
from stress_averagers import History, Subject, joined
from stress_models import contents
from stress_reading import Save, forms_now
from stress_rules import Fault, Vector
from stress_updates import due_facts, given, note_update, pick
from stress_world import Block, World

ROOT = str(Path(polyak.__file__).parent)
TIMERS = 0.3
"""The share of alarms that come by a timer, and so at another moment in each run."""


class LateError(RuntimeError):
    """What a time-out raises that is built on `RuntimeError`."""


class MineError(Exception):
    """What a handler raises that only its own script knows."""


SIGNALS: tuple[tuple[int, type[BaseException]], ...] = (
    (signal.SIGINT, KeyboardInterrupt),
    (signal.SIGALRM, TimeoutError),
    (signal.SIGALRM, LateError),
    (signal.SIGTERM, SystemExit),
    (signal.SIGUSR1, MineError),
)


@dataclass
class Interruption:
    """Sends one signal while its block runs, and knows what came of it.

    While a block of `applied()` is `open`, polyak may have a handler of its own around the handler.
    """

    number: int
    error: BaseException
    moment: int
    timer: float = 0.0
    open: bool = False
    reads: Callable[[], Vector] | None = None
    sent: int = 0
    handled: int = 0
    read: list[Vector] = field(default_factory=list)
    _count: int = 0
    _ignored: bool = False

    def __enter__(self) -> Interruption:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._ignore
        self._before = signal.signal(self.number, self._handle)
        if self.timer:
            signal.setitimer(signal.ITIMER_REAL, self.timer)
        else:
            sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        now = signal.signal(self.number, self._before)
        sys.unraisablehook = self._hook
        left = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        torch.set_grad_enabled(True)
        # A timer may fire in torch's own `no_grad`, when a state is copied before it is loaded.
        if left != (True, False) and not self.timer:
            raise Fault("signal", f"grad mode and inference mode were left as {left}")
        if now != self._handle and not self.open:
            raise Fault("signal", f"the handler of signal {self.number} was left as {now!r}")
        late = self._take_late()
        if not self.timer and self.handled + late != self.sent:
            raise Fault(
                "signal", f"{self.sent} signals were sent, and handled {self.handled} times"
            )

    def _take_late(self) -> int:
        """How many signals wait for the end of an open block: they came amid the last lines of entering.

        They are taken away, or the next call would raise what belongs to this one.
        """
        waiting = [each for each in signals._received if each[0] == self._handle]
        for each in waiting if self.open else ():
            signals._received.remove(each)
        return len(waiting) if self.open else 0

    def _ignore(self, seen: Any) -> None:
        """Python itself drops what is raised while it deletes an object."""
        self._ignored |= seen.exc_value is self.error
        if seen.exc_value is not self.error:
            self._hook(seen)

    def _look(self, frame: FrameType, event: str, _: object) -> None:
        """Counts the moments at which Python lets a handler run, inside polyak."""
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(ROOT):
            return
        self._count += 1
        if self._count == self.moment:
            sys.setprofile(None)
            self.sent += 1
            signal.raise_signal(self.number)

    def _handle(self, *_: object) -> None:
        self.handled += 1
        if self.reads is None:
            raise self.error
        with suppress(RuntimeError):
            self.read.append(self.reads())

    def run(self, action: Callable[[], Any]) -> bool:
        """Whether the action came to its end; a signal that raised must not be swallowed."""
        try:
            with self:
                action()
        except Fault:
            raise
        except BaseException as error:
            if not self.handled:
                raise
            error.__traceback__ = self.error.__traceback__ = None
            return False
        usual = isinstance(self.error, RuntimeError | OSError)  # a library may catch these anywhere
        if self.handled and self.reads is None and not usual and not self._ignored:
            raise Fault("signal", f"{self.error!r} of the handler was swallowed")
        return True


def interruption(random: Random, reads: Callable[[], Vector]) -> Interruption:
    number, error = random.choice(SIGNALS)
    moment = random.choice([random.randint(1, 40), random.randint(1, 200), random.randint(1, 800)])
    timer = (
        random.uniform(2e-5, 1e-3) if number == signal.SIGALRM and random.random() < TIMERS else 0.0
    )
    reader = reads if random.random() < 0.2 else None
    return Interruption(number, error("sent"), moment, timer=timer, reads=reader)


def interrupted(world: World, random: Random) -> None:
    """A call, and a signal in the midst of it."""
    subject, name = pick(world, random)
    call = random.choice([*CALLS, "article"])
    if call == "article":
        sent = interruption(random, lambda: np.zeros(0))
        sent.open = bool(world.blocks)
        interrupted_article(world, sent)
        return
    if call == "leave":
        if world.blocks:
            _leave(world, random)
        return
    facts = due_facts(world, subject) | world.facts(subject, name)
    if facts - {"no update"} or ("no update" in facts and call not in ("update", "save")):
        return
    sent = interruption(random, lambda: joined(_averaged(subject, name)))
    sent.open = call == "enter" or bool(world.blocks)
    world.tell(f"averager {subject.number}: {call} {name}, with {sent}")
    CALLS[call](world, subject, name, sent)


def interrupted_article(world: World, sent: Interruption) -> None:
    """A call of the article's class is made, or it is not."""
    held: Article | None = world.article
    if held is None or held.facts(world):
        return
    world.tell(f"EMA: update, with {sent}")
    before, after = held.calls, called(world, held)
    sent.reads = None
    done = sent.run(held.ema.update)
    held.calls = after if done or held.ema._calls == after.calls else before
    held.check()


def _averaged(subject: Subject, name: str) -> list[Any]:
    held = subject.averager.average(*given(subject, name))
    return [held[n] for n in subject.averaged]


def _cycle(world: World, subject: Subject, name: str, sent: Interruption) -> None:
    """All of a block: everything is as it was."""

    def cycle() -> None:
        with subject.averager.applied(*given(subject, name)):
            pass

    before = world.fingerprint()
    sent.run(cycle)
    if world.fingerprint() != before:
        live = contents(world.model) != before[0]
        raise Fault(
            "signal", f"{'live weights' if live else 'averages'} lost by a signal in a block"
        )
    _check_read(world, subject, name, sent, [subject.history])


def _enter(world: World, subject: Subject, name: str, sent: Interruption) -> None:
    """Entering: the block is entered, or nothing has happened."""
    before = world.fingerprint()
    carries = subject.read(name, subject.weights(world.model))
    manager = subject.averager.applied(*given(subject, name))
    if sent.run(manager.__enter__):
        world.blocks.append(Block(subject, name, manager, 0, carries, False))
        return
    del manager
    if world.fingerprint() != before:
        raise Fault(
            "signal", "a block that a signal kept from being entered left something changed"
        )


def _leave(world: World, random: Random) -> None:
    """Leaving: the block is left, whatever the signal raises."""
    block = random.choice(world.blocks)
    if block.thread or block.subject.number in world.suspects or world.restructured:
        return
    sent = interruption(random, lambda: joined(_averaged(block.subject, block.name)))
    sent.open = True
    world.tell(f"averager {block.subject.number}: leave {block.name}, with {sent}")
    world.ordered = world.ordered and block is world.blocks[-1]
    world.blocks.remove(block)
    sent.run(lambda: block.manager.__exit__(None, None, None))


def _read(world: World, subject: Subject, name: str, sent: Interruption) -> None:
    """Reading changes nothing."""
    before = world.fingerprint()
    sent.run(lambda: subject.averager.average(*given(subject, name)))
    if world.fingerprint() != before:
        raise Fault("signal", "reading an average changed something")


def _update(world: World, subject: Subject, name: str, sent: Interruption) -> None:
    """An update is made, or it is not."""
    before = subject.history
    note_update(world, subject, 1.0)
    after, subject.history = subject.history, before
    _one_or_other(world, subject, sent, lambda: subject.averager.update(), before, after)
    _check_read(world, subject, name, sent, [before, after])


def _load(world: World, subject: Subject, name: str, sent: Interruption) -> None:
    """A state is taken over, or it is not."""
    saved = [
        s for s in world.saves if s.subject is subject and s.forms == forms_now(world, subject)
    ]
    if saved and not saved[0].file:
        before, after = subject.history, saved[0].history
        _one_or_other(world, subject, sent, saved[0].load, before, after)
        _check_read(world, subject, name, sent, [before, after])


def _one_or_other(
    world: World,
    subject: Subject,
    sent: Interruption,
    action: Callable[[], Any],
    before: History,
    after: History,
) -> None:
    done = sent.run(action)
    seen: Fault | None = None
    for history in (after, before):
        subject.history = history
        try:
            world.check_averages(subject)
            return
        except Fault as fault:
            seen = fault
            if done:
                break
    raise Fault("signal", f"a call was half done: {seen}")


def _save(world: World, subject: Subject, name: str, sent: Interruption) -> None:
    """The file is the whole state, or it is the one before."""
    path = world.folder / "interrupted.safetensors"
    if any(case.own for case in subject.cases.values()):
        return
    polyak.save(path, subject.averager, overwrite=True)
    before = world.fingerprint()
    state = copy.deepcopy(subject.averager.state_dict())
    sent.run(lambda: polyak.save(path, subject.averager, overwrite=True))
    if world.fingerprint() != before:
        raise Fault("signal", "saving changed something")
    polyak.load(path, subject.averager)
    world.saves.append(
        Save(
            subject,
            lambda: subject.averager.load_state_dict(state),
            subject.history,
            forms_now(world, subject),
            False,
        )
    )
    _check_read(world, subject, name, sent, [subject.history])


def _check_read(
    world: World, subject: Subject, name: str, sent: Interruption, histories: list[History]
) -> None:
    """What a handler has read is the average before the call or after it."""
    now = subject.history
    for read in sent.read:
        for history in histories:
            subject.history = history
            try:
                if history.times:
                    subject.check(name, subject.weights(world.model), read)
                break
            except Fault:
                continue
        else:
            raise Fault(
                "signal", "a handler has read an average that is neither the one before nor after"
            )
    subject.history = now


CALLS: dict[str, Callable[[World, Subject, str, Interruption], None]] = {
    "cycle": _cycle,
    "enter": _enter,
    "leave": lambda *_: None,
    "read": _read,
    "update": _update,
    "load": _load,
    "save": _save,
}
