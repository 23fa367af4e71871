"""Shared files: safetensors files that the first rank begins and all ranks fill."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import NamedTuple

from polyak import _files as files
from polyak._lazy import TensorSpec
from polyak.checkpoints._tensorfile import Layout
from polyak.checkpoints._writing import INDEX, index


class Begun(NamedTuple):
    """A hidden file that ranks fill, and the path that it will have."""

    path: str
    name: str


def begin(
    stack: ExitStack,
    out: Path,
    within: Mapping[str, Mapping[str, TensorSpec]],
    layouts: list[Layout],
    shard_bytes: int | None,
    overwrite: bool,
) -> list[Begun]:
    """Make hidden files with their headers and sizes, to be filled until the stack is closed."""
    out = out.absolute()  # other ranks may have another working folder
    if shard_bytes is None:
        file = stack.enter_context(files.writing(out, overwrite=overwrite))
        begun = [Begun(file.name, str(out))]
    else:
        folder = stack.enter_context(files.writing_folder(out, overwrite=overwrite))
        begun = [Begun(str(folder / name), str(out / name)) for name in within]
        (folder / INDEX).write_text(index(within))
    for each, of_file in zip(begun, layouts, strict=True):
        with files.naming(Path(each.name), each.path):
            Path(each.path).write_bytes(of_file.header)
            os.truncate(each.path, of_file.nbytes)
    return begun


class SharedFile:
    """A hidden file that is written at places; errors name the path that it will have."""

    def __init__(self, begun: Begun) -> None:
        self._begun = begun

    def __enter__(self) -> SharedFile:
        with self._naming():
            self._handle = os.open(self._begun.path, os.O_WRONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def write(self, data: memoryview, place: int) -> None:
        """Write all of the data at a place."""
        with self._naming():
            while data:
                count = os.pwrite(self._handle, data, place)
                data, place = data[count:], place + count

    def sync(self) -> None:
        """Force what was written to the disk."""
        with self._naming():
            os.fsync(self._handle)

    def _naming(self) -> AbstractContextManager[None]:
        return files.naming(Path(self._begun.name), self._begun.path)
