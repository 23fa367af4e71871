"""The process: what a command changes in it for a while, and puts back."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import NoReturn

from polyak._system import flush_c_streams

TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """The process was told to end (SIGTERM)."""


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
        with warnings.catch_warnings():
            yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.path[:], sys.excepthook = path, hook
        random.setstate(draws)
        for name in [name for name in os.environ if name not in environment]:
            del os.environ[name]
        os.environ.update(environment)


def _terminate(*_: object) -> NoReturn:
    raise Terminated(TERMINATED)


@contextmanager
def prints_on_stderr() -> Iterator[None]:
    """Everything that is printed within the block goes to stderr, and stdout stays clean.

    Python's `print` follows `sys.stdout`. C code, `os.write(1, ...)` and subprocesses do not know it,
    so file descriptor 1 becomes a copy of descriptor 2 for a while.
    """
    _flush()
    kept = _duplicate(1)
    with redirect_stdout(sys.stderr):
        if kept is not None:
            _point(1, at=2)
        try:
            yield
        finally:
            _flush()  # what is buffered was printed within the block
            if kept is not None:
                os.dup2(kept, 1)
                os.close(kept)


def _flush() -> None:
    """Empties the buffers of Python's streams and of the C library's."""
    for stream in (sys.stdout, sys.__stdout__):
        with suppress(AttributeError, ValueError, OSError):  # it is None, closed, or broken
            stream.flush()  # type: ignore[union-attr]
    flush_c_streams()


def _duplicate(descriptor: int) -> int | None:
    """A copy of a file descriptor; None if it is closed."""
    try:
        return os.dup(descriptor)
    except OSError:
        return None


def _point(descriptor: int, *, at: int) -> None:
    """Makes a file descriptor a copy of another, or if that is closed, of nothing."""
    try:
        os.dup2(at, descriptor)
    except OSError:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)
