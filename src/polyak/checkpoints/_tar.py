"""Tar archives with weights in them, such as `.nemo`: a file of torch.save is read where it lies.

Headers are walked here: Python's `tarfile` may never end on a forged size.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from polyak.checkpoints._open_file import OpenFile
from polyak.checkpoints._torch_files import is_torch

_BLOCK = 512
_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin"}
_MOST = 10_000


class Member(NamedTuple):
    """A file within a tar archive."""

    file: OpenFile
    name: str
    start: int
    length: int


def span_of(opened: OpenFile | Member) -> tuple[OpenFile, int, int]:
    """The file, and where in it a file of torch.save begins and how long it is."""
    if isinstance(opened, OpenFile):
        return opened, 0, opened.size
    return opened.file, opened.start, opened.length


def is_tar(file: OpenFile) -> bool:
    """Whether a file is a tar archive."""
    return file.read(257, 5) == b"ustar" if file.size >= _BLOCK else False


def weights_within(file: OpenFile) -> Member:
    """The one file of torch.save in a tar archive.

    Raises `ValueError` that says what the archive holds, and what to do.
    """
    members = list(_members(file))
    found = [each for each in members if PurePosixPath(each.name).suffix in _SUFFIXES]
    found = [each for each in found if is_torch(file.read(each.start, 4))]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(each.name for each in (found or members)[:8]) or "nothing"
    holds = "several files of weights" if found else "no file of torch.save"
    raise ValueError(
        f"{file.path} is a tar archive with {holds} ({shown:.300}): unpack it (tar -xf), and read what "
        "holds the weights"
    )


def _members(file: OpenFile) -> Iterator[Member]:
    place = 0
    for _ in range(_MOST):
        block = file.read(place, _BLOCK) if place < file.size else b""
        if len(block) < _BLOCK or not any(block):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise ValueError(f"{file.path}: a damaged tar archive ({error})") from None
        start = place + _BLOCK
        if not 0 <= header.size <= file.size - start:
            raise ValueError(
                f"{file.path}: {header.name[:100]!r} of {header.size} bytes is cut short: the archive is "
                "damaged"
            )
        if header.isreg():
            yield Member(file, header.name, start, header.size)
        place = start + -(-header.size // _BLOCK) * _BLOCK
