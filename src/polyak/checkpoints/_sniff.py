"""Find out what is at a path, for every call that reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from polyak._checks import listed, prefixed
from polyak.checkpoints._dcp.metadata import METADATA
from polyak.checkpoints._dcp.tensors import DistributedTensors
from polyak.checkpoints._file_names import WHOLE, holder, is_beside
from polyak.checkpoints._indexed import IndexedTensors
from polyak.checkpoints._looks import looks, refusal
from polyak.checkpoints._open.files import FilePart, OpenFile, Verified
from polyak.checkpoints._safetensors.files import KEY, TensorFile, is_safetensors
from polyak.checkpoints._torch_save.files import is_torch, verify
from polyak.checkpoints._torch_save.tar import (
    folder_with,
    is_tar,
    members_of,
    weights_within,
)

Kind = Literal["polyak", "safetensors", "index", "torch", "dcp", "snapshots", "post-hoc"]
Opened = TensorFile | IndexedTensors | FilePart | DistributedTensors | None
_T = TypeVar("_T")

SNAPSHOT = re.compile(r"snapshot-\d+(\.safetensors)?")
"""A snapshot of `polyak.Recorder`."""
POST_HOC = re.compile(r"(\d+)\.(\d+)\.pt")
"""A snapshot of ema-pytorch's `PostHocEMA`."""
_TORCH = re.compile(r"\.(pt|pth|ckpt|bin)(\.tar)?$")
_SHARD = re.compile(r"\d+-of-(\d+)")
_SAVED = re.compile(r"\d$|^\.")  # folders of a run's checkpoints, and hidden ones
_TEXTS = {".json", ".yaml", ".yml", ".txt", ".md", ".py", ".csv", ".log"}
_ATTEMPTS = 5


class Source(NamedTuple):
    """An opened path, and which kind of file or folder it is.

    `polyak`, `safetensors`: a `TensorFile`; `index`: `IndexedTensors`; `torch`: a file of torch.save,
    which may lie in a tar archive; `dcp`: a folder of torch.distributed.checkpoint, or one within
    a tar archive, and `key` if the path names one part of it; `snapshots`, `post-hoc`: a folder of
    snapshots, not opened. Where `path` is a folder that holds one file of weights, that file is
    what was opened.
    """

    kind: Kind
    path: Path
    opened: Opened = None
    key: str | None = None

    def verify(self) -> Verified:
        """Compare all of the file or folder with its checksums; raises `ValueError` for damage."""
        if isinstance(self.opened, FilePart):
            return verify(self.opened)
        return Verified(0, 0) if self.opened is None else self.opened.verify()


def sniff(path: Path | str) -> Source:
    """Open a path, and find out which kind of file or folder it is.

    Raises `ValueError` for a file or folder that is not read here, saying what it looks like;
    `FileNotFoundError` if nothing is there; `OSError` if it cannot be opened.
    """
    path = Path(path)
    if (path / METADATA).exists():
        return Source("dcp", path, _steady(path, lambda: DistributedTensors(path)))
    if path.is_dir():
        return _folder(path)
    if not path.exists() and _is_distributed(path.parent):
        folder = _steady(path.parent, lambda: DistributedTensors(path.parent))
        return Source("dcp", path, folder, key=path.name)
    return _file(path)


def _is_distributed(folder: Path) -> bool:
    return (folder / METADATA).is_file() or any(folder.glob("*.distcp"))


def _file(path: Path) -> Source:
    if path.suffix == ".json":
        return Source("index", path, _steady(path.parent, lambda: IndexedTensors(OpenFile(path))))
    file = OpenFile(path)
    if is_safetensors(file):
        tensors = TensorFile(file)
        return Source("polyak" if KEY in tensors.metadata else "safetensors", path, tensors)
    if is_torch(file.read(0, 4)):
        return Source("torch", path, file.whole)
    if is_tar(file):
        members = members_of(file)
        if folder := folder_with(METADATA, members):
            return Source("dcp", path, DistributedTensors(path, folder))
        return Source("torch", path, weights_within(file, members))
    raise refusal(file)


def _folder(path: Path) -> Source:
    names = sorted(entry.name for entry in path.iterdir())
    if any(map(SNAPSHOT.fullmatch, names)):
        return Source("snapshots", path)
    if any(map(POST_HOC.fullmatch, names)):
        return Source("post-hoc", path)
    with prefixed(path):
        held = holder(path)
    if held is None:
        raise ValueError(f"{path} {_contents(path, names)}")
    if held != path:
        inner = sniff(held)
        return inner if inner.kind == "dcp" else inner._replace(path=path)
    for pattern in WHOLE:
        files = [file.name for file in sorted(path.glob(pattern))]
        if _are_shards(files):
            raise ValueError(
                f"{path} holds parts of one model ({listed(files)}) without their index: fetch or save it "
                "beside them (model.safetensors.index.json)"
            )
        if len(files) == 1:
            return _file(path / files[0])._replace(path=path)
        if files:
            raise ValueError(f"{path} holds {listed(files)}: read one of them")
    raise ValueError(f"{path} was replaced while it was read: read it again")


def _are_shards(names: list[str]) -> bool:
    """Whether files are parts of a model, as model-00001-of-00002.safetensors is; one may be alone."""
    numbers = [_SHARD.search(name) for name in names]
    return bool(numbers) and all(number and int(number[1]) > 1 for number in numbers)


def files_beside(source: Source) -> list[str]:
    """The files in a folder, and in the folders in it, that may hold weights and were not opened."""
    path, opened = source.path, source.opened
    if not path.is_dir() or isinstance(opened, (DistributedTensors, type(None))):
        return []
    if isinstance(opened, IndexedTensors):
        used = {path / name for name in opened.files}
    else:
        used = {opened.file.path if isinstance(opened, FilePart) else opened.path}
    inner = [each for each in _within(path) if each.is_dir() and not _SAVED.search(each.name)]
    files = [file for folder in (path, *inner) for file in _within(folder)]
    return [
        str(file.relative_to(path))
        for file in files
        if _may_hold_weights(file) and file not in used
    ]


def _within(folder: Path) -> list[Path]:
    """List a folder; empty if it may not be listed, or if another process replaces it meanwhile."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _may_hold_weights(file: Path) -> bool:
    named = file.suffix == ".safetensors" or _TORCH.search(file.name)
    return bool(named) and not is_beside(file) and file.is_file()


def _contents(path: Path, names: list[str]) -> str:
    """Describe a folder that holds no weights itself."""
    shown = ", ".join(names[:20]) or "nothing"
    folders = [path / name for name in names if (path / name).is_dir()]
    files = [path / name for name in names if _TORCH.search(name) and not is_beside(Path(name))]
    if any((folder / ".zarray").exists() for folder in folders):
        return "holds arrays of zarr, as Megatron once wrote: let it convert them to torch_dist"
    if "saved_model.pb" in names:
        return "is a SavedModel of TensorFlow: read it there, and save the weights as safetensors"
    if "_CHECKPOINT_METADATA" in names:
        return "is a checkpoint of Orbax (JAX): read it there, and save the weights as safetensors"
    if files:
        return f"is a folder that holds {shown}: read one of its files, such as {files[-1]}"
    if folders:
        return (
            f"is a folder of folders ({shown}) without weights of its own: read one of them, such as "
            f"{folders[-1]} (polyak.checkpoints.latest gives the last complete one)"
        )
    others = [path / name for name in names if Path(name).suffix not in _TEXTS]
    kinds = [(file.name, what) for file in others if (what := looks(OpenFile(file)))]
    kinds.sort(key=lambda each: each[1].startswith("text"))  # a text says least
    said = ": {} is {}".format(*kinds[0]) if kinds else ""
    return (
        f"holds no weights ({shown}){said}; wanted a folder of torch.distributed.checkpoint, or one with "
        "a file or an index of weights"
    )


def _steady(folder: Path, make: Callable[[], _T]) -> _T:
    """Call `make`, which opens files of a folder; repeat it if others replaced the folder meanwhile."""
    for attempt in range(_ATTEMPTS):
        before = _inode(folder)
        try:
            made = make()
        except FileNotFoundError:
            if attempt == _ATTEMPTS - 1 or _inode(folder) == before:
                raise
        else:
            if _inode(folder) == before:
                return made
    raise ValueError(
        f"{folder} was replaced again and again while it was read: read it again later"
    )


def _inode(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
