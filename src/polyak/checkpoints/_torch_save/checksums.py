"""Checksums of an archive of torch.save whose records were changed in place."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from polyak import _system as system
from polyak._lazy import Place
from polyak.checkpoints._torch_save.files import PartReader

_DESCRIPTOR = b"PK\7\10"
_ENTRY = struct.Struct("<4s12xI8xHHH8xI")
"""An entry of a zip archive's directory: its signature, CRC-32, three lengths, the record's place."""


def renew_checksums(file: BinaryIO, archive: PartReader, places: Iterable[Place]) -> None:
    """Give the changed records of an archive their CRC-32, in its directory and behind the records.

    `file` is open for writing, and the archive is a part of it.
    """
    # All are found before one is written: what is read must not change meanwhile.
    for at, crc in list(_checksums(archive, places)):
        system.write_at(file.fileno(), memoryview(crc), archive.start + at)


def _checksums(archive: PartReader, places: Iterable[Place]) -> Iterator[tuple[int, bytes]]:
    """The places in an archive of the checksums of its changed records, and what belongs there."""
    with zipfile.ZipFile(archive) as opened:
        start, entries = opened.start_dir, opened.infolist()
    if not any(entry.CRC for entry in entries):
        return  # torch left them out, as its setting asks
    changed = {place.start - archive.start: place.nbytes for place in places}
    while (entry := _entry(archive, start)) is not None:
        record, length = entry
        content = record + 30 + sum(struct.unpack("<HH", archive.at(record + 26, 4)))
        if (nbytes := changed.get(content)) is not None:
            crc = archive.file.checksum(archive.start + content, nbytes).to_bytes(4, "little")
            yield from ((at, crc) for at in _places(archive, record, content + nbytes))
            yield start + 16, crc
        start += length


def _entry(archive: PartReader, start: int) -> tuple[int, int] | None:
    """Where a record of an archive begins, by the entry of the directory at `start`; the entry's length."""
    data = archive.at(start, _ENTRY.size)
    if len(data) < _ENTRY.size or data[:4] != b"PK\1\2":
        return None
    _, _, name, extra, comment, place = _ENTRY.unpack(data)
    if place == 0xFFFFFFFF:  # beyond 4 GiB: the last 8 bytes of the extra field of ZIP64
        place = _far_place(archive.at(start + _ENTRY.size + name, extra))
    return place, _ENTRY.size + name + extra + comment


def _far_place(extra: bytes) -> int:
    """The place in the extra field 1 of an entry (ZIP64), behind the sizes that are there."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            return int(struct.unpack_from("<Q", extra, at + 4 + length - 8)[0])
        at += 4 + length
    raise ValueError("the archive's directory points at no record")


def _places(archive: PartReader, record: int, end: int) -> Iterator[int]:
    """Where a record itself has its checksum: in its header, and in the descriptor behind its content."""
    if archive.at(record + 14, 4) != bytes(4):
        yield record + 14
    if archive.at(end, 4) == _DESCRIPTOR:
        yield end + 4
