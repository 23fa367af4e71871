"""Hidden files and folders, in which a process writes what is not finished.

A process that is killed leaves its hidden file. The next write into that folder from the same host
removes it, unless a process still has it open. A lock shows that. Another host may not see the lock
(on NFS a folder's lock is local), so what another host left is removed after a day. Where a file
system has no locks, it stays.

Windows has no locks of folders. What a killed process left of a folder is removed there after a day.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from polyak import _system as system

_PART = re.compile(r"\..+\.([0-9a-f]{6})[0-9a-f]{10}\.part", re.DOTALL)
_HERE = sha256(socket.gethostname().encode()).hexdigest()[:6]
_DAY = 86_400.0
_NAME_BYTES = 100  # of the place's name in a hidden name, so that this fits wherever that does


def new_file(part: str, flags: int, *, mode: int) -> int:
    """The handle of a new hidden file, locked."""
    while True:
        handle = os.open(part, flags | system.NEW, mode)
        if _is_kept(handle, part):
            return handle


@contextmanager
def new_folder(part: Path) -> Iterator[int | None]:
    """The handle of a new hidden folder, locked; None where folders have none."""
    if system.WINDOWS:
        part.mkdir()
        yield None
        return
    while True:
        part.mkdir()
        with suppress(FileNotFoundError):
            handle = os.open(part, system.READ)
            if _is_kept(handle, part):
                break
    try:
        yield handle
    finally:
        os.close(handle)


def _is_kept(handle: int, part: str | Path) -> bool:
    """Lock what is new; False if another process took it for abandoned before it was locked."""
    try:
        system.locked(handle, wait=True)
        kept = _is_at(handle, part)
    except BaseException:
        os.close(handle)
        raise
    if not kept:
        os.close(handle)
    return kept


def _is_at(handle: int, path: str | Path) -> bool:
    """Whether a path still leads to what is open: who waits for its lock may get it too late."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def beside(path: Path, suffix: str) -> Path:
    """A hidden name in the same folder, never longer than the file system allows."""
    name = os.fsencode(path.name)[:_NAME_BYTES].decode(errors="ignore")
    return path.with_name(f".{name}.{_HERE}{secrets.token_hex(5)}.{suffix}")


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left in a folder, under any name: it may never be written again.

    What a process of this host has open is locked, and stays.
    """
    with suppress(PermissionError):  # a folder may be open for writing only
        for left in list(folder.iterdir()):
            if named := _PART.fullmatch(left.name):
                with suppress(OSError):
                    if _may_be_abandoned(left, named[1]):
                        _remove_unlocked(left)


def _may_be_abandoned(path: Path, host: str) -> bool:
    """Whether a lock can tell if a process still writes this, or else it is older than a day."""
    lock_tells = host == _HERE and not (system.WINDOWS and path.is_dir())
    return lock_tells or time.time() - path.lstat().st_mtime > _DAY


def _remove_unlocked(path: Path) -> None:
    """Remove a file or folder, unless it is locked; raises `OSError` where the system has no locks."""
    if system.WINDOWS:  # the system refuses to remove what is open
        remove(path)
        return
    # NFS locks a file only for a process that may write it.
    handle = os.open(path, system.READ if path.is_dir() else system.READ_WRITE)
    try:
        # Another may have removed it since it was opened, and its writer may have made it anew.
        if system.locked(handle, missing=False) and _is_at(handle, path):
            remove(path)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove as much as possible: another process may be doing the same, and what is left goes later."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
