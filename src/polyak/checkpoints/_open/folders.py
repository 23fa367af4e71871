"""Files of one folder, opened together, so that all belong to the same save."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from polyak.checkpoints._open.files import OpenFile


class OpenFiles:
    """Files of a folder by name, opened at once. A folder that is replaced meanwhile is still read as it was.

    Raises `ValueError` for names that lead out of the folder, `FileNotFoundError` for a file that is
    missing.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._opened: dict[str, OpenFile] = {}
        for name in names:
            _require_beside(folder, name)
            self._opened[name] = OpenFile(folder / name)
        self.sizes = {name: file.size for name, file in self._opened.items()}
        self.starts = dict.fromkeys(self._opened, 0)

    def __getitem__(self, name: str) -> OpenFile:
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
