"""A pytest plugin that takes away what Windows does not have: `pytest -p like_windows`.

There are no locks of files, no places in a file for reading and writing, no advice about memory and no
exchange of names. What is open cannot be renamed or removed, and a folder cannot be opened. No path
leads to an open file by its number.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from polyak import _files, _hold, _system, _unfinished
from polyak.checkpoints._open import handles as _handles
from polyak.checkpoints._safetensors import headers

_MISSING = {"preadv", "pread", "pwrite", "fchown", "fchmod", "chown", "register_at_fork", "O_CLOEXEC", "O_NONBLOCK"}  # fmt: skip


class _Os:
    """The module `os` as Windows has it."""

    def __getattr__(self, name: str) -> Any:
        if name in _MISSING:
            raise AttributeError(name)
        return getattr(os, name)

    def open(self, path: Any, *arguments: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return os.open(path, *arguments)


def _open_here() -> set[tuple[int, int]]:
    """Devices and inodes of the files that this process has open."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            status = descriptor.stat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            found.add((status.st_dev, status.st_ino))
    return found


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def refuses(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if keywords.get("dir_fd") is None and keywords.get("src_dir_fd") is None:
            paths = [
                Path(each) for each in (path, *arguments) if isinstance(each, str | os.PathLike)
            ]
            for each in (each for each in paths if each.is_file()):
                if (each.stat().st_dev, each.stat().st_ino) in _open_here():
                    raise PermissionError(13, "The file is in use", str(each))
        return function(path, *arguments, **keywords)

    return refuses


def _without_devices(function: Callable[..., Any]) -> Callable[..., Any]:
    def opens(path: str, **options: Any) -> Any:
        if path.startswith(("/dev/", "/proc/")):
            raise FileNotFoundError(2, "No such file or directory", path)
        return function(path, **options)

    return opens


def pytest_configure() -> None:
    """Takes it away in this process. Importing this module, as for its doctests, changes nothing."""
    _system.fcntl = None  # type: ignore[assignment,attr-defined]
    _system.resource = None  # type: ignore[assignment,attr-defined]
    _system._LINUX = False
    _system.WINDOWS = True
    for module in (_system, _unfinished, _files, _hold, _handles):
        module.os = _Os()  # type: ignore[attr-defined]
    for name in ("replace", "rename", "unlink", "remove"):
        setattr(os, name, _refusing(getattr(os, name)))
    headers.safe_open = _without_devices(headers.safe_open)  # type: ignore[assignment,attr-defined]
    rename = os.rename

    def rename_to_nothing(old: Any, new: Any, **keywords: Any) -> None:
        if os.path.lexists(new):
            raise FileExistsError(17, "The file exists", str(new))
        rename(old, new, **keywords)

    os.rename = rename_to_nothing  # type: ignore[assignment]
