"""Mappings: a file as memory, without a handle of its own.

Python's `mmap` keeps a copy of the handle, and a process may not have many. It also has no name for
MAP_NORESERVE.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from typing import Any
from weakref import finalize

import numpy as np

from polyak import _system as system

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
