"""Safetensors files: mapped for reading, without a copy; written in pieces, never a whole tensor.

The layout is that of the safetensors library, which checks every header that is read here: eight
bytes of length, a header in JSON, the tensors' bytes without gaps. A file that polyak writes for itself
has checksums in its header: CRC-32 of each tensor in the file's order, and SHA-256 of the header
itself, with zeros where that digest stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from isal.isal_zlib import crc32
from torch import Tensor

from polyak import _files as files
from polyak._dtypes import refuse_wrapper
from polyak._lazy import Elements, LazyTensors, Place, TensorSpec, Where
from polyak.checkpoints._open.files import FileSpan, OpenFile, Verified, all_verified
from polyak.checkpoints._safetensors.headers import CODES, read_header

KEY = "polyak"  # the entry of a header that only files of ours have
_DIGEST, _NO_DIGEST = "digest", "0" * 64
_CHECKSUMS = "checksums"

_CODE_OF = {dtype: code for code, dtype in CODES.items()}


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype; raises `ValueError` for a finite value that it cannot hold."""
    refuse_wrapper(name, tensor)
    narrow = tensor.to(dtype)
    if narrow.dtype != tensor.dtype and bool((narrow.isinf() & tensor.isfinite()).any()):
        largest = tensor[tensor.isfinite()].abs().max()
        raise ValueError(
            f"{name} has a value of {largest:.3g}, which {dtype} cannot hold; store bfloat16 or "
            "float32"
        )
    return narrow


Pieces = Callable[[str], Iterable[Tensor]]


class TensorFile(LazyTensors):
    """A safetensors file as a mapping name -> tensor: views of the mapped file, in file order.

    What is written to a view stays in memory: the file does not change. `release` gives the pages
    of a tensor back that reading it has made resident; they are read again when needed. `unread` are the
    tensors of a dtype that is not known here, with that dtype.

    Raises `ValueError` naming a file that is not in the format, or is damaged.
    """

    def __init__(self, file: OpenFile) -> None:
        self.path = file.path
        self._file = file
        self.metadata, self._specs, self.unread = read_header(file)
        self._spans: dict[str, FileSpan] = {}
        place = self._content = 8 + int.from_bytes(self._file.read(0, 8), "little")
        for name, spec in self._specs.items():
            self._spans[name] = FileSpan(self._file, f"tensor {name!r}", place, spec.nbytes)
            place += spec.nbytes
        for name in self.unread:
            del self._specs[name]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self._specs

    def read(self, name: str, where: Where = ()) -> Tensor:
        return self._spans[name].tensor(self._specs[name])[where]

    def release(self, name: str) -> None:
        self._spans[name].release()

    def elements(self, name: str) -> Elements:
        return self._spans[name].elements(self._specs[name])

    def places(self, name: str) -> tuple[Place, ...]:
        """Where a tensor lies; nothing in a file of ours, whose header has checksums."""
        span = self._spans[name]
        rows = torch.empty(self._specs[name].shape, device="meta").stride()
        return () if KEY in self.metadata else (Place(self.path, span.start, span.nbytes, 0, rows),)

    def verify(self) -> Verified:
        """Compare every tensor with its checksum, if the file is one of ours."""
        return all_verified(span.verify() for span in self._spans.values())

    def use_checksums(self) -> None:
        """Compare the header with its digest, and each tensor, when first read, with its checksum.

        Raises `ValueError` for a header that is not what was written.
        """
        wanted, sums = self.metadata.get(_DIGEST, ""), self.metadata.get(_CHECKSUMS, "")
        header = self._file.read(0, self._content)
        digest = sha256(header.replace(_key(wanted), _key(_NO_DIGEST))).hexdigest()
        filled = [span for span in self._spans.values() if span.nbytes]
        if digest != wanted or not re.fullmatch(f"([0-9a-f]{{8}}){{{len(filled)}}}", sums):
            raise ValueError(
                f"{self.path}: the header is not what was written (its digest is {digest[:12]}..., "
                f"the header says {wanted[:12]!r}...): the file is damaged, so use another"
            )
        for place, span in enumerate(filled):
            span.checksum = int(sums[8 * place : 8 * place + 8], 16)


def is_safetensors(file: OpenFile) -> bool:
    """Whether a file begins as a safetensors file does."""
    first = file.read(0, 9)
    return len(first) == 9 and first[8:] == b"{" and int.from_bytes(first[:8], "little") < 10**8


def write(
    path: Path | str,
    specs: Mapping[str, TensorSpec],
    pieces: Pieces,
    metadata: Mapping[str, str],
    *,
    checksums: bool = False,
    overwrite: bool = True,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a safetensors file that appears complete, or not at all (`polyak._files`).

    `pieces(name)` gives a tensor's content in pieces, in order; one piece is in memory at a time.
    `progress` is called with the bytes of each piece. With `checksums` the header has checksums.

    Raises `TypeError` for a dtype that safetensors does not have; `ValueError` for pieces that do not
    fill their tensor.
    """
    ordered = _ordered(specs)
    sums = dict.fromkeys(ordered, 0)
    with files.writing(path, overwrite=overwrite) as file:
        file.write(_header(ordered, metadata, sums if checksums else None))
        for name, spec in ordered.items():
            sums[name] = _write_tensor(file, name, spec, pieces(name), progress)
        if checksums:  # now they are known; the header's length does not depend on them
            file.seek(0)
            file.write(_header(ordered, metadata, sums))


class FileLayout(NamedTuple):
    """The layout of a safetensors file: its header, where each tensor begins, its size in bytes."""

    header: bytes
    starts: dict[str, int]
    nbytes: int


def layout(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> FileLayout:
    """The layout of the file that `write` writes, its tensors in the file's order.

    Raises `TypeError` for a dtype that safetensors does not have.
    """
    ordered = _ordered(specs)
    header = _header(ordered, metadata)
    starts, place = {}, len(header)
    for name, each in ordered.items():
        starts[name] = place
        place += each.nbytes
    return FileLayout(header, starts, place)


def as_bytes(tensor: Tensor) -> Tensor:
    """The content of a tensor, row by row, as uint8; without a copy if it lies so in memory."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def content(tensor: Tensor) -> memoryview:
    """The content of a tensor, row by row, in the memory of the CPU; without a copy if it lies so there."""
    return as_bytes(tensor.cpu()).numpy().data


def _ordered(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """In the order of the file: wider dtypes first, so that every tensor is aligned."""
    return dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))


def _write_tensor(
    file: BinaryIO,
    name: str,
    wanted: TensorSpec,
    pieces: Iterable[Tensor],
    progress: Callable[[int], object] | None,
) -> int:
    """Write a tensor's content; returns its checksum."""
    written = checksum = 0
    for piece in pieces:
        if piece.dtype != wanted.dtype:
            raise ValueError(f"{name}: a piece is {piece.dtype}, wanted {wanted.dtype}")
        data = content(piece)
        file.write(data)
        checksum = crc32(data, checksum)
        written += data.nbytes
        if progress is not None:
            progress(data.nbytes)
    if written != wanted.nbytes:
        raise ValueError(f"{name}: {written} bytes were given, wanted {wanted.nbytes}")
    return checksum


def _header(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    sums: Mapping[str, int] | None = None,
) -> bytes:
    """The header of a file; with `sums` it has these checksums, and a digest of itself."""
    whole = dict(metadata)
    if sums is not None:
        # An empty tensor begins where the next one does, so a reader may find them in either order.
        filled = (sums[name] for name, spec in specs.items() if spec.nbytes)
        whole |= {_CHECKSUMS: "".join(f"{crc:08x}" for crc in filled), _DIGEST: _NO_DIGEST}
    entries: dict[str, object] = {"__metadata__": whole}
    place = 0
    for name, spec in specs.items():
        if spec.dtype not in _CODE_OF:
            raise TypeError(f"{name} is {spec.dtype}, which a safetensors file cannot hold")
        if name == "__metadata__":
            raise ValueError("a tensor is named __metadata__, which safetensors files reserve")
        entries[name] = {
            "dtype": _CODE_OF[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [place, place + spec.nbytes],
        }
        place += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    if sums is None:
        return header
    return header.replace(_key(_NO_DIGEST), _key(sha256(header).hexdigest()), 1)


def _key(digest: str) -> bytes:
    return f'"{_DIGEST}":"{digest}"'.encode()
