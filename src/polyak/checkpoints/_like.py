"""Like another: weights in the form of a checkpoint, of which only the weights' own bytes are replaced.

A copy of the file or folder is made, and each tensor is written where the old one lies in it. So nothing
in a pickle has to be understood or made again: nesting, counters, settings, states of optimizers and the
objects of unknown classes stay as they are.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from polyak import _system as system
from polyak._checks import difference, report
from polyak._files import naming, writing, writing_folder
from polyak._lazy import LazyTensors, Place, as_lazy
from polyak.checkpoints._checkpoint import Checkpoint
from polyak.checkpoints._read import read as read_checkpoint
from polyak.checkpoints._safetensor_files import content
from polyak.checkpoints._weight_files import totalled

Read = Callable[[Path], Checkpoint]

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|pkl|h5|msgpack|onnx)$")
_OF_TRAINING = re.compile(r"trainer_state\.json|.*\.distcp|latest|zero_to_fp32\.py|\..*")
_PIECE = 1 << 20
_DESCRIPTOR = b"PK\7\10"
_ENTRY = struct.Struct(
    "<4s12xI8xHHH8xI"
)  # of a zip archive's directory: signature, CRC-32, lengths, place


def write_like(
    out: Path | str,
    like: Path | str,
    weights: Mapping[str, Tensor],
    which: str | None = None,
    *,
    read: Read = read_checkpoint,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> list[str]:
    """Write weights in the form of another checkpoint, complete or not at all.

    `like` is a file of torch.save: then everything else in it stays, and torch.load gives the same
    objects with other weights. Or it is a file of safetensors, or a folder as Hugging Face writes: then
    its configurations, tokenizer and index are copied, and its weights are laid out in the same files.
    States of the training in a folder are left out; their names are returned. What shares memory with a
    weight in a file changes with it.

    `which` are the weights of `like` that are replaced, as `Checkpoint.weights` takes it, and `read` reads
    it, by default `checkpoints.read`. Of tied weights, one name is enough.

    >>> import tempfile
    >>> like = Path(tempfile.mkdtemp()) / "like.pt"
    >>> torch.save({"model": {"w": torch.zeros(2)}, "step": 5}, like)
    >>> write_like(like.with_name("new.pt"), like, {"w": torch.ones(2)})
    []
    >>> torch.load(like.with_name("new.pt"))
    {'model': {'w': tensor([1., 1.])}, 'step': 5}

    Raises `ValueError` for weights with other names, shapes or dtypes than those of `like`, for tied
    weights that differ, and for a format whose weights cannot be replaced; `FileExistsError` if `out`
    exists, unless `overwrite`; and what `read` raises.
    """
    out, like, lazy = Path(out), Path(like), as_lazy(weights)
    _matched(read(like).weights(which), lazy, like)
    if not like.is_dir():
        with writing(out, overwrite=overwrite) as file, like.open("rb") as source:
            shutil.copyfileobj(source, file, _PIECE)
            file.flush()
            _replace(Path(file.name), out, lazy, which, read, progress)
        return []
    files = {place.path.name for _, _, place in _matched(read(like).weights(which), lazy, like)}
    with writing_folder(out, overwrite=overwrite) as folder:
        left = _copy(like, folder, files)
        _replace(folder, out, lazy, which, read, progress)
    return left


def _copy(like: Path, folder: Path, files: set[str]) -> list[str]:
    """Copy the files of a folder that belong to its weights; the names of the others."""
    left = []
    for path in sorted(like.iterdir()):
        beside = path.is_file() and not _WEIGHTS.search(path.name)
        if path.name in files or (beside and not _OF_TRAINING.fullmatch(path.name)):
            shutil.copyfile(path, folder / path.name)
        else:
            left.append(path.name)
    return left


def _replace(
    copy: Path,
    out: Path,
    weights: LazyTensors,
    which: str | None,
    read: Read,
    progress: Callable[[int, int], object] | None,
) -> None:
    """Write weights to their places in a copy, which has its own places read from it."""
    matched = _matched(read(copy).weights(which), weights, out)
    add = totalled(progress, sum(weights.specs[name].nbytes for _, name, _ in matched))
    changed: dict[Path, list[Place]] = {}
    written: dict[Place, str] = {}
    with naming(out, copy), ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for _, name, place in matched:
            if place.path not in files:
                files[place.path] = stack.enter_context(place.path.open("r+b"))
            if place in written:
                _require_same(weights, written[place], name, out)
                continue
            _write(files[place.path], place, weights, name)
            changed.setdefault(place.path, []).append(place)
            written[place] = name
            if add is not None:
                add(weights.specs[name].nbytes)
        for path, places in changed.items():
            _renew_checksums(files[path], places)
            files[path].flush()
            os.fsync(files[path].fileno())


def _matched(held: LazyTensors, weights: LazyTensors, like: Path) -> list[tuple[str, str, Place]]:
    """(the name in `like`, the name of the new tensor, the place) of each tensor that has elements."""
    places = {name: held.place(name) for name, spec in held.specs.items() if spec.numel}
    if lost := [name for name, place in places.items() if place is None]:
        raise ValueError(
            f"{like}: {lost[0]} does not lie in the file as it is read, so it cannot be replaced there; "
            "wanted a file of torch.save or safetensors, or a folder of Hugging Face's"
        )
    of_place = {places[name]: name for name in held if name in weights and places.get(name)}
    of_identity = {weights.identity(name): name for name in weights if name in held}
    wanted = {name: str(spec) for name, spec in held.specs.items()}
    got = {name: str(spec) for name, spec in weights.specs.items()}
    tied = {name for name in wanted if name not in got and places.get(name) in of_place}
    doubled = {
        name
        for name in got
        if name not in wanted and weights.identity(name) in of_identity.keys() - {None}
    }
    wanted = {name: spec for name, spec in wanted.items() if name not in tied}
    got = {name: spec for name, spec in got.items() if name not in doubled}
    if lines := difference(wanted, got):
        raise ValueError(report(f"the weights are not those of {like}", lines))
    return [(name, name, place) for name in wanted if (place := places.get(name)) is not None]


def _write(file: BinaryIO, place: Place, weights: LazyTensors, name: str) -> None:
    """Write a tensor into its storage: piece by piece if it lies there row by row."""
    spec = weights.specs[name]
    if place.is_plain(spec):
        at = place.start + place.offset * spec.dtype.itemsize
        for piece in _pieces(weights, name):
            data = content(piece)
            _write_at(file, data, at)
            at += data.nbytes
        return
    held = bytearray(system.pread(file.fileno(), place.nbytes, place.start))
    storage = torch.frombuffer(held, dtype=spec.dtype)
    storage.as_strided(spec.shape, place.stride, place.offset).copy_(weights[name])
    _write_at(file, memoryview(held), place.start)


def _write_at(file: BinaryIO, data: memoryview, at: int) -> None:
    while data:
        count = system.write_at(file.fileno(), data, at)
        data, at = data[count:], at + count


def _pieces(weights: LazyTensors, name: str) -> Iterator[Tensor]:
    pieces = getattr(weights, "pieces", None)  # a combination's
    return iter([weights[name]]) if pieces is None else pieces(name)


def _require_same(weights: LazyTensors, one: str, other: str, out: Path) -> None:
    """Raises `ValueError` if two tensors differ that are one tensor in a file."""
    pairs = zip(_pieces(weights, one), _pieces(weights, other), strict=True)
    if not all(torch.equal(a.reshape(-1), b.reshape(-1)) for a, b in pairs):
        raise ValueError(f"{out}: {one} and {other} are one tensor there, and the new ones differ")


def _renew_checksums(file: BinaryIO, places: list[Place]) -> None:
    """Give an archive's changed records their CRC-32, in its directory and behind the records."""
    if file.seek(0) or file.read(4) != b"PK\3\4":
        return
    with zipfile.ZipFile(file) as archive:
        start, entries = archive.start_dir, archive.infolist()
    if not any(entry.CRC for entry in entries):
        return  # torch was told to leave them out
    changed = {place.start: place.nbytes for place in places}
    while (entry := _entry(file, start)) is not None:
        record, length = entry
        header = system.pread(file.fileno(), 30, record)
        names = sum(struct.unpack("<HH", header[26:]))
        if (nbytes := changed.get(record + 30 + names)) is not None:
            crc = _checksum(file, record + 30 + names, nbytes)
            _write_at(file, memoryview(crc), start + 16)
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
        _write_at(file, memoryview(crc), record + 14)
    if system.pread(file.fileno(), 4, end) == _DESCRIPTOR:
        _write_at(file, memoryview(crc), end + 4)
