"""Files of one folder, opened together, so that all belong to the same save."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from polyak.checkpoints._open_file import OpenFile

_MOST_OPEN = 256  # a process may often have no more than 1024 files open


class OpenFiles:
    """Files of a folder by name. A folder that is replaced meanwhile is still read as it was.

    Up to 256 files are opened at once. The others are opened when needed; if one was replaced by
    then, that is an error. Raises `ValueError` for names that lead out of the folder,
    `FileNotFoundError` for a file that is missing.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._folder = folder
        self._opened: dict[str, OpenFile] = {}
        self._seen: dict[str, tuple[int, int]] = {}
        self.sizes: dict[str, int] = {}
        for name in names:
            _require_beside(folder, name)
            if len(self._opened) < _MOST_OPEN:
                self._opened[name] = OpenFile(folder / name)
                self.sizes[name] = self._opened[name].size
            else:
                status = (folder / name).stat()
                self._seen[name] = (status.st_dev, status.st_ino)
                self.sizes[name] = status.st_size

    def __getitem__(self, name: str) -> OpenFile:
        if name not in self._opened:
            file = OpenFile(self._folder / name)
            status = os.fstat(file.handle)
            if (status.st_dev, status.st_ino) != self._seen[name]:
                raise ValueError(f"{file.path}: the file was replaced while its folder was read")
            self._opened[name] = file
        return self._opened[name]


def _require_beside(folder: Path, name: str) -> None:
    """Raises unless a name is that of a file in this folder.

    It may be a link within that folder, or to where the Hugging Face hub's cache keeps contents.
    """
    folder = folder.resolve()
    if Path(name).name != name or name == ".." or "\0" in name:
        raise ValueError(f"{name[:200]!r} is not the name of a file in the folder")
    if not (folder / name).exists():
        raise FileNotFoundError(f"the file {name} is missing")
    leads = (folder / name).resolve().parent
    if leads != folder and not (
        folder.parent.name == "snapshots" and leads == folder.parents[1] / "blobs"
    ):
        raise ValueError(f"the file {name} is a link that leads out of the folder")
