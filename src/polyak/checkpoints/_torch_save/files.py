"""Files of torch.save, in both of its layouts: a pickle, and storages that it refers to.

A file is a zip archive, whose record `data.pkl` is the pickle and whose records `data/<key>` are the
storages, not packed. Before torch 1.6 it was five pickles with the storages behind them.

Only the pickle and the archive's directory are read. A tensor is a `StoredTensor`: its storage is
found, and compared with its checksum, when the tensor is first read.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import NamedTuple

from torch import Tensor

from polyak._lazy import Elements, LazyTensors, Place, TensorSpec, Where
from polyak.checkpoints._looks import archive_kind
from polyak.checkpoints._open.files import FilePart, FileSpan, Verified, all_verified, labelled
from polyak.checkpoints._torch_save import pickles
from polyak.checkpoints._torch_save.objects import Objects
from polyak.checkpoints._torch_save.tensors import Storage, StoredTensor

_ARCHIVE = b"PK\3\4"
_PICKLE = b"\x80"
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_WINDOW = 1 << 16  # the pickles before the storages are mostly shorter
_AGAIN = ": copy or fetch the file again"
_OTHER_ORDER = "saved on a machine of the other byte order: save it again on this kind of machine"


class Loaded(NamedTuple):
    """The contents of a file of torch.save: its value, how many objects of each name were set aside, its records."""

    value: object
    aside: dict[str, int]
    records: list[FileSpan]


def is_torch(first: bytes) -> bool:
    """Whether a file that begins so may be one of torch.save."""
    return first[:4] == _ARCHIVE or first[:1] == _PICKLE


def load(part: FilePart) -> Loaded:
    """Read the value that was saved into a file, or into a part of one, without reading its tensors.

    Errors of a tensor that is read later have the part's label behind the file's name.

    Raises `ValueError` that names the file and the part, and says what is wrong and what to do.
    """
    with _labelled(part):
        reader = PartReader(part)
        first = reader.read(4)
        if not is_torch(first):
            raise ValueError("it is not a file of torch.save")
        reader.seek(0)
        return _load_archive(reader) if first == _ARCHIVE else _load_pickles(reader)


def verify(part: FilePart) -> Verified:
    """Compare every record with its checksum; raises `ValueError` that names a damaged one."""
    with _labelled(part):
        if records := load(part).records:
            return all_verified(record.verify() for record in records)
    return Verified(0, part.length)


def _labelled(part: FilePart) -> AbstractContextManager[None]:
    label = f"{part.file.path}: {part.label}".removesuffix(": ")
    return labelled(label, "a damaged file of torch.save")


class StoredTensors(LazyTensors):
    """Tensors of a file of torch.save by name."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: tensor.spec for name, tensor in self._tensors.items()}

    def read(self, name: str, where: Where = ()) -> Tensor:
        return self._tensors[name].read()[where]

    def release(self, name: str) -> None:
        self._tensors[name].release()

    def elements(self, name: str) -> Elements:
        return self._tensors[name].elements() or super().elements(name)

    def origins(self, name: str) -> tuple[Hashable, ...]:
        return (self._tensors[name].identity,)

    def places(self, name: str) -> tuple[Place, ...]:
        place = self._tensors[name].place()
        return () if place is None else (place,)


class PartReader(io.RawIOBase):
    """A part of an open file, to read as a file."""

    def __init__(self, part: FilePart) -> None:
        self.file, self.start, self.length, self.label = part
        self._place = 0

    def read(self, size: int = -1) -> bytes:
        rest = max(self.length - self._place, 0)
        content = self.file.read(self.start + self._place, min(size, rest) if size >= 0 else rest)
        self._place += len(content)
        return content

    def at(self, start: int, size: int) -> bytes:
        """The bytes from a place in the part on."""
        return self.file.read(self.start + start, max(min(size, self.length - start), 0))

    def seek(self, offset: int, whence: int = 0) -> int:
        place = offset + (0, self._place, self.length)[whence]
        if place < 0:
            raise zipfile.BadZipFile("a negative offset")
        self._place = min(place, self.length)
        return self._place

    def tell(self) -> int:
        return self._place

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _load_archive(reader: PartReader) -> Loaded:
    records = _records(reader)
    if "byteorder" in records and records["byteorder"].content() != b"little":
        raise ValueError(_OTHER_ORDER)
    data = records["data.pkl"].content()
    objects = Objects(len(data), reader.length)
    value, _ = pickles.load(data, objects.known(), objects.storage)
    for storage in objects.storages.values():
        record = records.get(f"data/{storage.key}")
        if record is None or record.nbytes != storage.nbytes:
            has = "is missing" if record is None else f"has {record.nbytes}"
            raise ValueError(
                f"storage {storage.key[:100]!r} of {storage.nbytes} bytes {has}{_AGAIN}"
            )
        storage.span, storage.archive = record, (reader.start, reader.length)
    return Loaded(value, pickles.survey(value, len(data)), list(records.values()))


def _records(reader: PartReader) -> dict[str, FileSpan]:
    """The archive's records by name; where each begins is read when it is needed."""
    with zipfile.ZipFile(reader) as archive:
        entries = archive.infolist()
    names = [entry.orig_filename for entry in entries]
    ends = {name.partition("/")[2] for name in names}
    if "constants.pkl" in ends or "data.pkl" not in ends:
        raise ValueError(archive_kind(names))
    summed = any(entry.CRC for entry in entries)  # torch has a setting that leaves them out
    records: dict[str, FileSpan] = {}
    for entry in entries:
        name = entry.orig_filename.partition("/")[2]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(
                f"the record {name[:100]!r} is packed, which torch.save never does: unpack the archive, and pack it "
                "without compression (zip -0)"
            )
        if name in records:
            raise ValueError(f"two records are named {name[:100]!r}{_AGAIN}")
        label = f"{reader.label}the record {name[:100]!r}"
        begin = partial(_begin, reader, entry)
        checksum = entry.CRC if summed else None
        records[name] = FileSpan(reader.file, label, begin, entry.file_size, checksum)
    return records


def _begin(reader: PartReader, entry: zipfile.ZipInfo) -> int:
    """Where a record's content begins; its own header must agree with the archive's directory."""
    header = reader.at(entry.header_offset, 30)
    if len(header) < 30 or header[:4] != _ARCHIVE:
        raise ValueError(f"{reader.file.path}: the archive's directory points at no record{_AGAIN}")
    name_length, extra_length = struct.unpack("<HH", header[26:])
    name = reader.at(entry.header_offset + 30, name_length)
    start = entry.header_offset + 30 + name_length + extra_length
    if name != entry.orig_filename.encode() or start + entry.file_size > reader.length:
        record = f"the record {entry.orig_filename[:100]!r}"
        raise ValueError(
            f"{reader.file.path}: {record} is not where the archive's directory says{_AGAIN}"
        )
    return int(reader.start + start)


def _load_pickles(reader: PartReader) -> Loaded:
    """The layout before torch 1.6: magic number, version, system, value, keys; then the storages."""
    pickled = _Pickles(reader)
    magic, _ = pickled.next()
    if magic != _MAGIC:
        raise ValueError(
            "a pickle that torch.save did not write: load it with the program that wrote it, and save a dictionary "
            "name -> tensor with torch.save"
        )
    version, _ = pickled.next()
    if version != _VERSION:
        raise ValueError(f"a file of torch.save in an unknown version{_AGAIN}")
    system, _ = pickled.next()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError(_OTHER_ORDER)
    value, objects = pickled.next()
    aside = pickles.survey(value, objects.size)
    keys, _ = pickled.next()
    _place_storages(reader, pickled.place, keys, dict(objects.storages))
    return Loaded(value, aside, [])


class _Pickles:
    """Pickles one behind the other; no more of the part is read than a window that holds them."""

    def __init__(self, reader: PartReader) -> None:
        self._reader = reader
        self._data = reader.at(0, _WINDOW)
        self.place = 0

    def next(self) -> tuple[object, Objects]:
        """The value of the next pickle, and what it was made with."""
        while True:
            objects = Objects(len(self._data), self._reader.length)
            known, storage = objects.known(), objects.storage
            try:
                value, self.place = pickles.load(self._data, known, storage, self.place)
            except EOFError as error:
                if len(self._data) == self._reader.length:
                    raise ValueError(f"{error}{_AGAIN}") from None
                self._data = self._reader.at(0, 4 * len(self._data))
            else:
                return value, objects


def _place_storages(
    reader: PartReader, place: int, keys: object, storages: dict[str, Storage]
) -> None:
    """Tell each storage where it lies: they follow each other, each behind its number of elements."""
    for name in keys if isinstance(keys, list) else []:
        storage = storages.pop(name)
        label = f"storage {name[:100]!r}"
        count = storage.nbytes // storage.dtype.itemsize
        begin = partial(_begin_counted, reader, place, count, label)
        storage.span = FileSpan(reader.file, label, begin, storage.nbytes)
        place += 8 + storage.nbytes
        if place > reader.length:
            raise ValueError(f"{label} of {storage.nbytes} bytes is cut short{_AGAIN}")
    if storages:
        raise ValueError(f"storage {next(iter(storages))[:100]!r} is missing{_AGAIN}")


def _begin_counted(reader: PartReader, start: int, wanted: int, label: str) -> int:
    """Where a storage begins: behind the number of its elements."""
    count = int.from_bytes(reader.at(start, 8), "little")
    if count != wanted:
        raise ValueError(
            f"{reader.file.path}: {label} has {count} elements, wanted {wanted}{_AGAIN}"
        )
    return reader.start + start + 8
