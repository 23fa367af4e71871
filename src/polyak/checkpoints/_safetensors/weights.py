"""Files of weights, laid out as Hugging Face does: one safetensors file, or a folder of them with an index.

One process writes them (`write`), or the first rank begins them and all ranks fill them (`begun_files`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from polyak import _files as files
from polyak import _system as system
from polyak._checks import is_integer, require
from polyak._lazy import TensorSpec
from polyak._ranks.agreement import agree, chosen, together
from polyak.checkpoints._safetensors import files as tensorfile
from polyak.checkpoints._safetensors.files import FileLayout, Pieces, layout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SUFFIX = ".safetensors"
METADATA = {"format": "pt"}  # transformers takes no file without it
_INDEX = "model.safetensors.index.json"


def write(
    out: Path | str,
    specs: Mapping[str, TensorSpec],
    pieces: Pieces,
    *,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Write weights, complete or not at all: a file, or with `shard_bytes` a folder of files.

    The folder has `model-00001-of-0000N.safetensors` and so on, each with at most `shard_bytes` bytes
    of tensors (a larger tensor has a file of its own), and their index. `pieces(name)` gives a tensor's
    content; `progress` is called with the bytes written so far and the bytes in all.

    Raises `ValueError` if a file is not named `*.safetensors`, or a folder is; `FileExistsError` if the
    path exists, unless `overwrite`; `TypeError` for a dtype that safetensors does not have; `OSError` if
    it cannot be written.
    """
    out = Path(out)
    within = arranged(out, specs, shard_bytes)
    add = totalled(progress, sum(spec.nbytes for spec in specs.values()))
    if shard_bytes is None:
        tensorfile.write(out, specs, pieces, METADATA, overwrite=overwrite, progress=add)
        return
    with files.writing_folder(out, overwrite=overwrite) as folder:
        for file, of_file in within.items():
            tensorfile.write(folder / file, of_file, pieces, METADATA, progress=add)
        (folder / _INDEX).write_bytes(_index(within).encode())


def arranged(
    out: Path, specs: Mapping[str, TensorSpec], shard_bytes: int | None
) -> dict[str, dict[str, TensorSpec]]:
    """The name of each file -> the specs of its tensors. Raises `ValueError` as `write` does for `out`."""
    _require_name(out, shard_bytes)
    return {out.name: dict(specs)} if shard_bytes is None else _shards(specs, shard_bytes)


def totalled(
    progress: Callable[[int, int], object] | None, total: int
) -> Callable[[int], object] | None:
    """A function that takes the bytes of each piece and calls `progress` with the sum so far."""
    if progress is None:
        return None
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return add


class Begun(NamedTuple):
    """A hidden file that ranks fill, the path that it will have, and its layout."""

    path: str
    name: str
    layout: FileLayout


@contextmanager
def begun_files(
    call: str,
    out: Path,
    specs: Mapping[str, TensorSpec],
    agreed: Mapping[str, object],
    remedy: str,
    *,
    group: ProcessGroup | None,
    shard_bytes: int | None,
    overwrite: bool,
) -> Iterator[list[Begun]]:
    """Begin files for all ranks of a group to fill; they appear when the block ends on all of them.

    Collective. An error of the block must be raised on all ranks. `agreed` is name -> what must be equal on
    all ranks, the path and `shard_bytes` besides.

    Raises on all ranks: what `write` raises, and `ValueError` if ranks disagree.
    """
    with together(call, group):
        layouts = [layout(held, METADATA) for held in arranged(out, specs, shard_bytes).values()]
    # Before anything is written: ranks with other tensors would wait for messages that never come.
    options = {"path": str(out), "shard_bytes": shard_bytes, **agreed}
    agree(call, options, group, remedy)
    with ExitStack() as stack:
        paths = chosen(
            call, lambda: _begin(stack, out, specs, layouts, shard_bytes, overwrite), group
        )
        yield [Begun(*both, of_file) for both, of_file in zip(paths, layouts, strict=True)]
        with together(call, group):
            stack.close()


def _begin(
    stack: ExitStack,
    out: Path,
    specs: Mapping[str, TensorSpec],
    layouts: list[FileLayout],
    shard_bytes: int | None,
    overwrite: bool,
) -> list[tuple[str, str]]:
    """Make hidden files with their headers and sizes; each one's path, and the path that it will have."""
    out = out.absolute()  # other ranks may have another working folder
    if shard_bytes is None:
        file = stack.enter_context(files.writing(out, overwrite=overwrite))
        paths = [(file.name, str(out))]
    else:
        folder = stack.enter_context(files.writing_folder(out, overwrite=overwrite))
        within = arranged(out, specs, shard_bytes)
        paths = [(str(folder / name), str(out / name)) for name in within]
        (folder / _INDEX).write_bytes(_index(within).encode())
    for (path, name), of_file in zip(paths, layouts, strict=True):
        with files.naming(Path(name), path):
            Path(path).write_bytes(of_file.header)
            os.truncate(path, of_file.nbytes)
    return paths


class SharedFile:
    """A hidden file that is written at places; errors name the path that it will have."""

    def __init__(self, begun: Begun) -> None:
        self._begun = begun

    def __enter__(self) -> SharedFile:
        with self._naming():
            self._handle = os.open(self._begun.path, system.WRITE)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def write(self, data: memoryview, place: int) -> None:
        """Write all of the data at a place."""
        with self._naming():
            system.write_at(self._handle, data, place)

    def sync(self) -> None:
        """Force what was written to the disk."""
        with self._naming():
            os.fsync(self._handle)

    def _naming(self) -> AbstractContextManager[None]:
        return files.naming(Path(self._begun.name), self._begun.path)


def _index(within: Mapping[str, Mapping[str, TensorSpec]]) -> str:
    """The content of the index of a folder."""
    total = sum(spec.nbytes for of_file in within.values() for spec in of_file.values())
    file_of = {name: file for file, of_file in within.items() for name in of_file}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": file_of}, indent=2) + "\n"


def _require_name(out: Path, shard_bytes: int | None) -> None:
    if shard_bytes is None:
        wanted = (
            f"a name that ends in {_SUFFIX}; for a folder of files pass shard_bytes (--shard-size), for a file "
            "of torch.save use write_like (average --like FILE)"
        )
        require(out.suffix == _SUFFIX, "out", str(out), wanted)
        return
    require(is_integer(shard_bytes, 1), "shard_bytes", shard_bytes, "an integer >= 1")
    wanted = f"a folder: with shard_bytes there are several {_SUFFIX} files"
    require(out.suffix != _SUFFIX, "out", str(out), wanted)


def _shards(specs: Mapping[str, TensorSpec], most: int) -> dict[str, dict[str, TensorSpec]]:
    """File -> its tensors, in their order."""
    shards: list[dict[str, TensorSpec]] = []
    room = 0
    for name, spec in specs.items():
        if spec.nbytes > room or not shards:
            shards.append({})
            room = most
        shards[-1][name] = spec
        room -= spec.nbytes
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": each for i, each in enumerate(shards, 1)}
