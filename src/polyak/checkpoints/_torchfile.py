"""Files of torch.save, in both of its layouts: where the storages lie, and that they are whole.

A file is a zip archive, whose record `data.pkl` is a pickle and whose records `data/<key>` are the
storages, unpacked; or, before torch 1.6, five pickles with the storages behind them.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from polyak.checkpoints import _pickles as pickles
from polyak.checkpoints._mapped import Mapped, head
from polyak.checkpoints._pickles import Persistent
from polyak.checkpoints._torchtensors import KNOWN, Stored, Tensors, stored

_ARCHIVE = b"PK\3\4"
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001


class Region(io.RawIOBase):
    """A part of a mapped file, to read as a file."""

    def __init__(self, mapped: Mapped, start: int, length: int) -> None:
        self.mapped, self.start, self.length = mapped, start, length
        self._place = 0

    def read(self, size: int = -1) -> bytes:
        stop = self.length if size < 0 else min(self._place + size, self.length)
        found = self.mapped.memory[self.start + self._place : self.start + stop]
        self._place += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        place = offset + (0, self._place, self.length)[whence]
        if place < 0:
            raise ValueError("a place before the beginning")
        self._place = min(place, self.length)
        return self._place

    def tell(self) -> int:
        return self._place


def load(mapped: Mapped, start: int = 0, length: int | None = None) -> object:
    """What was saved into a file, or into this part of it, with plain tensors: views of the file.

    Raises `ValueError` saying what is wrong and what to do, or any other exception for a file that
    is too damaged to tell.
    """
    region = Region(mapped, start, mapped.size - start if length is None else length)
    reader = _kind(region.read(4))
    if reader is None:
        raise ValueError("no file of torch.save")
    region.seek(0)
    return reader(region)


def is_torch(path: Path) -> bool:
    """Whether a file begins as one of torch.save does."""
    return _kind(head(path, 4)) is not None


def _kind(first: bytes) -> Callable[[Region], object] | None:
    """What reads a file that begins so."""
    if first == _ARCHIVE:
        return _load_archive
    return _load_pickles if first[:1] == b"\x80" else None


Places = dict[str, tuple[int, int]]
"""Name -> where in the region something starts, and its bytes."""


def _load_archive(region: Region) -> object:
    records = _records(region)
    if "byteorder" in records and _content(region, records, "byteorder") != b"little":
        raise ValueError("saved on a machine of the other byte order: save it again on this kind")
    data = _content(region, records, "data.pkl")
    found = pickles.read(io.BytesIO(data), KNOWN)
    places = {name.removeprefix("data/"): place for name, place in records.items()}
    return _tensors(region, places, len(data)).of(found)


def _tensors(region: Region, places: Places, size: int) -> Tensors:
    def locate(wanted: Stored) -> int:
        start, length = places.get(wanted.key, (0, -1))
        if length != wanted.nbytes:
            found = f"has {length}" if length >= 0 else "is missing"
            raise ValueError(f"storage {wanted.key[:100]!r} of {wanted.nbytes} bytes {found}")
        return region.start + start

    return Tensors(region.mapped, locate, size, room=region.length)


def _records(region: Region) -> Places:
    """The archive's records by name, without the archive's own; each as it was written."""
    with zipfile.ZipFile(region) as archive:
        entries = archive.infolist()
    if any(entry.orig_filename.endswith("/constants.pkl") for entry in entries):
        raise ValueError("a TorchScript archive, which is code: save the module's state_dict")
    summed = any(entry.CRC for entry in entries)  # torch can be told to leave the checksums out
    records: Places = {}
    for entry in entries:
        name = entry.orig_filename.partition("/")[2]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(f"the record {name[:100]!r} is packed, which torch.save never does")
        if name in records:
            raise ValueError(f"two records are named {name[:100]!r}")
        records[name] = (_start(region, entry), entry.file_size)
        if summed and _checksum(region, *records[name]) != entry.CRC:
            raise ValueError(f"the record {name[:100]!r} is damaged: its checksum is another")
    return records


def _start(region: Region, entry: zipfile.ZipInfo) -> int:
    """Where a record's content begins; its own header must agree with the archive's directory."""
    region.seek(entry.header_offset)
    header = region.read(30)
    if len(header) < 30 or header[:4] != _ARCHIVE:
        raise ValueError("the archive's directory points at no record")
    name_length, extra_length = struct.unpack("<HH", header[26:])
    name = region.read(name_length)
    start = entry.header_offset + 30 + name_length + extra_length
    if name != entry.orig_filename.encode() or start + entry.file_size > region.length:
        raise ValueError(f"the record {entry.orig_filename[:100]!r} is not where it should be")
    return int(start)


def _checksum(region: Region, start: int, length: int) -> int:
    """The CRC-32 of a record."""
    checksum = 0
    for piece in region.mapped.pieces(region.start + start, length):
        checksum = zlib.crc32(piece, checksum)
    return checksum


def _content(region: Region, records: Places, name: str) -> bytes:
    if name not in records:
        raise ValueError(f"an archive without {name}, so none of torch.save")
    start, length = records[name]
    region.seek(start)
    return region.read(length)


def _load_pickles(region: Region) -> object:
    if pickles.read(region, ()) != _MAGIC:
        raise ValueError("a pickle, but none of torch.save: save it with torch.save")
    if pickles.read(region, ()) != _VERSION:
        raise ValueError("a file of torch.save in an unknown version")
    system = pickles.read(region, ())
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("saved on a machine of the other byte order: save it again on this kind")
    elsewhere: list[Persistent] = []
    found = pickles.read(region, KNOWN, elsewhere)
    size = region.tell()
    places = _places(region, pickles.read(region, ()), map(stored, elsewhere))
    return _tensors(region, places, size).of(found)


def _places(region: Region, keys: object, wanted: Iterable[Stored]) -> Places:
    """Where the storages behind the pickles lie: for each its number of elements, then they."""
    forms: dict[str, Stored] = {}
    for each in wanted:
        forms.setdefault(each.key, each)
    places: Places = {}
    for key in keys if isinstance(keys, list) else []:
        count = int.from_bytes(region.read(8), "little")
        start, form = region.tell(), forms.pop(key)
        if count * form.dtype.itemsize != form.nbytes or start + form.nbytes > region.length:
            raise ValueError(f"storage {form.key[:100]!r} of {form.nbytes} bytes is cut short")
        places[key] = (start, form.nbytes)
        region.seek(start + form.nbytes)
    return places
