"""Folders of torch.distributed.checkpoint, read in one process without a process group.

A folder holds what each rank wrote, as files of torch.save one behind the other, and a pickle
`.metadata` that says which chunk of which tensor lies where. That pickle is read as data (`pickles`),
and believed only where it fits the files: chunks must tile their tensors, without overlap or gap.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.checkpoints import pickles
from polyak.checkpoints.loading import load_part, naming, require_beside
from polyak.checkpoints.mapped import Mapped
from polyak.checkpoints.meaning import Meaning
from polyak.checkpoints.pickles import Call
from polyak.checkpoints.tensorfile import Form
from polyak.checkpoints.torchtensors import DTYPES, layout, size
from polyak.reading import NamedTensors

METADATA = ".metadata"
_MOST = 1 << 60
_DIMENSIONS = 8  # of a tensor in chunks: to compare them takes 2^dimensions steps a chunk


class Chunk(NamedTuple):
    """A part of a tensor: where it begins and its shape."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class Place(NamedTuple):
    """Where the bytes of an entry lie."""

    file: str
    start: int
    length: int


class DistributedTensors(NamedTensors):
    """The tensors of a folder of torch.distributed.checkpoint: flat name -> tensor, whole.

    A tensor is put together when it is asked for; one that a single rank wrote is a view of its
    file. `objects` are the entries that are no tensors, such as a count of steps, read when asked
    for. `forms` are the tensors' dtypes and shapes; `paths` tells of each flat name the keys that it
    was made from, outermost first.

    Raises `ValueError` naming the folder for metadata that asks for code or does not fit the files,
    later naming the file for a damaged chunk; `FileNotFoundError` for missing files.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder)
        with naming(str(self.path), "damaged metadata"):
            described = _described(self.path / METADATA)
            self._places = described["storage_data"]
            entries = described["state_dict_metadata"]
            tensors = {name: each for name, each in entries.items() if each is not None}
            self.forms = {name: form for name, (form, _) in tensors.items()}
            self.paths = _paths(described.get("planner_data"), self.forms)
            self._chunks = {name: _chunks(name, *each) for name, each in tensors.items()}
            self._require_places(entries)
        self.objects: Mapping[str, Any] = _Objects(
            [name for name in entries if name not in tensors], self._object
        )
        self._opened: dict[str, Mapped] = {}

    def __getitem__(self, name: str) -> Tensor:
        chunks, form = self._chunks[name], self.forms[name]
        if len(chunks) == 1:
            return self._chunk(name, chunks[0])
        whole = torch.empty(form.shape, dtype=form.dtype)
        for chunk in chunks:
            ends = (start + size for start, size in zip(*chunk, strict=True))
            part = tuple(slice(*each) for each in zip(chunk.offsets, ends, strict=True))
            whole[part].copy_(self._chunk(name, chunk))
        self.release(name)
        return whole

    @property
    def known(self) -> Mapping[str, object]:
        return self.forms

    def release(self, name: str) -> None:
        """Gives back the pages that only this tensor has on them. What was written to is lost."""
        for chunk in self._chunks[name]:
            place = self._places[(name, *chunk.offsets)]
            self._file(place).release(place.start, place.start + place.length)

    def _chunk(self, name: str, chunk: Chunk) -> Tensor:
        place = self._places[(name, *chunk.offsets)]
        tensor = self._load(name, place)
        wanted = Form(self.forms[name].dtype, chunk.shape)
        if not isinstance(tensor, Tensor) or Form(tensor.dtype, tuple(tensor.shape)) != wanted:
            raise ValueError(f"{self.path / place.file}: {name} has a chunk of another form")
        return tensor

    def _object(self, name: str) -> Any:
        return self._load(name, self._places[(name,)])

    def _load(self, name: str, place: Place) -> Any:
        label = f"{self.path / place.file}: {name}"
        return load_part(label, self._file(place), place.start, place.length)

    def _file(self, place: Place) -> Mapped:
        if place.file not in self._opened:
            self._opened[place.file] = Mapped(self.path / place.file)
        return self._opened[place.file]

    def _require_places(self, entries: Mapping[str, Any]) -> None:
        """Every entry lies in a file of this folder, and no two lie over each other."""
        for name in entries:
            chunks = self._chunks.get(name, [Chunk((), ())])
            for chunk in chunks:
                if (name, *chunk.offsets) not in self._places:
                    raise ValueError(f"{name}: nothing says where it lies")
        by_file: dict[str, list[Place]] = {}
        for place in self._places.values():
            by_file.setdefault(place.file, []).append(place)
        for file, places in by_file.items():
            require_beside(self.path, file)
            _require_apart(places, (self.path / file).stat().st_size)
        for name, chunks in self._chunks.items():
            for chunk in chunks:
                nbytes = Form(self.forms[name].dtype, chunk.shape).nbytes
                if self._places[(name, *chunk.offsets)].length < nbytes:
                    raise ValueError(f"{name}: a chunk of {nbytes} bytes lies in fewer")


class _Objects(Mapping[str, Any]):
    """Entries that are read when asked for."""

    def __init__(self, names: list[str], read: Callable[[str], Any]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _require_apart(places: list[Place], size: int) -> None:
    """Entries lie within the file, one behind the other."""
    ordered = sorted(places, key=lambda place: place.start)
    for place in ordered:
        if place.start + place.length > size:
            raise ValueError(
                f"{place.file} has {size} bytes, {place} lies outside: it is cut short"
            )
    for first, second in pairwise(ordered):
        if first.start + first.length > second.start:
            raise ValueError(f"{place.file}: entries lie over each other ({first}, {second})")


def _chunks(name: str, form: Form, chunks: list[Chunk]) -> list[Chunk]:
    """The chunks that hold something; together they are the tensor exactly."""
    filled = [chunk for chunk in chunks if 0 not in chunk.shape]
    if not filled and 0 in form.shape:
        return []
    whole = Chunk((0,) * len(form.shape), form.shape)
    if filled != [whole] and not _tiles(whole, filled):
        raise ValueError(
            f"{name}: {len(filled)} chunks do not tile the shape {form.shape}: there is an overlap "
            "or a gap, so a rank's part is missing"
        )
    return filled


def _tiles(whole: Chunk, chunks: list[Chunk]) -> bool:
    """Whether boxes fill a box exactly.

    They do where the corners, with alternating signs, cancel to those of the whole: a sum of boxes
    is known by the mixed differences at its corners.
    """
    dimensions = len(whole.shape)
    if dimensions > _DIMENSIONS or any(len(chunk.shape) != dimensions for chunk in chunks):
        return False
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, chunk in [(-1, whole), *((1, chunk) for chunk in chunks)]:
        for picked in product((0, 1), repeat=dimensions):
            corner = tuple(o + n * p for o, n, p in zip(*chunk, picked, strict=True))
            corners[corner] += sign * (-1) ** sum(picked)
    return not any(corners.values())


def _described(path: Path) -> dict[str, Any]:
    """The metadata: entries and where they lie."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the folder's save was not finished, or it is no folder of "
            "torch.distributed.checkpoint"
        )
    mapped = Mapped(path)
    found = pickles.read(io.BytesIO(mapped.memory[:]), _KNOWN)
    described = Meaning(_MEANINGS, DTYPES, mapped.size)(found)
    if not isinstance(described, dict):
        raise ValueError(f"the metadata are a {type(described).__name__}")
    return described


def _paths(planned: Any, names: Iterable[str]) -> dict[str, tuple[str | int, ...]]:
    """What the planner noted: the flat name -> the keys that it was made from."""
    noted = planned if isinstance(planned, dict) else {}
    paths = {name: noted.get(name, (name,)) for name in names}
    for path in paths.values():
        if type(path) is not tuple or not all(type(key) in (str, int) for key in path):
            raise ValueError(f"a name is made from {path!r:.100}, wanted keys")
    return paths


def _state(call: Call, meaning: Meaning) -> dict[str, Any]:
    """The fields of a dataclass."""
    state = meaning(call.state)
    if not isinstance(state, dict):
        raise ValueError(f"{meaning.place}: a {call.name} without fields")
    return state


def _tensor(call: Call, meaning: Meaning) -> tuple[Form, list[Chunk]]:
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


def _chunk(call: Call, meaning: Meaning) -> Chunk:
    fields = _state(call, meaning)
    return Chunk(_numbers(fields["offsets"]), _numbers(fields["sizes"]))


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
