"""Tar archives with weights in them, such as `.nemo`: they are read where they lie.

They hold a file of torch.save, or a folder of torch.distributed.checkpoint.

Headers are walked here: Python's `tarfile` may never end on a forged size.
"""

from __future__ import annotations

import re
import shlex
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from polyak.checkpoints._open.files import FilePart, OpenFile
from polyak.checkpoints._torch_save.files import is_torch

_BLOCK = 512
_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin"}
_MOST = 10_000
_MOST_EXTENDED = 1 << 20
_RANK = re.compile(r"(tp|pp|mp|tensor|pipeline|model_parallel)_?rank")


def is_tar(file: OpenFile) -> bool:
    """Whether a file is a tar archive."""
    return file.read(257, 5) == b"ustar" if file.size >= _BLOCK else False


def members_of(file: OpenFile) -> dict[str, FilePart]:
    """The files in a tar archive by name; of equal names the last, as `tar -x` has it.

    Raises `ValueError` for a damaged archive.
    """
    return {name.removeprefix("./"): member for name, member in _members(file)}


def folder_with(name: str, members: Mapping[str, FilePart]) -> dict[str, FilePart]:
    """The files in the only folder of an archive that has a file of this name; empty without one."""
    folders = {PurePosixPath(path).parent for path in members if PurePosixPath(path).name == name}
    if len(folders) != 1:
        return {}
    of_folder = folders.pop()
    paths = {path: PurePosixPath(path) for path in members}
    return {at.name: members[path] for path, at in paths.items() if at.parent == of_folder}


def weights_within(file: OpenFile, members: Mapping[str, FilePart]) -> FilePart:
    """The one file of torch.save in a tar archive.

    Raises `ValueError` that says what the archive holds, and what to do.
    """
    found = [name for name in members if PurePosixPath(name).suffix in _SUFFIXES]
    found = [name for name in found if is_torch(file.read(members[name].start, 4))]
    if len(found) == 1:
        return members[found[0]]
    shown = ", ".join((found or list(members))[:8]) or "nothing"
    holds = "several files of weights" if found else "no file of torch.save"
    place = shlex.quote(f"{file.path.with_suffix('')}-unpacked")
    what = "read what holds the weights"
    if {"pickle", "tensors", "storages"} <= members.keys():
        raise ValueError(
            f"{file.path} is a tar archive that torch.save of an early version wrote: load it with torch.load, "
            "and save it again"
        )
    if len(list(filter(_RANK.search, found))) > 1:
        what = "let NeMo merge the parts that its ranks wrote (megatron_change_num_partitions.py, to 1 x 1)"
    raise ValueError(
        f"{file.path} is a tar archive with {holds} ({shown:.300}): unpack it (mkdir -p {place} && tar -xf "
        f"{shlex.quote(str(file.path))} -C {place}), and {what}"
    )


def _members(file: OpenFile) -> Iterator[tuple[str, FilePart]]:
    place = 0
    extended: dict[str, str] = {}
    for _ in range(_MOST):
        block = file.read(place, _BLOCK) if place < file.size else b""
        if len(block) < _BLOCK or not any(block):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
            size = int(extended.get("size", header.size))
        except (tarfile.HeaderError, ValueError) as error:
            raise ValueError(f"{file.path}: a damaged tar archive ({error})") from None
        start, name = place + _BLOCK, extended.get("path", header.name)
        if not 0 <= size <= file.size - start:
            raise ValueError(
                f"{file.path}: {name[:100]!r} of {size} bytes is cut short: copy or fetch the archive again"
            )
        if header.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            extended |= _of_next(header.type, file.read(start, min(size, _MOST_EXTENDED)))
        else:
            extended = {}
        if header.isreg():
            yield name, FilePart(file, start, size)
        place = start + -(-size // _BLOCK) * _BLOCK


def _of_next(kind: bytes, content: bytes) -> dict[str, str]:
    """Read the size and the name that lie before a file of more than 8 GiB, or before one with a long name."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "replace")}
    return {
        key.decode(): value.decode("utf-8", "replace")
        for key, value in re.findall(rb"\d+ (size|path)=([^\n]*)\n", content)
    }
