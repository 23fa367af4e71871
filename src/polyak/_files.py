"""Files and folders that appear complete, or not at all.

Content is written under a hidden name beside its place, forced to the disk, and then renamed. A
process that is killed at any moment leaves the last complete file, or none, and its hidden file.
`_unfinished` says when that is removed.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from polyak import _system as system
from polyak._unfinished import beside, new_file, new_folder, remove, remove_abandoned

# Errors of a write, which name no file.
_UNNAMED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_SPECIAL = {
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
}  # fmt: skip


@contextmanager
def writing(path: Path | str, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Open a file to write that appears at `path` when the block ends, complete; or not at all.

    Until then its `name` is a hidden file in the same folder. Missing parent folders are made. Through
    a symbolic link the file that it points to is written. A file that is replaced passes its
    permissions on, and its owner as far as the process may do that.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "weights"
    >>> with writing(place) as file:
    ...     _ = file.write(b"all of it")
    ...     place.exists()
    False
    >>> place.read_bytes()
    b'all of it'

    The content is on the disk before the name is, and the name before this returns (fsync of the
    file, then of its folder). An exception within the block leaves everything as it was.

    Raises `FileExistsError` if `path` exists, unless `overwrite`; `OSError` if `path` is a folder, a
    device, a pipe or a socket, and if the system cannot write: the error names `path`.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    place, before = _target(path)
    if before is not None and stat.S_ISDIR(before.st_mode):
        raise IsADirectoryError(f"{path} is a folder, wanted the name of a file")
    part = beside(place, "part")
    # Others must not read the new content through a hidden file of wider permissions.
    opener = partial(new_file, mode=0o666 if before is None else 0o600)
    with making_folder(place.parent):
        remove_abandoned(place.parent)
        try:  # from before there is a file on: Ctrl-C may come at any moment
            with naming(path, part):
                with open(part, "w+b", opener=opener) as file:
                    yield file
                    file.flush()
                    _complete(file.fileno(), place, overwrite)
                    if not system.WINDOWS:  # locked until the hidden name is gone
                        _place(part, place, overwrite)
                if system.WINDOWS:
                    _place(part, place, overwrite)
                system.fsync(place.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def writing_folder(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to fill; it appears at `path` when the block ends, with all its files or not at all.

    Missing parent folders are made. With `overwrite` the old folder (or file) is removed when the new
    folder is complete; through a symbolic link, the folder that it points to is replaced. An
    exception within the block leaves everything as it was.

    Raises `FileExistsError` if `path` exists, unless `overwrite`; `OSError` if `path` is a device, a
    pipe or a socket, and if the system cannot write: the error names `path`.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    place, before = _target(path)
    part = beside(place, "part")
    with making_folder(place.parent):
        remove_abandoned(place.parent)
        try:
            with naming(path, part), new_folder(part) as handle:
                yield part
                for each in sorted(part.rglob("*"), reverse=True):
                    if not each.is_symlink() and (each.is_file() or each.is_dir()):
                        system.fsync(each)
                if handle is not None and before is not None and stat.S_ISDIR(before.st_mode):
                    _resemble(handle, place, before)
                system.fsync(part)
                _place_folder(part, place, overwrite)
                system.fsync(place.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@contextmanager
def making_folder(path: Path) -> Iterator[None]:
    """Make a folder and its parents; if the block raises, those that it made go again, if empty.

    Raises `NotADirectoryError` if a file, or a link to nothing, is in the way.
    """
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            kind = "a file" if path.exists() else "a link to nothing"
            message = f"{path} is {kind}, wanted a folder; choose another place"
            raise NotADirectoryError(message) from None
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise
    for folder in made:
        system.fsync(folder.parent)


@contextmanager
def naming(path: Path, part: Path | str) -> Iterator[None]:
    """Let the system's errors within the block name `path`, not the hidden `part`, or nothing."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if name is None and error.errno in _UNNAMED:
            name = str(part)
        if not isinstance(name, str) or not name.startswith(str(part)):
            raise
        name = f"{path}{name.removeprefix(str(part))}"
        raise OSError(error.errno, error.strerror, name) from error
    except RuntimeError as error:
        # torch.save hides the system's error behind one of its own, or has none for a full disk.
        hidden, full = error.__context__, errno.ENOSPC
        if isinstance(hidden, OSError) and hidden.errno in _UNNAMED:
            raise OSError(hidden.errno, hidden.strerror, str(path)) from error
        if os.path.lexists(part) and shutil.disk_usage(Path(part).parent).free == 0:
            raise OSError(full, os.strerror(full), str(path)) from error
        raise


def refuse_existing(path: Path | str, overwrite: bool) -> None:
    """Raise `FileExistsError` if a path exists, even as a link to nothing, unless `overwrite`."""
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{path} already exists; pass overwrite=True to replace it")


def _target(path: Path) -> tuple[Path, os.stat_result | None]:
    """Where a path leads through symbolic links, and what is there; None if there is nothing."""
    leads = path.is_symlink() or path.name in (
        "",
        "..",
    )  # "." and ".." have no name beside which to write
    try:
        there = path.stat()
    except FileNotFoundError:
        return Path(os.path.realpath(path)) if leads else path, None
    if kind := _SPECIAL.get(stat.S_IFMT(there.st_mode)):
        raise OSError(
            f"{path} is {kind}, and only files and folders are replaced; give another path"
        )
    if not leads:
        return path, there
    place = Path(os.path.realpath(path))
    return place, place.stat()  # an open file that was removed has a link in /proc, and no place


def _resemble(handle: int, place: Path, before: os.stat_result) -> None:
    """Give what is new the owner and the permissions of what it replaces, as far as that is allowed."""
    if not hasattr(os, "fchown"):  # Windows: what is new has the permissions of its folder
        return
    for owner in ((-1, before.st_gid), (before.st_uid, -1)):
        with suppress(OSError):
            os.fchown(handle, *owner)
    # First: where there is a list, the mode's group bits are its mask, and not the group's own.
    system.share_as(place, handle)
    with suppress(OSError):  # last, since a change of the owner clears some of them
        os.fchmod(handle, stat.S_IMODE(before.st_mode))


def _complete(handle: int, place: Path, overwrite: bool) -> None:
    """Force a file to the disk, like what it will replace."""
    if overwrite:
        _, before = _target(place)  # again: it may be something else by now
        if before is not None:
            _resemble(handle, place, before)
    os.fsync(handle)


def _place(part: Path, place: Path, overwrite: bool) -> None:
    """Give a file its name in one step, whatever other processes do at the same time."""
    if overwrite:
        part.replace(place)
    elif not _rename(part, place, system.NO_REPLACE):
        try:
            _place_new(part, place)
        except FileExistsError:
            raise _exists_by_now(place) from None


def _place_new(part: Path, place: Path) -> None:
    """Give a file a name that nothing has, where the system has no flag for that."""
    if system.WINDOWS:  # a renaming replaces nothing there
        part.rename(place)
        return
    try:
        place.hardlink_to(part)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(place):  # FAT has no step that does both
            raise FileExistsError from None
        part.rename(place)
        return
    part.unlink()


def _place_folder(part: Path, place: Path, overwrite: bool) -> None:
    """Give a folder its name; where the system cannot exchange two names, in two steps."""
    if overwrite and os.path.lexists(place):
        _target(place)
        if _rename(part, place, system.EXCHANGE):
            remove(part)
        else:
            _replace_in_two_steps(part, place)
        return
    try:
        if not _rename(part, place, system.NO_REPLACE):
            part.rename(place)
    except OSError as error:
        if not _is_in_the_way(error):
            raise
        if not overwrite:
            raise _exists_by_now(place) from None
        _place_folder(part, place, overwrite)  # another process was first: replace what it wrote


def _replace_in_two_steps(part: Path, place: Path) -> None:
    """A process that is killed in between leaves the old folder whole, under a hidden name."""
    while True:
        aside = beside(place, "old")
        with suppress(FileNotFoundError):  # another process may have put it aside
            place.rename(aside)
        try:
            part.rename(place)
        except OSError as error:
            if _is_in_the_way(error):  # what another process wrote since then is replaced too
                remove(aside)
                continue
            with suppress(FileNotFoundError):
                aside.rename(place)
            raise
        remove(aside)
        return


def _is_in_the_way(error: OSError) -> bool:
    return isinstance(error, FileExistsError) or error.errno == errno.ENOTEMPTY


def _rename(part: Path, place: Path, flag: int) -> bool:
    try:
        return system.renamed(part, place, flag)
    except FileExistsError:
        raise _exists_by_now(place) from None


def _exists_by_now(place: Path) -> FileExistsError:
    return FileExistsError(
        f"{place} was written by another process in the meantime; pass overwrite=True to replace it"
    )
