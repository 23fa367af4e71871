"""Folders: what belongs together is saved together, and the newest complete save is found again."""

from __future__ import annotations

import re
from pathlib import Path

from polyak.files import writing_folder as saving

__all__ = ["latest", "saving"]


def latest(folder: Path | str) -> Path | None:
    """The file or folder within whose name ends in the largest number, or None where there is none.

    With `saving` a name is there only when its content is, so the newest is complete.

    >>> import tempfile
    >>> run = Path(tempfile.mkdtemp())
    >>> for step in (900, 1000):
    ...     with saving(run / f"step-{step}") as place:
    ...         _ = (place / "note").write_text("all of it")
    >>> latest(run).name
    'step-1000'
    """
    found = {}
    for path in Path(folder).glob("*"):
        if not path.name.startswith(".") and (number := re.search(r"(\d+)$", path.stem)):
            found[int(number[1])] = path
    return found[max(found)] if found else None
