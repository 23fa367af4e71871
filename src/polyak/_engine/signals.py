"""Signals: Python's handlers wait while weights are exchanged, since a handler may raise anywhere.

A handler is replaced by one that looks at the interrupted frames: below a `critical` function it
only notes the signal, and `deliver` calls the handler later. So there is no moment between two lines
at which an exception could arrive unseen. Anywhere else it calls the handler at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

_Handler = Callable[[int, FrameType | None], Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_NUMBERS = tuple(sorted(map(int, signal.valid_signals())))
_critical: set[CodeType] = set()
_received: list[tuple[_Handler, int, FrameType | None]] = []


class _Waiting:
    """A handler that waits while a critical function is running on the main thread."""

    def __init__(self, handler: _Handler) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if runs_below(frame, _critical, deliver.__code__):
            _received.append((self.handler, number, frame))
        else:
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
        if callable(handler) and not isinstance(handler, _Waiting):
            signal.signal(number, _Waiting(handler))


def release() -> None:
    """Puts the handlers back that `hold` has replaced."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _NUMBERS:
        handler = signal.getsignal(number)
        if isinstance(handler, _Waiting):
            signal.signal(number, handler.handler)


def deliver() -> None:
    """Calls the handlers that have waited, each of them, although one may raise."""
    if threading.current_thread() is not threading.main_thread():
        return
    try:
        while _received:
            handler, number, frame = _received.pop(0)
            handler(number, frame)
    finally:
        if _received:
            deliver()
