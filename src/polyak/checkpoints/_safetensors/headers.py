"""Headers of safetensors files, checked by the safetensors library."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from polyak import _system as system
from polyak._lazy import TensorSpec
from polyak.checkpoints._open.files import OpenFile

CODES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    CODES["F8_E8M0"] = torch.float8_e8m0fnu
_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_BYTES = "U8"


class Header(NamedTuple):
    """The contents of a header: its metadata, the specs of the tensors in the file's order, and which of these
    have a dtype that is not known here, as bytes: name -> dtype."""

    metadata: dict[str, str]
    specs: dict[str, TensorSpec]
    unread: dict[str, str]


def read_header(file: OpenFile) -> Header:
    """The header of a file; raises `ValueError` that names a file that is not in the format.

    A tensor of a dtype that is not known here does not make the others unreadable.
    """
    try:
        with file.handle.use() as handle:
            return _checked(system.path_of(handle, file.path), {})
    except (SafetensorError, KeyError) as error:
        known = _with_bytes(file)
        if known is None:
            raise ValueError(
                f"{file.path}: the safetensors file cannot be read ({error}): copy or fetch it again"
            ) from None
        return known


def _checked(path: str, unread: dict[str, str]) -> Header:
    # As "np" only the header is read; as "pt" memory for the whole file would be reserved.
    with safe_open(path, framework="np") as opened:
        views = {name: opened.get_slice(name) for name in opened.offset_keys()}
        specs = {
            n: TensorSpec(tuple(v.get_shape()), CODES[v.get_dtype()]) for n, v in views.items()
        }
        return Header(opened.metadata() or {}, specs, unread)


def _with_bytes(file: OpenFile) -> Header | None:
    """The header with tensors of unknown dtypes as bytes; None if nothing else is readable.

    The library checks it as that of an empty file of the same size.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(file.size - 8, _HEADER_BYTES):
        return None
    try:
        entries = json.loads(file.read(8, length))
        unread = {name: e["dtype"] for name, e in entries.items() if _is_unknown(name, e)}
        for name in unread:
            begin, end = entries[name]["data_offsets"]
            entries[name] = {**entries[name], "dtype": _BYTES, "shape": [end - begin]}
        text = json.dumps(entries).encode()
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "header")
            copy.write_bytes(len(text).to_bytes(8, "little") + text)
            os.truncate(copy, file.size - length + len(text))
            known = _checked(str(copy), unread) if unread else None
            return known if known is not None and len(unread) < len(known.specs) else None
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def _is_unknown(name: str, entry: Any) -> bool:
    return (
        name != "__metadata__" and isinstance(entry["dtype"], str) and entry["dtype"] not in CODES
    )
