"""Files: written beside their place, forced to the disk, then renamed: all there, or as before.

A process that is killed at any moment leaves the last complete file, or none. What it was writing
lies beside under a hidden name. The next write into that folder from the same host removes it, unless
it is still open: that is told by a lock, which other hosts may not see (a folder's, on NFS). What
another host left, or what lies where there are no locks, goes after a day, or stays.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
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
from typing import BinaryIO

_PART = re.compile(r"\..+\.([0-9a-f]{6})[0-9a-f]{10}\.part", re.DOTALL)
_HERE = sha256(socket.gethostname().encode()).hexdigest()[:6]
_DAY = 86_400.0
PATIENCE = 10.0
"""Seconds to wait for a folder that another process holds."""
_HELD: dict[tuple[int, int], int] = {}  # device and inode of a folder -> its handle
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_NO_REPLACE, _EXCHANGE = 1, 2  # flags of renameat2(2)


@contextmanager
def writing(path: Path | str, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` when the block ends, complete; or not at all.

    Its `name` is where it lies until then.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "weights"
    >>> with writing(place) as file:
    ...     _ = file.write(b"all of it")
    ...     place.exists()
    False
    >>> place.read_bytes()
    b'all of it'

    The content is on the disk before the name is, and the name before this returns (fsync of the
    file, then of its folder). Raises `FileExistsError` for a path that exists, unless `overwrite`;
    `OSError` where it cannot be written. An exception within the block leaves all as it was.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, wanted the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it")
    _remove_abandoned(path)
    part = _beside(path, "part")
    try:  # from before there is a file on: Ctrl-C may come at any moment
        with open(part, "w+b", opener=_new_file) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            _place(part, path, overwrite)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


@contextmanager
def writing_folder(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that appears at `path` when the block ends, with all its files; or not at all.

    Raises `FileExistsError` for a path that exists, unless `overwrite`: then the old folder goes
    when the new one is complete. An exception within the block leaves all as it was.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    _remove_abandoned(path)
    with making_folder(path.parent):
        part = _beside(path, "part")
        try:
            with _new_folder(part):
                yield part
                for each in sorted(part.rglob("*"), reverse=True):
                    _fsync(each)
                _fsync(part)
                _place_folder(part, path, overwrite)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    _fsync(path.parent)


@contextmanager
def making_folder(path: Path) -> Iterator[None]:
    """Makes a folder and its parents; if the block raises, those that it made go again, if empty.

    Raises `NotADirectoryError` where there is a file.
    """
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, wanted a folder; choose another place")
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def refuse_existing(path: Path | str, overwrite: bool) -> None:
    """Raises `FileExistsError` for a path that exists, a link to nothing too, unless `overwrite`."""
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{path} exists, and is not overwritten unless told")


def hold(folder: Path) -> bool:
    """Takes a folder for this process until it ends; False if another one of this host keeps it.

    What a killed process has forked (workers that load data) may have it some seconds longer, which
    is waited for. Where the file system has no locks, everyone is given it.
    """
    status = folder.stat()
    if (place := (status.st_dev, status.st_ino)) in _HELD:
        return True
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    deadline = time.monotonic() + PATIENCE
    while not _try_lock(handle):
        if time.monotonic() > deadline:
            os.close(handle)
            return False
        time.sleep(0.1)
    _HELD[place] = handle
    return True


def _try_lock(handle: int) -> bool:
    """Whether a folder is locked now, as far as there are locks; the handle is closed on any error."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(handle)
            raise
    return True


def _new_file(part: str, flags: int) -> int:
    """The handle of a new hidden file, locked."""
    while True:
        handle = os.open(part, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if _lock(handle):
            return handle


@contextmanager
def _new_folder(part: Path) -> Iterator[None]:
    """A new hidden folder, locked."""
    while True:
        part.mkdir()
        with suppress(FileNotFoundError):
            handle = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
            if _lock(handle):
                break
    try:
        yield
    finally:
        os.close(handle)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{_HERE}{secrets.token_hex(5)}.{suffix}")


def _lock(handle: int) -> bool:
    """Locks what is new; False if another process took it for abandoned before it was locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(handle)
            raise
    if os.fstat(handle).st_nlink:
        return True
    os.close(handle)
    return False


def _remove_abandoned(path: Path) -> None:
    """Removes what killed processes left beside, under any name: it may never be written again.

    What is open, in whatever process of this host, is locked.
    """
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        if found := _PART.fullmatch(left.name):
            with suppress(OSError):
                if found[1] == _HERE or time.time() - left.lstat().st_mtime > _DAY:
                    with _locked(left):
                        _remove(left)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock of a file or folder; raises `BlockingIOError` where someone has it."""
    mode = (
        os.O_RDONLY if path.is_dir() else os.O_RDWR
    )  # NFS locks a file for those who may write it
    handle = os.open(path, mode | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _place(part: Path, path: Path, overwrite: bool) -> None:
    """Gives a file its name: in one step, whatever others do at the same time."""
    if overwrite:
        part.replace(path)
        return
    try:
        path.hardlink_to(part)
    except FileExistsError:
        raise FileExistsError(f"{path} exists by now, and is not overwritten") from None
    part.unlink()


def _place_folder(part: Path, path: Path, overwrite: bool) -> None:
    """Gives a folder its name; where the system cannot exchange two names, in two steps."""
    if overwrite and os.path.lexists(path):
        old = part if _rename(part, path, _EXCHANGE) else _put_aside(part, path)
        _remove(old)
    elif not _rename(part, path, _NO_REPLACE):
        part.rename(path)


def _put_aside(part: Path, path: Path) -> Path:
    """Where the old folder is now: a process killed in between leaves it there, whole."""
    aside = _beside(path, "old")
    path.rename(aside)
    part.rename(path)
    return aside


def _rename(part: Path, path: Path, flag: int) -> bool:
    """renameat2(2): to exchange two names, or never to replace one; False where there is none."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here = -100  # AT_FDCWD
    if rename is None:
        return False
    if rename(here, os.fsencode(part), here, os.fsencode(path), flag) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    if error == errno.EEXIST:
        raise FileExistsError(f"{path} exists by now, and is not overwritten")
    raise OSError(error, os.strerror(error), str(path))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
