"""Folders of torch.distributed.checkpoint, read in one process without a process group.

A folder holds what each rank wrote, as files of torch.save one behind the other, and a pickle
`.metadata` that says which chunk of which tensor lies where. That pickle is read as data (`pickles`),
and believed only where it fits the files: chunks must tile their tensors, without overlap or gap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak._engine.readout import NamedTensors
from polyak._ranks.shard_geometry import Box, whole
from polyak.checkpoints._loading import load_part, naming, require_beside
from polyak.checkpoints._mapped import Mapped
from polyak.checkpoints._metadata import METADATA, Place, described
from polyak.checkpoints._names import Renamed
from polyak.checkpoints._parts import Chunked
from polyak.checkpoints._tensorfile import Form, form

_DIMENSIONS = 8  # of a tensor in chunks: to compare them takes 2^dimensions steps a chunk


class DistributedTensors(NamedTensors):
    """The tensors of a folder of torch.distributed.checkpoint: flat name -> tensor, whole.

    A tensor is put together when it is asked for; one that a single rank wrote is a view of its
    file. `objects` are the entries that are no tensors, such as a count of steps, read when asked
    for. `forms` are the tensors' dtypes and shapes; `paths` tells of each flat name the keys that it
    was made from, outermost first, for objects as well.

    Raises `ValueError` naming the folder for metadata that asks for code or does not fit the files,
    later naming the file for a damaged chunk; `FileNotFoundError` for missing files.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder)
        with naming(str(self.path), "damaged metadata"):
            found = described(self.path / METADATA)
            self._places: dict[tuple[Any, ...], Place] = found["storage_data"]
            entries = found["state_dict_metadata"]
            tensors = {name: each for name, each in entries.items() if each is not None}
            self.forms = {name: each for name, (each, _) in tensors.items()}
            self.paths = _paths(found.get("planner_data"), entries)
            self._chunks = {n: _chunks(n, each.shape, held) for n, (each, held) in tensors.items()}
            self._require_places(entries)
        self.objects: Mapping[str, Any] = _Objects(
            [name for name in entries if name not in tensors], self._object
        )
        self._opened: dict[str, Mapped] = {}
        self._views: dict[tuple[Any, ...], Tensor] = {}

    @classmethod
    def at(cls, path: Path) -> tuple[DistributedTensors, str | None] | None:
        """The folder that a path names, with the key if it names one part of it; None for no such."""
        if (path / METADATA).exists():
            return cls(path), None
        within = (path.parent / METADATA).is_file() or any(path.parent.glob("*.distcp"))
        return (cls(path.parent), path.name) if within and not path.exists() else None

    def __getitem__(self, name: str) -> Tensor:
        held = self.unread(name)
        if isinstance(held, Tensor):
            return held
        tensor = held.whole()
        held.release()
        return tensor

    def unread(self, name: str) -> Tensor | Chunked:
        """A tensor, or one in several chunks, of which only those are read that are asked for."""
        chunks = self._chunks[name]
        if len(chunks) == 1:
            return self._chunk(name, chunks[0])
        return Chunked(
            self.forms[name],
            chunks,
            read=lambda chunk: self._chunk(name, chunk),
            release=lambda: self.release(name),
        )

    @property
    def known(self) -> Mapping[str, object]:
        return self.forms

    def parts(self) -> dict[str, Renamed]:
        """The tensors of each part of what was saved; those at its top lie under the empty key."""
        keys: dict[str, dict[str, str]] = {}
        for key in self:
            first, *rest = map(str, self.paths.get(key) or (key,))
            part, name = (first, ".".join(rest)) if rest else ("", first)
            keys.setdefault(part, {})[name] = key
        return {part: Renamed(self, within) for part, within in keys.items()}

    def release(self, name: str) -> None:
        """Gives back the pages that only this tensor has on them. What was written to is lost."""
        for chunk in self._chunks[name]:
            place = self._places[(name, *chunk.offsets)]
            self._file(place).release(place.start, place.start + place.length)

    def _chunk(self, name: str, chunk: Box) -> Tensor:
        """A chunk as a view of its file, compared with its checksum when it is first asked for."""
        key = (name, *chunk.offsets)
        if key not in self._views:
            place, wanted = self._places[key], Form(self.forms[name].dtype, chunk.shape)
            tensor = self._load(name, place)
            if not isinstance(tensor, Tensor) or form(tensor) != wanted:
                raise ValueError(f"{self.path / place.file}: {name} has a chunk of another form")
            self._views[key] = tensor
        return self._views[key]

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
            chunks = self._chunks.get(name, [Box((), ())])
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


def _chunks(name: str, shape: tuple[int, ...], chunks: list[Box]) -> list[Box]:
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

    They do where the corners, with alternating signs, cancel to those of the whole: a sum of boxes
    is known by the mixed differences at its corners.
    """
    dimensions = len(outer.shape)
    if dimensions > _DIMENSIONS or any(len(chunk.shape) != dimensions for chunk in chunks):
        return False
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, chunk in [(-1, outer), *((1, chunk) for chunk in chunks)]:
        for picked in product((0, 1), repeat=dimensions):
            corner = tuple(o + n * p for o, n, p in zip(*chunk, picked, strict=True))
            corners[corner] += sign * (-1) ** sum(picked)
    return not any(corners.values())


def _paths(planned: Any, names: Iterable[str]) -> dict[str, tuple[str | int, ...]]:
    """What the planner noted: the flat name -> the keys that it was made from."""
    noted = planned if isinstance(planned, dict) else {}
    paths = {name: noted.get(name, (name,)) for name in names}
    for path in paths.values():
        if type(path) is not tuple or not all(type(key) in (str, int) for key in path):
            raise ValueError(f"a name is made from {path!r:.100}, wanted keys")
    return paths
