"""State of the process that a command changes for a while, and restores."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import NoReturn

from polyak._shown import every_character
from polyak._system import flush_c_streams

TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM)."""


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Runs a command: SIGTERM unwinds it, so that no half file is left; then all is as before.

    A SIGTERM handler of the caller's own stays in place. Packages change the rest: torch.distributed
    sets an excepthook, scikit-learn sets environment variables, altair draws random numbers.
    """
    path, hook, draws, environment = [*sys.path], sys.excepthook, random.getstate(), {**os.environ}
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        with _open_streams(), every_character(), warnings.catch_warnings():
            yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.path[:], sys.excepthook = path, hook
        random.setstate(draws)
        for name in [name for name in os.environ if name not in environment]:
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def _open_streams() -> Iterator[None]:
    """A standard stream that is closed leads to nothing for a while.

    Otherwise the next file that is opened gets its number, and what is printed goes into that file.
    """
    opened = []
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened.append(os.open(os.devnull, os.O_RDWR))  # the lowest number that is free
    try:
        yield
    finally:
        for number in opened:
            os.close(number)


def _terminate(*_: object) -> NoReturn:
    raise Terminated(TERMINATED)


@contextmanager
def prints_on_stderr() -> Iterator[None]:
    """Everything that is printed within the block goes to stderr, and stdout stays clean.

    Python's `print` follows `sys.stdout`. C code, `os.write(1, ...)` and subprocesses do not know it,
    so file descriptor 1 becomes a copy of descriptor 2 for a while.
    """
    _flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _flush()  # what is buffered was printed within the block
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """Empties the buffers of Python's streams and of the C library's."""
    for stream in (sys.stdout, sys.__stdout__):
        with suppress(AttributeError, ValueError, OSError):  # it is None, closed, or broken
            stream.flush()  # type: ignore[union-attr]
    flush_c_streams()
