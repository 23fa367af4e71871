"""What is at a path: decided here once, for reading, loading, describing, averaging and exporting."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from polyak.checkpoints._dcp import DistributedTensors
from polyak.checkpoints._dcp_metadata import METADATA
from polyak.checkpoints._indexed import IndexedTensors
from polyak.checkpoints._looks import refusal
from polyak.checkpoints._open_file import OpenFile, Verified
from polyak.checkpoints._safetensor_files import KEY, TensorFile, is_safetensors
from polyak.checkpoints._tar import Member, is_tar, span_of, weights_within
from polyak.checkpoints._torch_files import is_torch, verify

Kind = Literal["polyak", "safetensors", "index", "torch", "dcp", "snapshots", "post-hoc"]
Opened = TensorFile | IndexedTensors | OpenFile | Member | DistributedTensors | None
_T = TypeVar("_T")

SNAPSHOT = re.compile(r"snapshot-\d+(\.safetensors)?")
"""A snapshot of `polyak.Recorder`."""
POST_HOC = re.compile(r"(\d+)\.(\d+)\.pt")
"""A snapshot of ema-pytorch's `PostHocEMA`."""
_WEIGHTS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*model*.bin")
_ATTEMPTS = 5


class Source(NamedTuple):
    """What is at a path, opened.

    `polyak`, `safetensors`: a `TensorFile`; `index`: `IndexedTensors`; `torch`: an `OpenFile` of
    torch.save, or one within a tar archive; `dcp`: a folder of torch.distributed.checkpoint, and `key`
    if the path names one part of it; `snapshots`, `post-hoc`: a folder of snapshots, not opened. Where
    `path` is a folder that holds one file of weights, that file is what was opened.
    """

    kind: Kind
    path: Path
    opened: Opened = None
    key: str | None = None

    def verify(self) -> Verified:
        """Compare all of the file or folder with its checksums; raises `ValueError` for damage."""
        if isinstance(self.opened, (OpenFile, Member)):
            return verify(*span_of(self.opened))
        return Verified(0, 0) if self.opened is None else self.opened.verify()


def sniff(path: Path | str) -> Source:
    """What is at a path.

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
        held = TensorFile(file)
        return Source("polyak" if KEY in held.metadata else "safetensors", path, held)
    if is_torch(file.read(0, 4)):
        return Source("torch", path, file)
    if is_tar(file):
        return Source("torch", path, weights_within(file))
    raise refusal(file)


def _folder(path: Path) -> Source:
    names = sorted(entry.name for entry in path.iterdir())
    if any(map(SNAPSHOT.fullmatch, names)):
        return Source("snapshots", path)
    if any(map(POST_HOC.fullmatch, names)):
        return Source("post-hoc", path)
    for pattern in _WEIGHTS:
        files = sorted(path.glob(pattern))
        if len(files) == 1:
            return _file(files[0])._replace(path=path)
        if files:
            listed = ", ".join(file.name for file in files)
            raise ValueError(
                f"{path} holds {listed}: read one of them, or save an index beside them"
            )
    raise ValueError(f"{path} {_contents(path, names)}")


def _contents(path: Path, names: list[str]) -> str:
    """What to say of a folder that holds no weights itself."""
    listed = ", ".join(names[:20]) or "nothing"
    files = [name for name in names if Path(name).suffix in (".pt", ".pth", ".ckpt", ".bin")]
    if files:
        return f"is a folder that holds {listed}: read one of its files, such as {path / files[-1]}"
    if any((path / name / METADATA).exists() or (path / name).is_dir() for name in names):
        return (
            f"is a folder of folders ({listed}) without weights of its own: read one of them, such as "
            f"{path / names[-1]} (polyak.checkpoints.latest gives the last complete one)"
        )
    return (
        f"holds no weights ({listed}); wanted a folder of torch.distributed.checkpoint, or one with a "
        "file or an index of weights"
    )


def _steady(folder: Path, make: Callable[[], _T]) -> _T:
    """What `make` opens in a folder, all of it from one state of the folder: others may replace it."""
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
    raise ValueError(f"{folder} is replaced again and again while it is read")


def _inode(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
