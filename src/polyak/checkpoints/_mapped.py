"""Mapped files: their bytes as memory, read when touched; the pages are given back when told.

A mapping is private: what is written to it stays in this process, and the file does not change.
It reserves no memory, so a file may be larger than all of it.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor

_MAP_NORESERVE = 0x4000 if os.uname().sysname == "Linux" else 0  # mmap has no name for it yet
_PIECE = 1 << 20


class _Memory(mmap.mmap):
    """A mapped file that can also be read, as long as anything lies on it."""

    path: Path
    handle: int

    def keep_open(self, path: Path, handle: int) -> None:
        self.path, self.handle = path, os.dup(handle)
        finalize(self, os.close, self.handle)


_open: WeakValueDictionary[int, _Memory] = WeakValueDictionary()  # by address


class Mapped:
    """A file's bytes as memory.

    Raises `ValueError` for an empty file and for what is no file (a pipe, a device), which could
    be waited for without end; `OSError` where it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        with _opened(path) as handle:
            self.size = os.fstat(handle).st_size
            if self.size == 0:
                raise ValueError(f"{path}: the file is empty")
            self.memory = _map(path, handle, self.size)
            self.memory.keep_open(path, handle)
        _open[_address(self.memory)] = self.memory

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> Tensor:
        """The tensor that lies in the file from `start` on, row by row: a view of it, if it can be."""
        count = prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if (
            dtype.itemsize == 16 and start % 16
        ):  # torch's kernels fault on what does not begin at 16
            flat = torch.frombuffer(self.memory, dtype=torch.uint8, count=16 * count, offset=start)
            return flat.clone().view(dtype).view(shape)
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=start).view(shape)

    def pieces(self, start: int, length: int) -> Iterator[bytes]:
        """The file's own bytes in pieces, whatever was written to the mapping; none stay in memory."""
        for place in range(start, start + length, _PIECE):
            yield os.pread(self.memory.handle, min(_PIECE, start + length - place), place)

    def release(self, start: int, stop: int) -> None:
        """Gives the pages back that lie wholly within this part of the file."""
        _release(self.memory, start, stop)


def head(path: Path, size: int) -> bytes:
    """The first bytes of a file; raises as `Mapped` does, but not for an empty one."""
    with _opened(path) as handle:
        return os.read(handle, min(size, os.fstat(handle).st_size))


def release(tensor: Tensor) -> None:
    """Gives the pages back that only this tensor has in memory; they are read again when needed.

    That is safe for pages of a mapped file alone, so any other tensor is left as it is. What was
    written to the tensor is lost: it is as in the file again.
    """
    if found := _found(tensor):
        _release(*found)


class Place(NamedTuple):
    """Where a tensor lies in a file, row by row."""

    memory: _Memory
    start: int

    def read(self, content: memoryview, skip: int) -> None:
        """Reads the tensor's bytes from `skip` on, as many as there is room for.

        That is faster than to copy from the mapped memory, which must be made resident first.
        Raises `ValueError` where the file has become shorter.
        """
        while content:
            count = os.preadv(self.memory.handle, [content], self.start + skip)
            if count == 0:
                raise ValueError(f"{self.memory.path}: the file was cut short while it was read")
            content, skip = content[count:], skip + count


def place(tensor: Tensor) -> Place | None:
    """Where a tensor lies in a mapped file, or None where it lies elsewhere, or in another order."""
    as_stored = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    found = _found(tensor) if as_stored else None
    return found and Place(found[0], found[1])


def _found(tensor: Tensor) -> tuple[_Memory, int, int] | None:
    """The mapped file that a tensor lies on, and from where to where."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.numel() == 0:
        return None
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    stop = start + (last + 1) * tensor.element_size()
    for address, memory in list(_open.items()):
        if address <= start and stop <= address + len(memory):
            return memory, start - address, stop - address
    return None


def _release(memory: mmap.mmap, start: int, stop: int) -> None:
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = stop // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        memory.madvise(mmap.MADV_DONTNEED, first, length)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file's handle; never waits for what is no file."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{path} is a folder, wanted a file")
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is a pipe or a device, wanted a file")
        yield handle
    finally:
        os.close(handle)


def _map(path: Path, handle: int, size: int) -> _Memory:
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    try:
        return _Memory(handle, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} when mapping the file", str(path)) from None


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
