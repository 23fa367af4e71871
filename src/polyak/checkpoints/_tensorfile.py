"""Safetensors files: mapped for reading, without a copy; written in pieces, without a whole tensor.

The layout is that of the safetensors library, which checks every header that is read here: eight
bytes of length, a header in JSON, the tensors' bytes without gaps. A file that polyak writes for itself
has a digest in its header: SHA-256 of the whole file, with zeros where the digest stands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyak import _files as files
from polyak._engine.readout import NamedTensors
from polyak._tensors import refuse_wrapper
from polyak.checkpoints._mapped import Mapped, head, release

DIGEST = "digest"
_NO_DIGEST = "0" * 64
_READ_BYTES = 1 << 22

_CODES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}


class Form(NamedTuple):
    """What of a tensor is known before its content: its dtype and its shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


def form(tensor: Tensor) -> Form:
    """The form of a tensor."""
    return Form(tensor.dtype, tuple(tensor.shape))


def forms(weights: Mapping[str, Tensor]) -> Mapping[str, Form]:
    """The form of each tensor; content is read only where nothing else tells it."""
    known: Mapping[str, Form] | None = getattr(weights, "forms", None)
    return {name: form(weights[name]) for name in weights} if known is None else known


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


class TensorFile(NamedTensors):
    """A safetensors file as a mapping name -> tensor: views of the mapped file, in file order.

    What is written to a view stays in memory: the file does not change. `release` gives the pages
    of a tensor back that reading it has made resident; they are read again when needed.

    Raises `ValueError` naming the file where it is no safetensors file, or a damaged one.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._mapped = Mapped(self.path)
        try:
            # As "np" it only reads the header; as "pt" it would reserve memory for the whole file.
            with safe_open(self.path, framework="np") as opened:
                self.metadata: dict[str, str] = opened.metadata() or {}
                self.forms = {name: _form_of(opened, name) for name in opened.offset_keys()}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{self.path}: no readable safetensors file ({error})") from None
        self._starts: dict[str, int] = {}
        place = self._content = 8 + int.from_bytes(self._mapped.memory[:8], "little")
        for name, each in self.forms.items():
            self._starts[name] = place
            place += each.nbytes

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self.forms[name]
        return self._mapped.tensor(dtype, shape, self._starts[name])

    @property
    def known(self) -> Mapping[str, object]:
        return self.forms

    def release(self, name: str) -> None:
        """Gives back the pages that only this tensor has on them. What was written to is lost."""
        release(self[name])

    def require_digest(self) -> None:
        """Reads the whole file; raises `ValueError` unless it is what its digest says."""
        wanted = self.metadata.get(DIGEST, "")
        with self.path.open("rb") as file:
            header = file.read(self._content)
            digest = hashlib.sha256(header.replace(_key(wanted), _key(_NO_DIGEST)))
            while part := file.read(_READ_BYTES):
                digest.update(part)
        if digest.hexdigest() != wanted:
            raise ValueError(
                f"{self.path}: the content is not what was written (its digest is "
                f"{digest.hexdigest()[:12]}..., the header says {wanted[:12]!r}...): the file is "
                "damaged, so use another"
            )


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does."""
    first = head(path, 9)
    return len(first) == 9 and first[8:] == b"{" and int.from_bytes(first[:8], "little") < 10**8


def write(
    path: Path | str,
    forms: Mapping[str, Form],
    pieces: Pieces,
    metadata: Mapping[str, str],
    *,
    digest: bool = False,
    overwrite: bool = True,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes a safetensors file, complete or not at all (`polyak._files`).

    `pieces(name)` gives a tensor's content in pieces, in order; no more than one is held. `progress`
    is told the bytes of each. With `digest` the header gets one. Raises `TypeError` for a dtype that
    safetensors does not have, `ValueError` for pieces that do not fill their tensor.
    """
    ordered = _ordered(forms)
    header = _header(ordered, {**metadata, DIGEST: _NO_DIGEST} if digest else metadata)
    with files.writing(path, overwrite=overwrite) as file:
        running = hashlib.sha256(header) if digest else None
        file.write(header)
        for name, each in ordered.items():
            _write_tensor(file, name, each, pieces(name), running, progress)
        if running is not None:
            file.seek(header.index(_key(_NO_DIGEST)))
            file.write(_key(running.hexdigest()))


class Layout(NamedTuple):
    """How a safetensors file is laid out: its header, where each tensor begins, its size."""

    header: bytes
    starts: dict[str, int]
    nbytes: int


def layout(forms: Mapping[str, Form], metadata: Mapping[str, str]) -> Layout:
    """The layout of the file that `write` writes, its tensors in the file's order.

    Raises `TypeError` for a dtype that safetensors does not have.
    """
    ordered = _ordered(forms)
    header = _header(ordered, metadata)
    starts, place = {}, len(header)
    for name, each in ordered.items():
        starts[name] = place
        place += each.nbytes
    return Layout(header, starts, place)


def as_bytes(tensor: Tensor) -> Tensor:
    """The content of a tensor, row by row, as uint8; without a copy where it lies so."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def content(tensor: Tensor) -> memoryview:
    """The content of a tensor in memory, row by row; without a copy where it lies so on the CPU."""
    return as_bytes(tensor.cpu()).numpy().data


def _ordered(forms: Mapping[str, Form]) -> dict[str, Form]:
    """In the order of the file: what is wider comes first, so that all is aligned."""
    return dict(sorted(forms.items(), key=lambda item: -item[1].dtype.itemsize))


def _write_tensor(
    file: BinaryIO,
    name: str,
    wanted: Form,
    pieces: Iterable[Tensor],
    running: hashlib._Hash | None,
    progress: Callable[[int], object] | None,
) -> None:
    written = 0
    for piece in pieces:
        if piece.dtype != wanted.dtype:
            raise ValueError(f"{name}: a piece is {piece.dtype}, wanted {wanted.dtype}")
        held = content(piece)
        file.write(held)
        if running is not None:
            running.update(held)
        written += held.nbytes
        if progress is not None:
            progress(held.nbytes)
    if written != wanted.nbytes:
        raise ValueError(f"{name}: {written} bytes were given, wanted {wanted.nbytes}")


def _header(forms: Mapping[str, Form], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    place = 0
    for name, each in forms.items():
        if each.dtype not in _CODE_OF:
            raise TypeError(f"{name} is {each.dtype}, which a safetensors file cannot hold")
        if name == "__metadata__":
            raise ValueError("a tensor is named __metadata__, which safetensors files reserve")
        entries[name] = {
            "dtype": _CODE_OF[each.dtype],
            "shape": list(each.shape),
            "data_offsets": [place, place + each.nbytes],
        }
        place += each.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _form_of(opened: safe_open, name: str) -> Form:
    view = opened.get_slice(name)
    return Form(_CODES[view.get_dtype()], tuple(view.get_shape()))


def _key(digest: str) -> bytes:
    return f'"{DIGEST}":"{digest}"'.encode()
