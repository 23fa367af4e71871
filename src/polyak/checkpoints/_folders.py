"""Folders: what belongs together is saved together, and the newest complete save is found again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from polyak._files import writing_folder as saving
from polyak._ranks.agreement import chosen
from polyak.checkpoints._metadata import METADATA

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["latest", "saving"]

_FILE = re.compile(r"\.(safetensors|pt|pth|ckpt|bin)$")
_NUMBER = re.compile(r"(?<![\d.])\d+$")


def latest(folder: Path | str, group: ProcessGroup | None = None) -> Path | None:
    """The folder or checkpoint file within whose name ends in the largest number, or None.

    Files are those named `*.safetensors`, `.pt`, `.pth`, `.ckpt` or `.bin`. With `saving` a name is there only when its content is, so the newest is complete. A folder of
    torch.distributed.checkpoint that lacks its metadata, as one that a save of its own was killed
    in, is passed over, and so is an empty one. Of one number a folder comes before files.

    With a `group` it is collective: the first rank chooses, and all are told the same full path.

    >>> import tempfile
    >>> run = Path(tempfile.mkdtemp())
    >>> for step in (900, 1000):
    ...     with saving(run / f"step-{step}") as place:
    ...         _ = (place / "note").write_text("all of it")
    >>> latest(run).name
    'step-1000'
    """
    if group is not None:
        return chosen("latest", lambda: latest(Path(folder).absolute()), group)
    found = []
    for path in sorted(Path(folder).glob("*")):
        name = path.name if path.is_dir() else _FILE.sub("", path.name)
        number = _NUMBER.search(name)
        if number and not path.name.startswith(".") and _is_complete(path):
            found.append((int(number[0]), path.is_dir(), path))
    return max(found)[-1] if found else None


def _is_complete(path: Path) -> bool:
    """Whether it may be whole: a file as it is named, a folder that is neither empty nor torn."""
    if not path.is_dir():
        return path.is_file() and _FILE.search(path.name) is not None
    torn = any(path.glob("*.distcp")) and not (path / METADATA).exists()
    return any(path.iterdir()) and not torn
