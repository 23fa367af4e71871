"""Save the files of a step together in one folder, and find the newest folder again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from polyak._checks import require, require_count
from polyak._files import writing_folder
from polyak._ranks.agreement import chosen
from polyak._unfinished import remove
from polyak.checkpoints._dcp.metadata import METADATA
from polyak.checkpoints._file_names import UNFINISHED

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["latest", "saving"]

_FILE = re.compile(r"\.(safetensors|pt|pth|ckpt|bin)$")
_PART = re.compile(rf"{_FILE.pattern}|\.distcp$|^{re.escape(METADATA)}$")
_NUMBER = re.compile(r"(?<![\d.])\d+$")


@contextmanager
def saving(path: Path | str, *, overwrite: bool = False, keep: int | None = None) -> Iterator[Path]:
    """Give a folder to fill; it appears at `path` when the block ends, with all its files or not at all.

    Missing parent folders are made. With `overwrite` the old folder (or file) is removed when the new
    folder is complete; through a symbolic link, the folder that it points to is replaced. An
    exception within the block leaves everything as it was.

    With `keep`, older folders are removed when the new one is complete. Of the folders beside it whose
    names differ only in the number at the end, those with the `keep` largest numbers stay.

    >>> import tempfile
    >>> run = Path(tempfile.mkdtemp())
    >>> for step in (8, 9, 10):
    ...     with saving(run / f"step-{step}", keep=2) as folder:
    ...         _ = (folder / "note").write_text("all of it")
    >>> sorted(each.name for each in run.iterdir())
    ['step-10', 'step-9']

    Raises `FileExistsError` if `path` exists, unless `overwrite`; `ValueError` if `keep` is not a positive
    integer, or the name has no number at its end; `OSError` if `path` is a device, a pipe or a socket, and
    if the system cannot write: the error names `path`.
    """
    path = Path(path)
    if keep is not None:
        require_count("keep", keep, "how many folders stay")
        wanted = 'a name with a number at its end, such as "step-1000"'
        require(
            _NUMBER.search(path.name) is not None, "saving with keep: the name", path.name, wanted
        )
    with writing_folder(path, overwrite=overwrite) as folder:
        yield folder
    if keep is not None:
        _remove_older(path, keep)


def _remove_older(path: Path, keep: int) -> None:
    """Remove folders named like this one but for the number, except the newest and this one."""
    alike: dict[int, Path] = {}
    for each in path.parent.iterdir():
        number = _NUMBER.search(each.name)
        same = _NUMBER.sub("", each.name) == _NUMBER.sub("", path.name)
        if number and same and each.is_dir() and not each.is_symlink():
            alike[int(number[0])] = each
    for older in [alike[number] for number in sorted(alike)[:-keep]]:
        if older != path:
            remove(older)


def latest(folder: Path | str, group: ProcessGroup | None = None) -> Path | None:
    """Find the newest checkpoint in a folder: the path whose name ends in the largest number, or None.

    Where no name ends in a number (`last.ckpt`, `best`), it is the one that was changed last. A checkpoint is
    a file named `*.safetensors`, `.pt`, `.pth`, `.ckpt` or `.bin`, or a folder: one whose name ends in a
    number, or that holds such a file or a part of torch.distributed.checkpoint. If a folder and a file have
    the same number, the folder is chosen.

    A folder of `saving` gets its name only when it is complete. An empty folder, and one of
    torch.distributed.checkpoint without its metadata, are interrupted saves: they are skipped, and a
    warning names those that are newer than the result.

    With a `group` it is collective: the first rank looks, and all ranks get the same absolute path.

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
    saves = sorted(filter(_is_save, Path(folder).glob("*")), key=_age)
    whole = [path for path in saves if _is_complete(path)]
    torn = saves[saves.index(whole[-1]) + 1 :] if whole else saves
    if torn:
        names = ", ".join(path.name for path in torn)
        warnings.warn(
            f"latest: skipped {names} in {folder}: the save was interrupted", stacklevel=2
        )
    return whole[-1] if whole else None


def _is_save(path: Path) -> bool:
    """Whether the name, or what a folder holds, says that it is a checkpoint."""
    if path.name.startswith(".") or not path.is_dir():
        return path.is_file() and _FILE.search(path.name) is not None
    if path.suffix in UNFINISHED:
        return False
    return _number(path) is not None or any(_PART.search(each.name) for each in path.iterdir())


def _age(path: Path) -> tuple[int, float, float, str]:
    """A key that sorts checkpoints, the newest last: first those without a number, by time."""
    number, changed, folder = _number(path), path.stat().st_mtime, path.is_dir()
    return (-1, changed, folder, path.name) if number is None else (number, folder, 0, path.name)


def _number(path: Path) -> int | None:
    """The number at the end of a checkpoint's name."""
    found = _NUMBER.search(path.name if path.is_dir() else _FILE.sub("", path.name))
    return int(found[0]) if found else None


def _is_complete(path: Path) -> bool:
    """Whether it may be whole: a file, or a folder that is neither empty nor torn."""
    if not path.is_dir():
        return True
    torn = any(path.glob("*.distcp")) and not (path / METADATA).exists()
    return any(path.iterdir()) and not torn
