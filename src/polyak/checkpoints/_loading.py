"""Loading what others wrote: files of torch.save, and tensors spread over files by an index.

Nothing that a file says is believed before it is checked, and nothing in it is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak._engine.readout import NamedTensors
from polyak.checkpoints import _torchfile as torchfile
from polyak.checkpoints._mapped import Mapped, head, release
from polyak.checkpoints._tensorfile import Form, TensorFile, form, is_safetensors

__all__ = ["IndexedTensors", "load_pickle", "release"]

_INDEX_BYTES = 100_000_000  # the safetensors library's own limit for a header


def load_pickle(path: Path) -> Any:
    """What torch.save wrote into a file; its tensors are views of the file, on the CPU.

    It has dictionaries, lists, tuples, sets, numbers, text, dtypes and plain tensors: parameters
    are tensors, ordered dictionaries are dictionaries, and for a few classes of objects that trainers
    save beside weights there is an `Unread` (`torchtensors`). The zip layout is checked against its
    checksums; the layout of torch before 1.6 has none. Code in the pickle is never run.

    >>> import tempfile, torch
    >>> place = Path(tempfile.mkdtemp()) / "model.pt"
    >>> torch.save({"step": 3, "weights": torch.nn.Linear(2, 1).state_dict()}, place)
    >>> load_pickle(place)["weights"]["bias"].shape
    torch.Size([1])

    Raises `ValueError` naming the file: for one that asks for code, naming the class; that holds
    sparse, quantized or other strange tensors, naming the place; that is damaged, or claims more
    than it holds. Raises `OSError` where it cannot be opened.
    """
    path = Path(path)
    mapped = Mapped(path)
    return load_part(str(path), mapped, 0, mapped.size)


def load_part(label: str, mapped: Mapped, start: int, length: int) -> Any:
    """What torch.save wrote into this part of a file; errors begin with the label."""
    with naming(label, "a damaged file of torch.save"):
        return torchfile.load(mapped, start, length)


@contextmanager
def naming(label: str, damaged: str) -> Iterator[None]:
    """Errors within the block begin with the label; those of no plain words are of what is damaged."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{label}: {error}") from None
    except OSError:
        raise
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    except Exception as error:  # a file may be damaged in more ways than can be listed
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{label}: {damaged} ({what})") from None


class IndexedTensors(NamedTensors):
    """The tensors of several files by an index, `model.safetensors.index.json` and the like.

    The index maps a tensor's name to the file beside it that holds it: safetensors, or a dictionary
    of torch.save. A file is opened when the first of its tensors is asked for. Tensors that a file
    holds and the index does not list are left out, as other readers of such folders do.

    Raises `ValueError` naming the index for one that is damaged, or leads to files elsewhere; later
    for a file that lacks a tensor; `FileNotFoundError` for a missing file.
    """

    def __init__(self, index: Path | str) -> None:
        self.path = Path(index)
        content = _index(self.path)
        metadata = content.get("metadata")
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        self._files: dict[str, str] = content["weight_map"]
        self._opened: dict[str, Mapping[str, Tensor]] = {}
        with naming(str(self.path), "a damaged index"):
            for name in sorted(set(self._files.values())):
                require_beside(self.path.parent, name)

    @property
    def forms(self) -> dict[str, Form]:
        """The dtype and shape of every tensor; no content is read but that of pickles."""
        return {name: self._form(name) for name in self}

    def __getitem__(self, name: str) -> Tensor:
        return self._holder(name)[name]

    @property
    def known(self) -> Mapping[str, object]:
        return self._files

    def release(self, name: str) -> None:
        """Gives back the pages that only this tensor has on them. What was written to is lost."""
        release(self[name])

    def _form(self, name: str) -> Form:
        holder = self._holder(name)
        return holder.forms[name] if isinstance(holder, TensorFile) else form(holder[name])

    def _holder(self, name: str) -> Mapping[str, Tensor]:
        """The tensors of the file that has this one."""
        file = self._files[name]
        if file not in self._opened:
            self._opened[file] = _tensors(self.path.parent / file)
        if name not in self._opened[file]:
            raise ValueError(
                f"{self.path}: it says that {name} is in {file}, which has no such tensor"
            )
        return self._opened[file]


def require_beside(folder: Path, name: str) -> None:
    """Raises unless a name is that of a file in this folder.

    It may be a link within that folder, or to where the Hugging Face hub's cache keeps contents.
    """
    folder = folder.resolve()
    if Path(name).name != name or name == ".." or "\0" in name:
        raise ValueError(f"{name[:200]!r} is no name of a file")
    if not (folder / name).exists():
        raise FileNotFoundError(f"the file {name} is missing")
    leads = (folder / name).resolve().parent
    if leads != folder and not (
        folder.parent.name == "snapshots" and leads == folder.parents[1] / "blobs"
    ):
        raise ValueError(f"the file {name} is a link that leads out of the folder")


def _tensors(path: Path) -> Mapping[str, Tensor]:
    """A file's tensors by name, whichever layout it has."""
    if is_safetensors(path):
        return TensorFile(path)
    held = load_pickle(path)
    if not isinstance(held, dict) or not all(isinstance(each, Tensor) for each in held.values()):
        raise ValueError(f"{path}: wanted a dictionary name -> tensor")
    return held


def _index(path: Path) -> dict[str, Any]:
    """The index as data, its file names as strings."""
    text = head(path, _INDEX_BYTES + 1)
    if len(text) > _INDEX_BYTES:
        raise ValueError(f"{path}: an index of more than {_INDEX_BYTES} bytes")
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no readable index ({str(error)[:200]})") from None
    content = content if isinstance(content, dict) else {}
    files = content.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f'{path}: no index: wanted {{"weight_map": {{name: file}}}}')
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys are all different."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found
