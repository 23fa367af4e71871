"""Helpers for tests of readers: what files hold, what is made of them, what memory they keep."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from alone import ALONE
from polyak.checkpoints._open.files import OpenFile, labelled
from polyak.checkpoints._torch_save.files import load
from polyak.checkpoints._torch_save.pickles import Aside
from polyak.checkpoints._torch_save.tensors import StoredTensor

DTYPES: tuple[torch.dtype, ...] = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES += (torch.float8_e8m0fnu,)


def content(tensor: Tensor) -> bytes:
    """A tensor's bytes, row by row, NaN payloads and all."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(got: Tensor, wanted: Tensor) -> bool:
    """Whether dtype, shape and every bit agree."""
    forms = (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    return forms and content(got) == content(wanted)


def of_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A tensor of random bytes: subnormal numbers, infinities and NaN of every kind."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    top = 2 if dtype == torch.bool else 256
    bytes_of = torch.randint(0, top, (count,), dtype=torch.uint8, generator=generator)
    return bytes_of.view(dtype).reshape(shape)


def resident_bytes() -> int:
    """The memory of this process, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def flipped(data: bytes, bit: int) -> bytes:
    """The bytes with one bit changed."""
    place = bit // 8
    return data[:place] + bytes([data[place] ^ 1 << bit % 8]) + data[place + 1 :]


def safetensors(header: Mapping[str, object] | bytes, body: bytes = b"") -> bytes:
    """A file with this header, whatever it says; no padding."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def save_folder(state: dict[str, Any], folder: Path) -> None:
    """A folder of torch.distributed.checkpoint, saved by this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is alone
        save(state, checkpoint_id=folder, **ALONE)


def load_torch(path: Path) -> Any:
    """What a file of torch.save holds, all its tensors read."""
    file = OpenFile(path)
    with labelled(path, "a damaged file of torch.save"):
        return all_read(load(file.whole).value)


def all_read(value: Any) -> Any:
    """A structure whose stored tensors are tensors."""
    if isinstance(value, StoredTensor):
        return value.read()
    if isinstance(value, dict) and not isinstance(value, Aside):
        return {name: all_read(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(all_read, value))
    return value


class Calls:
    """Pickles as a call of a function that is named: what a hostile file would have run."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._reduced


class _Pickler(pickle.Pickler):
    """Writes `Stored` objects as torch.save writes storages."""

    def persistent_id(self, value: object) -> object:
        return value.identity if isinstance(value, Stored) else None


class Stored:
    """A storage as a pickle describes it: its type, key, place and number of elements."""

    def __init__(self, kind: Any, key: str, count: int) -> None:
        self.identity = ("storage", kind, key, "cpu", count)


def pickled(value: object, protocol: int = 2) -> bytes:
    """A pickle as the one in a file of torch.save."""
    file = io.BytesIO()
    _Pickler(file, protocol=protocol).dump(value)
    return file.getvalue()


def archive(records: Mapping[str, bytes], name: str = "archive") -> bytes:
    """A zip archive as torch.save writes it, of these records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for record, data in records.items():
            opened.writestr(f"{name}/{record}", data)
    return file.getvalue()


def claimed(kind: Any, count: int, offset: int, shape: Any, stride: Any, data: bytes) -> bytes:
    """A file of torch.save whose one tensor claims this layout of a storage of these bytes."""
    rebuild = torch._utils._rebuild_tensor_v2
    storage = Stored(kind, "0", count)
    tensor = Calls(rebuild, storage, offset, shape, stride, False, OrderedDict())
    return archive({"data.pkl": pickled({"w": tensor}), "data/0": data})
