"""Python's signal handlers wait while weights are exchanged, since a handler may raise anywhere.

A handler is replaced by one that looks at the interrupted frames: below a `critical` function it
only notes the signal, and `deliver` calls the handler later. So there is no moment between two lines
at which an exception could arrive unseen. Anywhere else it calls the handler at once.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

_Handler = Callable[[int, FrameType | None], Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_SOON = 0.25  # seconds: longer than the rest of a call that the garbage collector makes
_NUMBERS = tuple(sorted(map(int, signal.valid_signals())))
_critical: set[CodeType] = set()
_received: list[
    tuple[_Handler, int]
] = []  # without frames: they would keep the blocks of their callers


class _Waiting:
    """A handler that waits while a critical function is running on the main thread."""

    def __init__(self, handler: _Handler) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if runs_below(frame, _critical, deliver.__code__):
            _received.append((self.handler, number))
            return
        try:
            deliver()  # an exception may have interrupted the call that would have
        finally:
            self.handler(number, frame)


def critical(function: _Function) -> _Function:
    """Marks a function during which signal handlers wait, from its first to its last instruction."""
    _critical.add(function.__code__)
    return function


def runs_below(frame: FrameType | None, codes: set[CodeType], stop: CodeType | None = None) -> bool:
    """Whether a frame, or a caller of it, runs one of these; it is not looked further than `stop`."""
    while frame is not None and frame.f_code is not stop:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def hold() -> None:
    """Lets all handlers of the main thread wait in critical functions, until `release`.

    Only the main thread may set handlers, and only there do they run.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _NUMBERS:
        handler = signal.getsignal(number)
        # SIG_DFL and SIG_IGN are not callable: they raise nothing, so they need not wait.
        if callable(handler) and not isinstance(handler, _Waiting):
            signal.signal(number, _Waiting(handler))


def release() -> None:
    """Restores the handlers that `hold` has replaced; the outermost critical function does it."""
    if not _may_act():
        return
    for number in _NUMBERS:
        handler = signal.getsignal(number)
        if isinstance(handler, _Waiting):  # others were set in the block, and stay
            signal.signal(number, handler.handler)


def deliver() -> None:
    """Calls the handlers that have waited, each of them, although one may raise.

    Only the outermost critical function calls them: what they raise would interrupt the outer one.
    """
    if not _may_act():
        return
    try:
        while _received:
            handler, number = _received.pop(0)
            handler(number, sys._getframe())
    finally:
        if _received:
            deliver()


def send_again() -> None:
    """Sends the signals that have waited once more, where Python would swallow what a handler raises."""
    if not _may_act():
        return
    started = threading.Event()  # on a busy machine the start of a thread takes long itself
    try:
        while _received:
            number = _received.pop(0)[1]
            threading.Thread(target=_send, args=(number, started), daemon=True).start()
    finally:
        started.set()


def _send(number: int, started: threading.Event) -> None:
    """Sends a signal to the main thread; `interrupt_main` does not wake it up where it waits."""
    started.wait()
    time.sleep(_SOON)
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:
        _thread.interrupt_main(number)  # type: ignore[arg-type]  # any signal that a handler had


def _may_act() -> bool:
    """Whether this is the main thread, and its critical function has interrupted no other one.

    The garbage collector can end an abandoned block between any two lines of another exchange.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    frame: FrameType | None = sys._getframe(2)
    found = 0
    while frame is not None and frame.f_code is not deliver.__code__:
        found += frame.f_code in _critical
        frame = frame.f_back
    return found < 2
