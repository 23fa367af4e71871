"""Signal handlers that raise: they wait while contents are exchanged, all of them, and all are heard.

Real signals are sent to real processes. After each, all live weights and averages must be there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from models import assert_same, snapshot, wander
from patience import HANG
from polyak import Averager, Exponential
from polyak._engine import open_swaps, signals
from polyak._engine.applying import Applied
from polyak._engine.exchange import Exchange

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")


class TimeUpError(Exception):
    """What a handler raises."""


def raises(number: int, _: object) -> None:
    raise TimeUpError(number)


def exits(*_: object) -> None:
    raise SystemExit(3)


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def averaged() -> tuple[nn.Linear, Averager]:
    model = nn.Linear(3, 2)
    averager = Averager(model, Exponential(0.5))
    for step in range(2):
        wander(model, step)
        averager.update()
    wander(model, 5)
    return model, averager


def send_amid(monkeypatch: pytest.MonkeyPatch, way: str, *numbers: int) -> None:
    """Sends signals amid the next exchange, into a block ("in") or out of it ("out")."""
    exchange = Exchange.to

    def interrupted(self: Exchange, exchanged: bool) -> None:
        if exchanged == (way == "in"):
            monkeypatch.undo()
            for number in numbers:
                os.kill(os.getpid(), number)
        exchange(self, exchanged)

    monkeypatch.setattr(Exchange, "to", interrupted)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize(
    ("number", "handler", "error"),
    [
        (signal.SIGALRM, raises, TimeUpError),
        (signal.SIGUSR1, raises, TimeUpError),
        (signal.SIGTERM, exits, SystemExit),
        (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
    ],
)
def test_a_handler_that_raises_amid_an_exchange_waits(
    number: int,
    handler: Callable[..., None],
    error: type[BaseException],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, averager = averaged()
    live, average = snapshot(model), averager.average()
    before = signal.signal(number, handler)
    send_amid(monkeypatch, way, number)
    entered = False
    try:
        with pytest.raises(error), averager.applied():
            entered = True
            assert_same(snapshot(model), average)
        assert entered == (way == "out")
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert_same(snapshot(model), live)
    assert_same(averager.average(), average)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("way", ["in", "out"])
def test_of_several_signals_all_are_heard(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, averager = averaged()
    live, heard = snapshot(model), []

    def notes(number: int, _: object) -> None:
        heard.append(number)
        raise TimeUpError(number)

    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
        signal.signal(number, notes)
    send_amid(monkeypatch, way, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
    with pytest.raises(TimeUpError), averager.applied():
        pass
    assert sorted(heard) == sorted([signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM])
    assert_same(snapshot(model), live)


@pytest.mark.usefixtures("handlers")
def test_a_handler_runs_at_once_inside_the_block_and_may_use_the_averager() -> None:
    model, averager = averaged()
    live, average = snapshot(model), averager.average()
    seen = []

    def evaluates(*_: object) -> None:
        with averager.applied():
            seen.append(snapshot(model))

    signal.signal(signal.SIGUSR1, evaluates)
    os.kill(os.getpid(), signal.SIGUSR1)
    with averager.applied():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(seen) == 2
        signal.signal(signal.SIGUSR1, raises)
        with pytest.raises(TimeUpError):
            os.kill(os.getpid(), signal.SIGUSR1)
    for weights in seen:
        assert_same(weights, average)
    assert signal.getsignal(signal.SIGUSR1) is raises
    assert_same(snapshot(model), live)


@pytest.mark.usefixtures("handlers")
def test_a_handler_that_was_set_inside_the_block_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, averager = averaged()
    live = snapshot(model)
    with pytest.raises(TimeUpError), averager.applied():
        signal.signal(signal.SIGUSR1, raises)
        send_amid(monkeypatch, "out", signal.SIGUSR1)
    assert_same(snapshot(model), live)
    assert signal.getsignal(signal.SIGUSR1) is raises


@pytest.mark.usefixtures("handlers")
def test_handlers_are_put_back_whoever_leaves_last() -> None:
    _, averager = averaged()
    _, other = averaged()
    signal.signal(signal.SIGALRM, raises)
    with averager.applied():
        with other.applied():
            pass
        thread = threading.Thread(target=lambda: other.applied().__enter__())
        thread.start()
        thread.join()
    assert signal.getsignal(signal.SIGALRM) is raises
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("handlers")
def test_an_abandoned_block_puts_the_handlers_back() -> None:
    model, averager = averaged()
    live = snapshot(model)
    signal.signal(signal.SIGALRM, raises)
    block = averager.applied()
    block.__enter__()
    del block
    assert_same(snapshot(model), live)
    assert signal.getsignal(signal.SIGALRM) is raises


@pytest.mark.usefixtures("handlers")
def test_a_signal_amid_the_end_of_an_abandoned_block_is_heard_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python drops what a handler raises in a callback of the garbage collector."""
    model, averager = averaged()
    live = snapshot(model)
    signal.signal(signal.SIGUSR1, raises)
    block = averager.applied()
    block.__enter__()
    send_amid(monkeypatch, "out", signal.SIGUSR1)
    with pytest.raises(TimeUpError):
        del block
        threading.Event().wait(60)
    assert_same(snapshot(model), live)
    assert signal.getsignal(signal.SIGUSR1) is raises


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("way", ["in", "out"])
def test_a_block_that_ends_amid_an_exchange_lets_the_handlers_wait(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector can end a generator, and the block in it, between any two lines."""
    model, averager = averaged()
    _, other = averaged()
    live, exchange, waited = snapshot(model), Exchange.to, []

    def blocks() -> Iterator[None]:
        with other.applied():
            yield

    abandoned = blocks()
    next(abandoned)
    signal.signal(signal.SIGUSR1, raises)

    def interrupted(self: Exchange, exchanged: bool) -> None:
        if exchanged == (way == "in"):
            monkeypatch.undo()
            os.kill(os.getpid(), signal.SIGUSR1)
            abandoned.close()  # type: ignore[attr-defined]
            waited.append(True)
        exchange(self, exchanged)

    monkeypatch.setattr(Exchange, "to", interrupted)
    with pytest.raises(TimeUpError), averager.applied():
        assert way == "out"
    assert waited
    assert_same(snapshot(model), live)
    assert signal.getsignal(signal.SIGUSR1) is raises


class SignalAt:
    """Sends a signal before the n-th instruction of the Python code that `del` runs first."""

    def __init__(self, n: int) -> None:
        self.left, self.sent = n, False

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if self.sent or (frame.f_back and frame.f_back.f_code is not abandon.__code__):
            return None
        frame.f_trace_opcodes = True
        self.left -= event == "opcode"
        if self.left < 0:
            self.sent = True
            signal.raise_signal(signal.SIGUSR1)
        return self


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def abandon(blocks: list[Applied], trace: SignalAt) -> None:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        del blocks[:]
    finally:
        sys.settrace(before)


@pytest.mark.usefixtures("handlers")
def test_an_abandoned_block_ends_whenever_a_signal_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two instructions of what Python calls when the block's object goes."""
    monkeypatch.setattr(signals, "_SOON", 0.0)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    heard: list[int] = []

    def hears(number: int, _: object) -> None:
        heard.append(number)
        raise TimeUpError

    signal.signal(signal.SIGUSR1, hears)
    model, averager = averaged()
    live, average = snapshot(model), averager.average()
    sent, n = True, 0
    while sent:
        blocks = [averager.applied()]
        blocks[0].__enter__()
        trace = SignalAt(n)
        with suppress(TimeUpError):
            abandon(blocks, trace)
            if trace.sent:
                wait_for(lambda: bool(heard))
        assert_same(snapshot(model), live)
        assert_same(averager.average(), average)
        sent, n = trace.sent, n + 1
        heard.clear()
    assert n > 10


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_comes_after_the_handlers_keeps_no_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A block that is abandoned ends, although a signal that came in its caller still waits."""
    monkeypatch.setattr(signals, "_SOON", 0.0)
    model, outer = averaged()
    inner = Averager(model, Exponential(0.9))
    inner.update()
    live, heard = snapshot(model), []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    hear = open_swaps.hear_signals

    def comes_late() -> None:
        hear()
        monkeypatch.undo()
        signal.raise_signal(signal.SIGUSR1)

    def entered_in_order() -> None:
        with outer.applied():
            second = inner.applied()
            second.__enter__()
            monkeypatch.setattr(open_swaps, "hear_signals", comes_late)
        raise ValueError

    with pytest.raises(ValueError):
        entered_in_order()
    assert_same(snapshot(model), live)
    wait_for(lambda: bool(heard))


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_still_waits_is_heard_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    _, outer = averaged()
    _, inner = averaged()
    heard: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: heard.append(number))
    hear = open_swaps.hear_signals

    def comes_late() -> None:
        hear()
        signal.raise_signal(signal.SIGUSR1)

    with outer.applied():
        with inner.applied():
            monkeypatch.setattr(open_swaps, "hear_signals", comes_late)
        monkeypatch.undo()
        assert heard == []
        signal.raise_signal(signal.SIGUSR2)
        assert heard == [signal.SIGUSR1, signal.SIGUSR2]


STORM = """
import random, signal, sys, time
import torch, polyak

torch.set_num_threads(1)
kind, program, sent = sys.argv[1], sys.argv[2], sys.argv[3]
HITS = 300
weights = {
    str(i): torch.full((n,), 3.0)
    for i, n in enumerate({"large": [1_500_000], "small": [8] * 300}[kind])
}
averagers = [polyak.Averager(weights, rule) for rule in ("exponential(0.5)", "window(2)")]
for value in (1.0, 3.0):
    for tensor in weights.values():
        tensor.fill_(value)
    for averager in averagers:
        averager.update()
first, second = averagers

class TimeUpError(Exception):
    pass

armed = False

def raises(*_):
    if armed:  # an alarm that has waited may be sent again when the program is over
        raise TimeUpError

signal.signal(signal.SIGALRM, raises)

def alone():
    with first.applied():
        pass

def beside():
    with second.applied():
        pass

def nested():
    with first.applied(), second.applied():
        pass

def in_the_order_of_entering():
    a = first.applied()
    with a:
        b = second.applied()
        b.__enter__()
    b.__exit__(None, None, None)

run = {each.__name__: each for each in (alone, beside, nested, in_the_order_of_entering)}[program]
for _ in range(3):
    run()
began = time.perf_counter()
for _ in range(10):
    run()
span = (time.perf_counter() - began) / 10
rng = random.Random(0)
hits = 0
while hits < HITS:
    wait = max(2e-6, 1.1 * span * rng.random())
    again = 3e-4 + span * rng.random() if sent == "again and again" else 0
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, wait, again)
        try:
            run()
            while not again and signal.getitimer(signal.ITIMER_REAL)[0]:
                pass
        finally:
            armed = False
    except TimeUpError:
        armed = False
        hits += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert all(bool((tensor == 3.0).all()) for tensor in weights.values()), hits
    for averager in averagers:
        assert all(bool((tensor == 2.0).all()) for tensor in averager.average().values()), hits
assert signal.getsignal(signal.SIGALRM) is raises
print(hits)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["once", "again and again"])
@pytest.mark.parametrize("program", ["alone", "beside", "nested", "in_the_order_of_entering"])
@pytest.mark.parametrize("kind", ["large", "small"])
def test_alarms_at_any_moment_lose_nothing(kind: str, program: str, sent: str) -> None:
    """4800 alarms in all. Where only Ctrl-C waits, more than half of the first ten lose weights."""
    command = [sys.executable, "-c", STORM, kind, program, sent]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 300
    assert "Exception ignored" not in done.stderr


def test_no_signal_is_swallowed_after_a_block() -> None:
    """Python drops what a handler raises while `__del__` runs: no block may leave one behind."""
    _, averager = averaged()
    block = averager.applied()
    with block:
        pass
    assert not hasattr(type(block), "__del__")
    assert torch.is_grad_enabled()
