"""A folder that one object of one process uses alone, until it frees the folder or its process ends."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from polyak._system import Claim

PATIENCE = 10.0
"""Seconds to wait for another process, which may have been killed and still be ending."""

# Device and inode of a folder -> its hold in this process. By inode, since a folder may have several
# paths. It refuses a second object of this process at once, also where the file system has no locks.
_HOLDS: dict[tuple[int, int], FolderHold] = {}


class FolderHold:
    """A folder held for one object, whatever path leads to it.

    Raises `BlockingIOError` at once if this process holds the folder already, in any thread; and if
    another process of this host still does so after some seconds (`PATIENCE`). Where the file system
    has no locks, other processes are not noticed.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        self._claim: Claim | None = Claim(folder)
        self._place = _place_of(self._claim.status)
        # `setdefault` is one step: of two threads, one gets the folder.
        if _HOLDS.setdefault(self._place, self) is not self:
            self._close()
            raise BlockingIOError(f"{folder} is in use in this process")
        try:
            _wait_for_lock(self._claim, folder, time.monotonic() + PATIENCE)
        except BaseException:
            self.release()
            raise

    def has(self, folder: Path) -> bool:
        """Whether this is still the folder at a path: not released, and not removed or replaced."""
        with suppress(FileNotFoundError):
            return self._claim is not None and _place_of(folder.stat()) == self._place
        return False

    def release(self) -> None:
        """Let go of the folder; a second time does nothing."""
        if self._claim is not None:
            del _HOLDS[self._place]
            self._close()

    def _close(self) -> None:
        claim, self._claim = self._claim, None
        assert claim is not None
        claim.close()


def _wait_for_lock(claim: Claim, folder: Path, deadline: float) -> None:
    # Tried again and again: a call that waits for a lock has no time limit.
    while not claim.take():
        if time.monotonic() > deadline:
            raise BlockingIOError(f"{folder} is in use by another process")
        time.sleep(0.1)


def _place_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _forget() -> None:
    """In a forked process: its parent alone holds the folders, and they are free when the parent ends."""
    # Closed and not only forgotten: this copy of the file would keep the lock when the parent has ended.
    for hold in list(_HOLDS.values()):
        hold._close()
    _HOLDS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
