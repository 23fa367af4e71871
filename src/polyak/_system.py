"""Operations that systems do in different ways: locks, places in a file, mapped memory, names.

Linux has all of it. macOS has no exchange of two names. Windows has no locks of folders, no `pread`,
and it neither renames nor removes what is open. Each name here works everywhere, as well as it can.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from bisect import bisect
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]

_CLOSED_IN_CHILDREN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0)
# Windows would change line ends without O_BINARY.
READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | _CLOSED_IN_CHILDREN
WRITE = os.O_WRONLY | getattr(os, "O_BINARY", 0) | _CLOSED_IN_CHILDREN
READ_WRITE = os.O_RDWR | getattr(os, "O_BINARY", 0) | _CLOSED_IN_CHILDREN
NEW = os.O_CREAT | os.O_EXCL | _CLOSED_IN_CHILDREN
AT_ONCE = getattr(os, "O_NONBLOCK", 0)
"""Does not wait for the other end of a pipe."""
WINDOWS = os.name == "nt"
"""There, what is open can be neither renamed nor removed, and a folder cannot be opened at all."""

NO_REPLACE, EXCHANGE = 1, 2  # flags of renameat2(2)
_HERE = -100  # AT_FDCWD
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_LINUX = sys.platform == "linux"
_ACCESS = "system.posix_acl_access"
_MOST_OPEN_FILES = 512  # of Windows' C library
_one_position = threading.Lock()


def locked(handle: int, *, wait: bool = False, missing: bool = True) -> bool:
    """Lock an open file or folder; whether it is locked now. Where there are no locks: `missing`."""
    if fcntl is None:
        return missing
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return missing
    return True


class Claim:
    """A file or folder that one process uses alone: after `take`, until `close` or its own end.

    The lock is on the file or folder. Where the system has no such locks, it is on a file beside it,
    which has its name and `.lock`.
    """

    def __init__(self, path: Path) -> None:
        self._handle: int | None = None
        self._beside: Any = None
        if fcntl is not None:
            self._handle = os.open(path, READ)
        else:
            import filelock

            self._beside = filelock.FileLock(f"{path}.lock")
        self.status = path.stat() if self._handle is None else os.fstat(self._handle)

    def take(self) -> bool:
        """Whether it is this process's now. Where a file system has no locks, it always is."""
        if self._handle is not None:
            return locked(self._handle)
        try:
            self._beside.acquire(blocking=False)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Let go of it, and never hold it again."""
        if self._handle is not None:
            os.close(self._handle)
        else:
            self._beside.release()


def read_at(handle: int, content: memoryview, start: int) -> int:
    """Fill `content` with the bytes from `start` on; returns how many there were at once."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, [content], start)
    with _one_position:
        os.lseek(handle, start, os.SEEK_SET)
        data = os.read(handle, len(content))
    content[: len(data)] = data
    return len(data)


def pread(handle: int, length: int, start: int) -> bytes:
    """At most `length` bytes from `start` on."""
    content = bytearray(length)
    return bytes(content[: read_at(handle, memoryview(content), start)])


def write_at(handle: int, content: memoryview, start: int) -> None:
    """Write all of `content` from `start` on."""
    while content:
        count = _written_at(handle, content, start)
        content, start = content[count:], start + count


def _written_at(handle: int, content: memoryview, start: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(handle, content, start)
    with _one_position:
        os.lseek(handle, start, os.SEEK_SET)
        return os.write(handle, content)


def path_of(handle: int, path: Path) -> str:
    """A path that leads to an open file, for libraries that open it again.

    Under its own path there may be another file by now; on Windows, where no open file is renamed
    or removed, it is the same one.
    """
    return str(path) if WINDOWS else f"/dev/fd/{handle}"


def most_open_files() -> int:
    """How many files this process may have open."""
    if resource is None:
        return _MOST_OPEN_FILES
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def renamed(old: Path, new: Path, flag: int) -> bool:
    """renameat2(2): exchange two names, or never replace one; False where the system cannot.

    Raises `FileExistsError` if `NO_REPLACE` finds something at `new`.
    """
    if not _LINUX:
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(old), _HERE, os.fsencode(new), flag) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(new))


def shared(addresses: Sequence[int]) -> list[bool] | None:
    """Whether processes that are forked write to the same memory there; None where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_bytes().splitlines()
    except OSError:
        return None
    fields = [line.split(maxsplit=2) for line in lines]
    ends = [place.split(b"-") for place, flags, _ in fields if flags[3:] == b"s"]
    ranges = [range(int(start, 16), int(stop, 16)) for start, stop in ends]  # in order
    starts = [each.start for each in ranges]
    return [any(a in each for each in ranges[bisect(starts, a) - 1 :][:1]) for a in addresses]


def share_as(place: Path, handle: int) -> None:
    """Give an open file or folder the access control list of another, or none, where there are such lists."""
    if not (hasattr(os, "getxattr") and hasattr(os, "setxattr")):
        return
    try:
        os.setxattr(handle, _ACCESS, os.getxattr(place, _ACCESS))
    except OSError as error:
        if error.errno == errno.ENODATA:  # the folder may have given a list to what is new in it
            with suppress(OSError):
                os.removexattr(handle, _ACCESS)


def flush_c_streams() -> None:
    """Empty the buffers of the C library's streams."""
    library = ctypes.CDLL("ucrtbase" if os.name == "nt" else None)
    library.fflush(None)


def fsync(path: Path) -> None:
    """Force a file or folder to the disk, where the file system can do that for it."""
    try:
        # Windows forces only what is open for writing to the disk, and opens no folder.
        handle = os.open(path, READ_WRITE if WINDOWS else READ)
    except PermissionError:  # a folder may be open for writing only
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no fsync of folders
            raise
    finally:
        os.close(handle)
