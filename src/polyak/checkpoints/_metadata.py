"""Metadata of a folder of torch.distributed.checkpoint: what it holds, and where each chunk lies.

They are a pickle, read as data (`pickles`).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from polyak._ranks.shard_geometry import Box
from polyak.checkpoints import _pickles as pickles
from polyak.checkpoints._mapped import Mapped
from polyak.checkpoints._meaning import Meaning
from polyak.checkpoints._pickles import Call
from polyak.checkpoints._tensorfile import Form
from polyak.checkpoints._torchtensors import DTYPES, layout, size

METADATA = ".metadata"
_MOST = 1 << 60


class Place(NamedTuple):
    """Where the bytes of an entry lie."""

    file: str
    start: int
    length: int


def described(path: Path) -> dict[str, Any]:
    """The metadata: entries and where they lie."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the folder's save was not finished, or it is no folder of "
            "torch.distributed.checkpoint"
        )
    mapped = Mapped(path)
    found = pickles.read(io.BytesIO(mapped.memory[:]), _KNOWN)
    meant = Meaning(_MEANINGS, DTYPES, mapped.size)(found)
    if not isinstance(meant, dict):
        raise ValueError(f"the metadata are a {type(meant).__name__}")
    return meant


def _state(call: Call, meaning: Meaning) -> dict[str, Any]:
    """The fields of a dataclass."""
    state = meaning(call.state)
    if not isinstance(state, dict):
        raise ValueError(f"{meaning.place}: a {call.name} without fields")
    return state


def _tensor(call: Call, meaning: Meaning) -> tuple[Form, list[Box]]:
    fields = _state(call, meaning)
    form = Form(fields["properties"], _numbers(fields["size"]))
    if not isinstance(form.dtype, torch.dtype) or not isinstance(fields["chunks"], list):
        raise ValueError(f"{meaning.place} is a tensor of an unknown form")
    return form, fields["chunks"]


def _properties(call: Call, meaning: Meaning) -> Any:
    """(dtype, layout, requires_grad, memory_format, pin_memory), of which the dtype counts."""
    dtype, layout, *_ = meaning(call.state)
    if layout is not torch.strided:
        raise ValueError(f"{meaning.place} has the layout {layout!r:.100}, wanted torch.strided")
    return dtype


def _chunk(call: Call, meaning: Meaning) -> Box:
    fields = _state(call, meaning)
    return Box(_numbers(fields["offsets"]), _numbers(fields["sizes"]))


def _index(call: Call, meaning: Meaning) -> tuple[Any, ...]:
    """The key of an entry, or of one chunk of it."""
    fields = _state(call, meaning)
    return (fields["fqn"], *_numbers(fields.get("offset") or ()))


def _place(call: Call, meaning: Meaning) -> Place:
    fields = _state(call, meaning)
    if extensions := fields.get("transform_descriptors"):
        raise ValueError(f"{meaning.place} was written through {extensions!r:.100}, not read here")
    place = Place(fields["relative_path"], *_numbers((fields["offset"], fields["length"])))
    if not isinstance(place.file, str):
        raise ValueError(f"{meaning.place} lies in a file that is no name")
    return place


def _numbers(values: Any) -> tuple[int, ...]:
    if all(type(value) is int and 0 <= value < _MOST for value in values):
        return tuple(values)
    raise ValueError(f"wanted sizes and offsets, got {values!r:.100}")


def _nothing(_: Call, __: Meaning) -> None:
    """Of no use here."""


_MODULE = "torch.distributed.checkpoint"
_EARLIER = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.3
_MEANINGS: dict[str, Callable[[Call, Meaning], object]] = {
    f"{_MODULE}.metadata.Metadata": _state,
    f"{_MODULE}.metadata.TensorStorageMetadata": _tensor,
    f"{_MODULE}.metadata.TensorProperties": _properties,
    f"{_MODULE}.metadata.ChunkStorageMetadata": _chunk,
    f"{_MODULE}.metadata.BytesStorageMetadata": _nothing,
    f"{_MODULE}.metadata.MetadataIndex": _index,
    f"{_MODULE}.metadata.StorageMeta": _nothing,
    f"{_MODULE}.metadata._MEM_FORMAT_ENCODING": _nothing,
    f"{_MODULE}.filesystem._StorageInfo": _place,
    f"{_EARLIER}.TensorProperties": _properties,
    f"{_EARLIER}.MEM_FORMAT_ENCODING": _nothing,
    "pathlib.PosixPath": _nothing,
    "torch.Size": size,
    "torch.serialization._get_layout": layout,
}
_KNOWN = frozenset(_MEANINGS) | set(DTYPES)
