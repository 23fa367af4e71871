"""Handles of files, and files as memory.

As many handles stay open as half of what the process may have open. Averages are made of hundreds of
files, and of folders of many files each. Of those the handles that were not used for longest are closed,
and opened again when they are needed. What is then there must be the same file, unchanged.

Python's `mmap` keeps a copy of the handle, and has no name for MAP_NORESERVE. So `Mapping` calls the C
library.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np

from polyak import _system as system

_LEAST = 16
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_FAILED = ctypes.c_void_p(-1).value
if not system.WINDOWS:
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    )  # fmt: skip
    _libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
    _libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class _Opened:
    """A handle, and how many use it at the moment."""

    __slots__ = ("number", "users")

    def __init__(self) -> None:
        self.number = -1
        self.users = 0

    def close(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)


class _Pool:
    """The handles of this process that are open: those in use, and the others, the oldest first."""

    def __init__(self) -> None:
        self.begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def begin(self) -> None:
        self.lock = threading.RLock()  # a collection within it may drop a handle
        self.idle: dict[int, _Opened] = {}
        self.used = 0

    def _forked(self) -> None:
        idle = self.idle
        self.begin()  # another thread of the parent may have had the lock
        self.idle = idle

    def make_room(self, most: int) -> None:
        """Close handles that are not in use until fewer than `most` are open."""
        for key in list(self.idle):
            if len(self.idle) + self.used < most:
                return
            if (opened := self.idle.pop(key, None)) is not None:
                opened.close()


_pool = _Pool()


class Handle:
    """The handle of a regular file.

    Raises `ValueError` for a pipe or a device, which might never end; `OSError` if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = path.absolute()  # the process may change its working folder
        self._opened = _Opened()
        self._seen: tuple[int, ...] | None = None
        finalize(self, _drop, self._opened)
        with self.use() as number:
            self._seen = _identity(os.fstat(number))

    @contextmanager
    def use(self) -> Iterator[int]:
        """The number of the handle, which stays open within the block.

        Raises `ValueError` if the file had to be opened again and is now another one.
        """
        opened = self._opened
        with _pool.lock:
            if _pool.idle.pop(id(opened), None) is None and opened.users == 0:
                opened.number = self._open()
            _pool.used += opened.users == 0
            opened.users += 1
        try:
            yield opened.number
        finally:
            with _pool.lock:
                opened.users -= 1
                if opened.users == 0:
                    _pool.used -= 1
                    _pool.idle[id(opened)] = opened

    def _open(self) -> int:
        _pool.make_room(max(_LEAST, system.most_open_files() // 2))
        try:
            number = _opened(self._place, self._path)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            _pool.make_room(0)
            number = _opened(self._place, self._path)
        if self._seen not in (None, _identity(os.fstat(number))):
            os.close(number)
            raise ValueError(
                f"{self._path}: the file was replaced while it was read: read it again"
            )
        return number


def _drop(opened: _Opened) -> None:
    """Close the handle of a file that nothing refers to."""
    with _pool.lock:
        _pool.idle.pop(id(opened), None)
        opened.close()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _opened(place: Path, path: Path) -> int:
    """An open file's handle; never waits for a pipe or a device. Errors name the path as it was given."""
    try:
        number = os.open(place, system.READ | system.AT_ONCE)
    except OSError as error:
        why = f": {kept}" if (kept := kept_elsewhere(path)) else ""
        raise OSError(error.errno, f"{error.strerror}{why}", str(path)) from None
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return number
    os.close(number)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, wanted a file")
    raise ValueError(f"{path} is a pipe or a device, wanted a file")


def kept_elsewhere(path: Path) -> str:
    """The reason why a link or a pointer leads to no file, and what to do; "" if it leads to one, or is missing."""
    if path.exists():
        return ""
    if path.with_name(f"{path.name}.dvc").exists():
        return "DVC keeps it: fetch it (dvc pull)"
    if not path.is_symlink():
        return ""
    kept = "annex" in path.readlink().parts
    return f"it is a link {'of git-annex: fetch its content (git annex get)' if kept else 'that leads nowhere'}"


class Mapping:
    """All of an open file as memory that is private to this process; a page is read when it is touched.

    It reserves no memory, so a file may be larger than the memory. It ends with the last object that
    uses `buffer`. Raises `OSError` if the system refuses it.
    """

    def __init__(self, handle: int, size: int) -> None:
        if system.WINDOWS:  # which has no C function for it
            content = mmap.mmap(handle, size, access=mmap.ACCESS_COPY)
            self.buffer = np.frombuffer(content, np.uint8)
            return
        flags, access = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        self._address = _libc.mmap(None, size, access, flags, handle, 0)
        if self._address == _FAILED:
            error = ctypes.get_errno()
            raise OSError(error, f"{os.strerror(error)} when mapping the file")
        pages = _Pages(self._address, size)
        finalize(pages, _libc.munmap, self._address, size).atexit = False
        self.buffer = np.asarray(pages)

    def release(self, start: int, length: int) -> None:
        """Give back whole pages; what was written to them is lost."""
        if not system.WINDOWS:
            _libc.madvise(self._address + start, length, mmap.MADV_DONTNEED)


class _Pages:
    """Memory at an address, as numpy takes it; an array of it keeps this object."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__: dict[str, Any] = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }
