"""Tensors spread over several files by an index, `model.safetensors.index.json` and the like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from polyak._lazy import Forwarding, LazyTensors, TensorSpec
from polyak.checkpoints._looks import looks, refusal
from polyak.checkpoints._open.files import OpenFile, Verified, all_verified, labelled, open_files
from polyak.checkpoints._safetensors.files import TensorFile, is_safetensors
from polyak.checkpoints._torch_save.files import StoredTensors, is_torch, load, verify
from polyak.checkpoints._torch_save.tensors import StoredTensor

_UNLISTED = "not in the index"
_INDEX_BYTES = 100_000_000  # the safetensors library's own limit for a header


class IndexedTensors(Forwarding):
    """The tensors of several files by an index.

    The index maps a tensor's name to the file beside it that holds it: safetensors, or a dictionary
    of torch.save. The headers are read when tensors are asked for. Tensors that a file holds and the
    index does not list are left out, as other readers of such folders do: `unread` has them, and tensors
    of a dtype that is not known here, with the reason. `files` are the names of the files.

    Raises `ValueError` that names the index if it is damaged or leads to files elsewhere; later
    for a file that lacks a tensor; `FileNotFoundError` for a missing file.
    """

    def __init__(self, index: OpenFile) -> None:
        self.path = index.path
        self._files = _index(index)
        with labelled(self.path, "a damaged index"):
            self._opened = open_files(self.path.parent, sorted(set(self._files.values())))
        self.files = {*self._files.values()}
        self._held: dict[str, LazyTensors] = {}

    @cached_property
    def unread(self) -> dict[str, str]:
        """Name of each tensor that cannot be read -> the reason."""
        found: dict[str, str] = {}
        for file in dict.fromkeys(self._files.values()):
            tensors = self._of_file(file)
            found |= tensors.unread if isinstance(tensors, TensorFile) else {}
            found |= {name: _UNLISTED for name in tensors if name not in self._files}
        return found

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: self._holder(name).specs[name] for name in self}

    def at(self, name: str) -> tuple[LazyTensors, str]:
        return self._holder(name), name

    def verify(self) -> Verified:
        """Compare all files with their checksums, if they have any."""
        files = [self._opened[name] for name in sorted(set(self._files.values()))]
        return all_verified(
            TensorFile(file).verify() if is_safetensors(file) else verify(file.whole)
            for file in files
        )

    @cached_property
    def _names(self) -> dict[str, None]:
        return dict.fromkeys(name for name in self._files if name not in self.unread)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _holder(self, name: str) -> LazyTensors:
        """The tensors of the file that has this one."""
        file = self._files[name]
        tensors = self._of_file(file)
        if name not in tensors:
            raise ValueError(
                f"{self.path}: it says that {name} is in {file}, which has no such tensor"
            )
        return tensors

    def _of_file(self, file: str) -> LazyTensors:
        if file not in self._held:
            self._held[file] = _tensors(self._opened[file])
        return self._held[file]


def _tensors(file: OpenFile) -> LazyTensors:
    """A file's tensors by name, whichever layout it has."""
    if is_safetensors(file):
        return TensorFile(file)
    if not is_torch(file.read(0, 4)):
        raise refusal(file)
    held = load(file.whole).value
    if not isinstance(held, dict) or not all(isinstance(t, StoredTensor) for t in held.values()):
        raise ValueError(f"{file.path}: wanted a dictionary name -> tensor")
    return StoredTensors(held)


def _index(file: OpenFile) -> dict[str, str]:
    """The name of each tensor -> the file that has it."""
    if file.size > _INDEX_BYTES:
        raise ValueError(f"{file.path}: an index of more than {_INDEX_BYTES} bytes")
    try:
        content = json.loads(file.read(0, file.size), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        said = f"it looks like {looks(file)}" if looks(file) else str(error)[:200]
        raise ValueError(f"{file.path}: the index cannot be read ({said})") from None
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f'{file.path}: not an index: wanted {{"weight_map": {{name: file}}}}')
    return files


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys are all different."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("an object has a key twice")
    return content
