"""Checksums of an archive of torch.save whose records were changed in place."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable
from typing import BinaryIO

from polyak import _system as system
from polyak._lazy import Place

_PIECE = 1 << 20
_DESCRIPTOR = b"PK\7\10"
_ENTRY = struct.Struct(
    "<4s12xI8xHHH8xI"
)  # of a zip archive's directory: signature, CRC-32, lengths, place


def write_at(file: BinaryIO, data: memoryview, at: int) -> None:
    """Write all of the bytes at a place."""
    while data:
        count = system.write_at(file.fileno(), data, at)
        data, at = data[count:], at + count


class _Slice(io.RawIOBase):
    """A part of a file, to read as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._handle, self._start, self._length, self._at = file.fileno(), start, length, 0

    def read(self, size: int = -1) -> bytes:
        rest = max(self._length - self._at, 0)
        size = rest if size < 0 else min(size, rest)
        data = system.pread(self._handle, size, self._start + self._at)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True


def renew_checksums(file: BinaryIO, places: Iterable[Place], begin: int, size: int) -> None:
    """Give the changed records of an archive their CRC-32, in its directory and behind the records.

    The archive lies in the file from byte `begin` on.
    """
    with zipfile.ZipFile(_Slice(file, begin, size)) as archive:
        start, entries = begin + archive.start_dir, archive.infolist()
    if not any(entry.CRC for entry in entries):
        return  # torch was told to leave them out
    changed = {place.start: place.nbytes for place in places}
    while (entry := _entry(file, start)) is not None:
        record, length = begin + entry[0], entry[1]
        header = system.pread(file.fileno(), 30, record)
        names = sum(struct.unpack("<HH", header[26:]))
        if (nbytes := changed.get(record + 30 + names)) is not None:
            crc = _checksum(file, record + 30 + names, nbytes)
            write_at(file, memoryview(crc), start + 16)
            _write_checksum(file, record, record + 30 + names + nbytes, crc)
        start += length


def _entry(file: BinaryIO, start: int) -> tuple[int, int] | None:
    """Where a record of an archive begins, by the entry of the directory at `start`; the entry's length."""
    data = system.pread(file.fileno(), _ENTRY.size, start)
    if len(data) < _ENTRY.size or data[:4] != b"PK\1\2":
        return None
    _, _, name, extra, comment, place = _ENTRY.unpack(data)
    length = _ENTRY.size + name + extra + comment
    if place == 0xFFFFFFFF:  # beyond 4 GiB: the last 8 bytes of the extra field of ZIP64
        field = system.pread(file.fileno(), extra, start + _ENTRY.size + name)
        place = _far_place(field)
    return place, length


def _far_place(extra: bytes) -> int:
    """The place in the extra field 1 of an entry (ZIP64), behind the sizes that are there."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            return int(struct.unpack_from("<Q", extra, at + 4 + length - 8)[0])
        at += 4 + length
    raise ValueError("the archive's directory points at no record")


def _checksum(file: BinaryIO, start: int, nbytes: int) -> bytes:
    crc = 0
    for at in range(start, start + nbytes, _PIECE):
        crc = zlib.crc32(system.pread(file.fileno(), min(_PIECE, start + nbytes - at), at), crc)
    return crc.to_bytes(4, "little")


def _write_checksum(file: BinaryIO, record: int, end: int, crc: bytes) -> None:
    """Write it into the record's own header if it is there, and into the descriptor behind the content."""
    if system.pread(file.fileno(), 4, record + 14) != bytes(4):
        write_at(file, memoryview(crc), record + 14)
    if system.pread(file.fileno(), 4, end) == _DESCRIPTOR:
        write_at(file, memoryview(crc), end + 4)
