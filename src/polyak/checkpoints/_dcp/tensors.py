"""Folders of torch.distributed.checkpoint, read in one process without a process group.

A folder holds what each rank wrote, as files of torch.save one behind the other. A pickle,
`.metadata`, gives the place of each chunk of each tensor (`_dcp.metadata`). Metadata that do not
fit the files are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak._lazy import Elements, LazyTensors, Place, Renamed, TensorSpec, Where
from polyak._ranks.shard_geometry import Box, part_of, whole
from polyak.checkpoints._dcp.metadata import METADATA, ChunkKey, ChunkPlace, described
from polyak.checkpoints._looks import looks
from polyak.checkpoints._open.files import (
    FilePart,
    OpenFile,
    Verified,
    all_verified,
    labelled,
    open_files,
)
from polyak.checkpoints._torch_save.files import load, verify
from polyak.checkpoints._torch_save.pickles import no_collection
from polyak.checkpoints._torch_save.tensors import StoredTensor

_PICKLE = b"\x80"


class DistributedTensors(LazyTensors):
    """The tensors of a folder of torch.distributed.checkpoint: flat name -> tensor, whole.

    A tensor is put together when it is asked for; one that a single rank wrote is a view of its
    file. `objects` are the names of the entries that are not tensors, such as a count of steps.
    `chunks` are where a tensor's parts begin and their shapes. `paths` gives, for each flat name (of
    objects too), the keys that it was made from, outermost first. `archive` has the folder's files if
    they lie in a tar archive, whose path `folder` is then.

    Raises `ValueError` that names the folder if the metadata do not fit the files, and later names the
    file for a damaged chunk; `FileNotFoundError` for missing files.
    """

    def __init__(self, folder: Path | str, archive: Mapping[str, FilePart] | None = None) -> None:
        self.path = Path(folder)
        metadata = self.path / METADATA
        if archive is None and not metadata.exists():
            raise FileNotFoundError(
                f"{metadata} is missing: the folder's save was not finished, or it is not a folder "
                "of torch.distributed.checkpoint"
            )
        with labelled(self.path, "damaged metadata"), no_collection():
            file, start, length, _ = (
                OpenFile(metadata).whole if archive is None else archive[METADATA]
            )
            if file.read(start, 1) != _PICKLE:
                what = looks(file)
                raise ValueError(
                    f"{METADATA} {f'looks like {what}' if what else 'is not a pickle'}"
                )
            parsed = described(file.read(start, length))
            self._specs, self._places, self.paths = parsed.specs, parsed.places, parsed.paths
            self.chunks = parsed.chunks
            names = dict.fromkeys(place.file for place in parsed.places.values())
            self._files = _opened(self.path, names, archive)
            self._require_places(parsed.objects)
        self.objects = parsed.objects
        self._opened: dict[ChunkKey, StoredTensor] = {}

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self._specs

    def read(self, name: str, where: Where = ()) -> Tensor:
        """A tensor or a part of it; only those chunks are read that it lies in."""
        chunks = self.chunks[name]
        read = lambda chunk: self._chunk(name, chunk).read()  # noqa: E731
        part = chunks_part(self._specs[name], chunks, read, where)
        if len(chunks) > 1 and not where:  # it was copied
            self.release(name)
        return part

    def elements(self, name: str) -> Elements:
        chunks = self.chunks[name]
        alone = self._chunk(name, chunks[0]).elements() if len(chunks) == 1 else None
        return alone or super().elements(name)

    def release(self, name: str) -> None:
        for chunk in self.chunks[name]:
            if (name, *chunk.offsets) in self._opened:
                self._opened[name, *chunk.offsets].release()

    def places(self, name: str) -> tuple[Place, ...]:
        outer, found = whole(self._specs[name].shape), []
        for chunk in self.chunks[name]:
            place = self._chunk(name, chunk).place()
            if place is None:
                return ()
            ranges = tuple((part.start, part.stop) for part in chunk.within(outer))
            found.append(place._replace(ranges=ranges))
        return tuple(found)

    def verify(self) -> Verified:
        """Compare every entry with its checksum; raises `ValueError` that names a damaged one."""
        return all_verified(self._verify(name, at) for (name, *_), at in self._places.items())

    def parts(self) -> dict[str, Renamed]:
        """The tensors of each part of what was saved; those at its top lie under the empty key."""
        keys: dict[str, dict[str, tuple[LazyTensors, str]]] = {}
        for key in self:
            first, *rest = map(str, self.paths[key])
            part, name = (first, ".".join(rest)) if rest else ("", first)
            keys.setdefault(part, {})[name] = (self, key)
        return {part: Renamed(within) for part, within in keys.items()}

    def _chunk(self, name: str, chunk: Box) -> StoredTensor:
        """A chunk, whose part of its file is opened when it is first asked for."""
        key = (name, *chunk.offsets)
        if key not in self._opened:
            place, wanted = self._places[key], TensorSpec(chunk.shape, self._specs[name].dtype)
            stored = self._load(name, place)
            if not isinstance(stored, StoredTensor) or stored.spec != wanted:
                got = stored.spec if isinstance(stored, StoredTensor) else type(stored).__name__
                raise ValueError(
                    f"{self.path / place.file}: {name} has a chunk of another shape or dtype: {got}, wanted {wanted}"
                )
            self._opened[key] = stored
        return self._opened[key]

    def object_bytes(self, name: str) -> bytes:
        """The bytes of an entry that is not a tensor: a file of torch.save."""
        place = self._places[(name,)]
        self._verify(name, place)
        file, start, length, _ = self._part(name, place)
        return file.read(start, length)

    def _verify(self, name: str, place: ChunkPlace) -> Verified:
        return verify(self._part(name, place))

    def _part(self, name: str, place: ChunkPlace) -> FilePart:
        """Where an entry lies."""
        return self._files[place.file].part(place.start, place.length, f"{name}: ")

    def object(self, name: str) -> Any:
        """An entry that is not a tensor."""
        return self._load(name, self._places[(name,)])

    def _load(self, name: str, place: ChunkPlace) -> Any:
        return load(self._part(name, place)).value

    def _require_places(self, objects: Iterable[str]) -> None:
        """Every entry lies in a file of this folder, and no two lie over each other."""
        for name in objects:
            if (name,) not in self._places:
                raise ValueError(f"{name}: the metadata does not say where it is stored")
        for name, chunks in self.chunks.items():
            itemsize = self._specs[name].dtype.itemsize
            for chunk in chunks:
                place = self._places.get((name, *chunk.offsets))
                if place is None:
                    raise ValueError(f"{name}: the metadata does not say where it is stored")
                if place.length < chunk.numel * itemsize:
                    nbytes = chunk.numel * itemsize
                    raise ValueError(
                        f"{name}: a chunk of {nbytes} bytes has fewer bytes in its file"
                    )
        by_file: dict[str, list[tuple[int, int]]] = {}
        for file, start, length in self._places.values():
            by_file.setdefault(file, []).append((start, length))
        for file, places in by_file.items():
            _require_apart(file, sorted(places), self._files[file].length)


def _opened(
    folder: Path, names: Iterable[str], archive: Mapping[str, FilePart] | None
) -> dict[str, FilePart]:
    """Files of a folder, which may lie in an archive; raises `FileNotFoundError` for a missing one."""
    if archive is None:
        return {name: file.whole for name, file in open_files(folder, names).items()}
    if missing := [name for name in names if name not in archive]:
        raise FileNotFoundError(f"the file {missing[0][:200]} is missing in the archive")
    return {name: archive[name] for name in names}


def chunks_part(
    spec: TensorSpec, chunks: Iterable[Box], read: Callable[[Box], Tensor], where: Where
) -> Tensor:
    """A part of a tensor in chunks; `read(chunk)` gives one. It is a view if it lies in one chunk."""
    wanted = part_of(spec.shape, where)
    overlaps = ((chunk, chunk.overlap(wanted)) for chunk in chunks)
    met = [(chunk, common) for chunk, common in overlaps if 0 not in common.shape]
    if len(met) == 1:
        return read(met[0][0])[wanted.within(met[0][0])]
    out = torch.empty(wanted.shape, dtype=spec.dtype)
    for chunk, common in met:
        out[common.within(wanted)].copy_(read(chunk)[common.within(chunk)])
    return out


def _require_apart(file: str, places: list[tuple[int, int]], size: int) -> None:
    """Entries lie within the file, one behind the other."""
    for start, length in places:
        if start + length > size:
            raise ValueError(
                f"{file} has {size} bytes, an entry of {length} bytes at {start} ends beyond them: the file "
                "is cut short, so copy or fetch it again"
            )
    for (start, length), (following, _) in pairwise(places):
        if start + length > following:
            raise ValueError(f"{file}: entries overlap, at {start} and {following}")
