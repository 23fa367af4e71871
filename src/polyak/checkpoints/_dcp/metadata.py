"""The metadata of a folder of torch.distributed.checkpoint: what it holds, and where each chunk lies.

They are a pickle (`.metadata`). Its classes become classes of ours, never torch's own. Everything that is
used from them is checked here (a tensor's chunks must tile it, without overlap or gap), and in
`_dcp.tensors` against the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import product
from reprlib import repr as repr_of  # a short text of any value, however deep
from typing import Any, NamedTuple, cast

import torch

from polyak._lazy import TensorSpec
from polyak._ranks.shard_geometry import Box, whole
from polyak.checkpoints._torch_save import pickles
from polyak.checkpoints._torch_save.objects import DTYPES
from polyak.checkpoints._torch_save.pickles import Maker, Sealed, name_of

METADATA = ".metadata"
_MOST = 1 << 60
_DIMENSIONS = 8  # of a tensor in chunks: comparing corners takes 2^dimensions steps a chunk


class ChunkPlace(NamedTuple):
    """Where the bytes of an entry, or of one chunk of it, lie."""

    file: str
    start: int
    length: int


ChunkKey = tuple[Any, ...]
"""The name of an entry, and of a tensor's chunk the offsets behind it."""


class Described(NamedTuple):
    """The contents of the metadata: specs, chunks, names of objects, places, and how names were made."""

    specs: dict[str, TensorSpec]
    chunks: dict[str, list[Box]]
    objects: list[str]
    places: dict[ChunkKey, ChunkPlace]
    paths: dict[str, tuple[str | int, ...]]


def described(data: bytes) -> Described:
    """The metadata in a pickle; raises `ValueError` for what is not metadata."""
    value, _ = pickles.load(data, _KNOWN)
    top = _state(value, _Metadata, "the top")
    entries = _dictionary(top, "state_dict_metadata")
    specs: dict[str, TensorSpec] = {}
    chunks: dict[str, list[Box]] = {}
    for name, entry in entries.items():
        if type(name) is not str:
            raise ValueError(f"an entry is named {repr_of(name)}, wanted text")
        if type(entry) is not _Bytes:
            specs[name], chunks[name] = _tensor(name, entry)
    places = dict(map(_place, _dictionary(top, "storage_data").items()))
    objects = [name for name in entries if name not in specs]
    return Described(specs, chunks, objects, places, _paths(top.get("planner_data"), entries))


class _Fields(metaclass=Sealed):
    """An object of a dataclass: the fields that the pickle sets."""

    __slots__ = ("state",)
    name = ""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def _fields(name: str) -> type[_Fields]:
    """The class that is made in place of one of torch's."""
    made: Any = Sealed(name, (_Fields,), {"__slots__": (), "name": name})
    return cast("type[_Fields]", made)


_Metadata = _fields("Metadata")
_Tensor = _fields("TensorStorageMetadata")
_Bytes = _fields("BytesStorageMetadata")
_Properties = _fields("TensorProperties")
_Chunk = _fields("ChunkStorageMetadata")
_Index = _fields("MetadataIndex")
_StorageInfo = _fields("_StorageInfo")


def _state(value: object, kind: type[_Fields], where: object) -> dict[str, Any]:
    """The fields of an object of one kind."""
    if type(value) is kind:
        state = getattr(value, "state", None)
        if isinstance(state, dict):
            return state
    what = f"{kind.name} without fields" if type(value) is kind else name_of(value)
    raise ValueError(f"{where!s:.200} is a {what}, wanted a {kind.name}")


def _dictionary(state: Mapping[str, Any], name: str) -> dict[Any, Any]:
    value = state.get(name)
    if type(value) is pickles.Dictionary:
        return value
    raise ValueError(f"{name} is a {name_of(value)}, wanted a dictionary")


def _tensor(name: str, entry: object) -> tuple[TensorSpec, list[Box]]:
    state = _state(entry, _Tensor, name)
    dtype, chunks = _dtype(name, state.get("properties")), state.get("chunks")
    if type(chunks) is not list:
        raise ValueError(f"{name} is a tensor without a list of chunks")
    shape = _numbers(state.get("size"))
    return TensorSpec(shape, dtype), _filled(name, shape, [_box(name, chunk) for chunk in chunks])


def _dtype(name: str, properties: Any) -> torch.dtype:
    """From (dtype, layout, requires_grad, memory_format, pin_memory)."""
    state = properties.state if type(properties) is _Properties else None
    if type(state) is not tuple or len(state) < 2 or not isinstance(state[0], torch.dtype):
        raise ValueError(f"{name} is a tensor of an unknown dtype")
    if state[1] is not torch.strided:
        raise ValueError(f"{name} has a layout that is not torch.strided")
    return state[0]


def _box(name: str, chunk: object) -> Box:
    state = _state(chunk, _Chunk, name)
    return Box(_numbers(state.get("offsets")), _numbers(state.get("sizes")))


def _place(item: tuple[object, object]) -> tuple[ChunkKey, ChunkPlace]:
    index, info = item
    state = _state(index, _Index, "a key of storage_data")
    name = state.get("fqn")
    if type(name) is not str:
        raise ValueError(f"a key of storage_data is named {repr_of(name)}, wanted text")
    state, offsets = _state(info, _StorageInfo, name), state.get("offset")
    if extensions := state.get("transform_descriptors"):
        raise ValueError(
            f"{name} was written through {repr_of(extensions)}, which polyak does not read"
        )
    place = ChunkPlace(state["relative_path"], *_numbers((state["offset"], state["length"])))
    if type(place.file) is not str:
        raise ValueError(f"{name} lies in a file whose name is not text")
    return (name, *_numbers(() if offsets is None else offsets)), place


def _numbers(values: Any) -> tuple[int, ...]:
    if type(values) is tuple:
        for value in values:
            if type(value) is not int or not 0 <= value < _MOST:
                break
        else:
            return values
    raise ValueError(f"wanted sizes and offsets, got {repr_of(values)}")


def _paths(planned: object, names: Mapping[str, object]) -> dict[str, tuple[str | int, ...]]:
    """The notes of torch's planner: flat name -> the keys that it was made from."""
    if planned is not None and type(planned) is not pickles.Dictionary:
        raise ValueError(f"planner_data is a {name_of(planned)}, wanted a dictionary")
    noted: dict[Any, Any] = planned or {}
    paths = {name: noted.get(name, (name,)) for name in names}
    for path in paths.values():
        if type(path) is not tuple or not all(type(part) in (str, int) for part in path):
            raise ValueError(f"a name is made from {repr_of(path)}, wanted keys")
    return paths


def _filled(name: str, shape: tuple[int, ...], chunks: list[Box]) -> list[Box]:
    """The chunks that hold something; together they are the tensor exactly."""
    filled = [chunk for chunk in chunks if 0 not in chunk.shape]
    if not filled and 0 in shape:
        return []
    everything = whole(shape)
    if filled != [everything] and not _tiles(everything, filled):
        raise ValueError(
            f"{name}: {len(filled)} chunks do not tile the shape {shape}: there is an overlap "
            "or a gap, so a rank's part is missing"
        )
    return filled


def _tiles(outer: Box, chunks: list[Box]) -> bool:
    """Whether boxes fill a box exactly.

    Mostly they are slices along one dimension, which is checked in one pass. Otherwise their corners,
    with alternating signs, must cancel to those of the whole: a sum of boxes is known by the mixed
    differences at its corners.
    """
    dimensions = len(outer.shape)
    if dimensions > _DIMENSIONS or any(len(chunk.shape) != dimensions for chunk in chunks):
        return False
    for along in range(dimensions):
        if all(_is_slice(chunk, outer, along) for chunk in chunks):
            return _follow(outer, chunks, along)
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, chunk in [(-1, outer), *((1, chunk) for chunk in chunks)]:
        for picked in product((0, 1), repeat=dimensions):
            corner = tuple(o + n * p for o, n, p in zip(*chunk, picked, strict=True))
            corners[corner] += sign * (-1) ** sum(picked)
    return not any(corners.values())


def _is_slice(chunk: Box, outer: Box, along: int) -> bool:
    """Whether a box is as large as the whole in all dimensions but one."""
    offsets, shape = chunk
    after = along + 1
    return (
        shape[:along] == outer.shape[:along]
        and shape[after:] == outer.shape[after:]
        and offsets[:along] == outer.offsets[:along]
        and offsets[after:] == outer.offsets[after:]
    )


def _follow(outer: Box, slices: list[Box], along: int) -> bool:
    """Whether slices along a dimension follow each other from the beginning to the end."""
    place = outer.offsets[along]
    for start, size in sorted((offsets[along], shape[along]) for offsets, shape in slices):
        if start != place:
            return False
        place += size
    return place == outer.offsets[along] + outer.shape[along]


_MODULE = "torch.distributed.checkpoint"
_EARLIER = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.3
_KNOWN: dict[str, object] = {
    **DTYPES,
    f"{_MODULE}.metadata.Metadata": _Metadata,
    f"{_MODULE}.metadata.TensorStorageMetadata": _Tensor,
    f"{_MODULE}.metadata.TensorProperties": _Properties,
    f"{_MODULE}.metadata.ChunkStorageMetadata": _Chunk,
    f"{_MODULE}.metadata.BytesStorageMetadata": _Bytes,
    f"{_MODULE}.metadata.MetadataIndex": _Index,
    f"{_MODULE}.filesystem._StorageInfo": _StorageInfo,
    f"{_EARLIER}.TensorProperties": _Properties,
    "torch.Size": Maker("torch.Size", lambda numbers: numbers),
    "torch.serialization._get_layout": Maker(
        "layout", lambda name: torch.strided if name == "torch.strided" else None
    ),
}
