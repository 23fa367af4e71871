"""Open files: one handle from the first byte to the last, tensors as views of the mapped file.

A file that is replaced while it is read (as every save here does) stays what it was: the handle and
the mapping belong to the old content. A file that is changed in place is noticed at the next read.

A mapping is private: what is written to a tensor stays in this process, and the file does not change.
It reserves no memory, so a file may be larger than the memory.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from isal.isal_zlib import crc32, crc32_combine
from torch import Tensor

from polyak import _system as system
from polyak._lazy import Elements, TensorSpec
from polyak.checkpoints._open.handles import Handle, Mapping

_PIECE = 1 << 20


class OpenFile:
    """A regular file, open as long as something refers to it, as far as the system's limit allows.

    Raises `ValueError` for an empty file, and for a pipe or a device, which might never end; `OSError`
    if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = Handle(path)
        self._state = self._now()
        self.size = self._state[0]
        if self.size == 0:
            raise ValueError(f"{path}: the file is empty")

    @property
    def whole(self) -> FilePart:
        """All of the file."""
        return FilePart(self, 0, self.size)

    def read(self, start: int, length: int) -> bytes:
        """The bytes from `start` on: fewer than `length` only where the file ends."""
        self.require_unchanged()
        if not 0 <= start <= self.size:
            raise ValueError(
                f"{self.path}: byte {start} was requested, and the file has {self.size}: copy or fetch it again"
            )
        with self.handle.use() as handle:
            return system.pread(handle, min(length, self.size - start), start)

    def read_into(self, content: memoryview, start: int) -> None:
        """Fill `content` with the bytes from `start` on; raises `ValueError` if the file ends there.

        This is faster than copying from mapped memory, and leaves no pages in this process.
        """
        with self.handle.use() as handle:
            while content:
                count = system.read_at(handle, content, start)
                if count == 0:
                    self.require_unchanged()
                    end = start + len(content)
                    raise ValueError(f"{self.path}: the file ends before byte {end}")
                content, start = content[count:], start + count

    def require_unchanged(self) -> None:
        """Raises `ValueError` if the file was changed in place since it was opened."""
        now = self._now()
        if now != self._state:
            raise ValueError(
                f"{self.path}: the file was changed in place while it was read (it had "
                f"{self._state[0]} bytes, now it has {now[0]}): read it again when nothing writes to it"
            )

    def tensor(self, spec: TensorSpec, start: int) -> Tensor:
        """The tensor that lies in the file from `start` on, row by row: a view where it can be one."""
        self.require_unchanged()  # a page beyond the end of a file that was cut short is a SIGBUS
        shape, dtype = spec
        count = prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if dtype.itemsize == 16 and start % 16:  # torch's kernels fault if it does not begin at 16
            flat = torch.frombuffer(
                self.memory.buffer, dtype=torch.uint8, count=16 * count, offset=start
            )
            return flat.clone().view(dtype).view(shape)
        return torch.frombuffer(self.memory.buffer, dtype=dtype, count=count, offset=start).view(
            shape
        )

    def release(self, start: int, stop: int) -> None:
        """Give back the pages that lie wholly within this part of the file."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = stop // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and "memory" in self.__dict__:
            self.memory.release(first, length)

    def checksum(self, start: int, length: int) -> int:
        """The CRC-32 of a part, read from the file, not from the mapping, which may have been written to."""
        crc, buffer = 0, memoryview(bytearray(min(_PIECE, length)))
        for place in range(start, start + length, _PIECE):
            piece = buffer[: start + length - place]
            self.read_into(piece, place)
            crc = crc32(piece, crc)
        return crc

    @cached_property
    def memory(self) -> Mapping:
        """All of the file as memory; a page is read when it is touched."""
        try:
            with self.handle.use() as handle:
                return Mapping(handle, self.size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _now(self) -> tuple[int, int]:
        """Size and time of the last write. (Replacing a file changes neither, but its ctime.)"""
        with self.handle.use() as handle:
            status = os.fstat(handle)
        return status.st_size, status.st_mtime_ns


class FilePart(NamedTuple):
    """A part of an open file: all of it, or what an archive holds; `label` is what errors call it."""

    file: OpenFile
    start: int
    length: int
    label: str = ""

    def part(self, start: int, length: int, label: str) -> FilePart:
        """A part of this part."""
        return FilePart(self.file, self.start + start, length, label)


class Verified(NamedTuple):
    """How many bytes were compared with a checksum, and how many have none."""

    compared: int
    unchecked: int


def all_verified(parts: Iterable[Verified]) -> Verified:
    """The sums over parts of a checkpoint."""
    of_parts = list(parts)
    return Verified(sum(p.compared for p in of_parts), sum(p.unchecked for p in of_parts))


class FileSpan:
    """A part of an open file; it is compared with its checksum when it is first read."""

    def __init__(
        self,
        file: OpenFile,
        label: str,
        start: int | Callable[[], int],
        nbytes: int,
        checksum: int | None = None,
    ) -> None:
        self.file = file
        self.label = label
        self.nbytes = nbytes
        self.checksum = checksum
        self._compared = False
        self._start = start

    @cached_property
    def start(self) -> int:
        """Where the span begins; a function that was given is asked once, when this is needed."""
        return self._start() if callable(self._start) else self._start

    def content(self) -> bytes:
        """All of it, for small spans."""
        self.require_whole()
        return self.file.read(self.start, self.nbytes)

    def tensor(self, spec: TensorSpec) -> Tensor:
        """The tensor that begins with the span."""
        self.require_whole()
        return self.file.tensor(spec, self.start)

    def elements(self, spec: TensorSpec) -> Elements:
        """The elements of the tensor that fills the span."""
        return _SpanElements(self, spec)

    def release(self) -> None:
        """Give back the span's pages."""
        self.file.release(self.start, self.start + self.nbytes)

    def verify(self) -> Verified:
        """Compare the content with its checksum; raises `ValueError` for damage."""
        self.require_whole()
        return Verified(self.nbytes, 0) if self._compared else Verified(0, self.nbytes)

    def require_whole(self) -> None:
        """Raises `ValueError` if the checksum of the content is not the one that was written."""
        if self.checksum is not None:
            self.require(self.file.checksum(self.start, self.nbytes))

    def require(self, crc: int) -> None:
        """Raises `ValueError` unless this is the checksum that was written."""
        if self.checksum not in (None, crc):
            self.file.require_unchanged()
            raise ValueError(
                f"{self.file.path}: {self.label} is damaged: its checksum is {crc:08x}, wanted "
                f"{self.checksum:08x}; use another copy of the file"
            )
        self._compared |= self.checksum is not None
        self.checksum = None  # once is enough


class _SpanElements(Elements):
    """Elements that lie in a file row by row; the checksum is made of the pieces as they are read."""

    def __init__(self, span: FileSpan, spec: TensorSpec) -> None:
        self.spec = spec
        self._span = span
        self._sums: dict[int, tuple[int, int]] = {}

    def read_(self, out: Tensor, start: int) -> None:
        content = out.view(torch.uint8).numpy().data
        skip = start * self.spec.dtype.itemsize
        self._span.file.read_into(content, self._span.start + skip)
        if self._span.checksum is not None:
            self._sums[skip] = (crc32(content), len(content))

    def done(self) -> None:
        self._span.file.require_unchanged()
        crc = done = 0
        for _, (of_piece, length) in sorted(self._sums.items()):
            crc, done = crc32_combine(crc, of_piece, length), done + length
        if done == self._span.nbytes and self._sums:
            self._span.require(crc)


def open_files(folder: Path, names: Iterable[str]) -> dict[str, OpenFile]:
    """Files of a folder by name, opened at once. A folder that is replaced meanwhile is still read as it was.

    Raises `ValueError` for names that lead out of the folder, `FileNotFoundError` for a file that is
    missing.
    """
    opened = {}
    for name in names:
        _require_beside(folder, name)
        opened[name] = OpenFile(folder / name)
    return opened


def _require_beside(folder: Path, name: str) -> None:
    """Raises unless a name is that of a file in this folder.

    It may be a link within that folder, or to where the Hugging Face hub's cache keeps contents.
    """
    folder = folder.resolve()
    if Path(name).name != name or name == ".." or "\0" in name:
        raise ValueError(f"{name[:200]!r} is not the name of a file in the folder")
    if not (folder / name).exists():
        raise FileNotFoundError(f"the file {name} is missing")
    leads = (folder / name).resolve().parent
    if leads != folder and not (
        folder.parent.name == "snapshots" and leads == folder.parents[1] / "blobs"
    ):
        raise ValueError(f"the file {name} is a link that leads out of the folder")


@contextmanager
def labelled(label: Path | str, damaged: str) -> Iterator[None]:
    """Errors within the block begin with the label.

    An error that is neither a `ValueError` nor an `OSError` becomes a `ValueError` that says what is
    damaged: a file may be damaged in more ways than can be listed.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{label}: {error}") from None
    except OSError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            text = str(error)
            text = text if text.startswith(f"{label}: ") else f"{label}: {text}"
            raise ValueError(text) from None
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{label}: {damaged} ({what}): copy or fetch it again") from None
