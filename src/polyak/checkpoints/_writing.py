"""Writing: weights into one safetensors file or a folder of them, laid out as Hugging Face does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from polyak import _files as files
from polyak._checks import require, require_count
from polyak._lazy import TensorSpec
from polyak.checkpoints import _tensorfile as tensorfile
from polyak.checkpoints._tensorfile import Pieces

_SUFFIX = ".safetensors"
METADATA = {"format": "pt"}  # transformers takes no file without it
INDEX = "model.safetensors.index.json"


def write(
    out: Path | str,
    specs: Mapping[str, TensorSpec],
    pieces: Pieces,
    *,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Writes weights, complete or not at all: a file, or with `shard_bytes` a folder of files.

    The folder has `model-00001-of-0000N.safetensors`, each with at most so many bytes of tensors
    (a larger tensor has a file of its own), and an index of them. `pieces(name)` gives a tensor's
    content; `progress` is told how many bytes are written, and of how many.

    Raises `ValueError` for a file not named `*.safetensors`, or a folder that is; `FileExistsError`
    for what exists, unless `overwrite`; `TypeError` for a dtype that safetensors does not have.
    """
    out = Path(out)
    within = arranged(out, specs, shard_bytes)
    told = totalled(progress, sum(form.nbytes for form in specs.values()))
    if shard_bytes is None:
        tensorfile.write(out, specs, pieces, METADATA, overwrite=overwrite, progress=told)
        return
    with files.writing_folder(out, overwrite=overwrite) as folder:
        for file, held in within.items():
            tensorfile.write(folder / file, held, pieces, METADATA, progress=told)
        (folder / INDEX).write_text(index(within))


def arranged(
    out: Path, specs: Mapping[str, TensorSpec], shard_bytes: int | None
) -> dict[str, dict[str, TensorSpec]]:
    """Which tensors which file holds: its name -> their specs. Raises as `write` does for `out`."""
    _require_name(out, shard_bytes)
    return {out.name: dict(specs)} if shard_bytes is None else _shards(specs, shard_bytes)


def index(within: Mapping[str, Mapping[str, TensorSpec]]) -> str:
    """What the index of a folder of files says."""
    held = {"total_size": sum(form.nbytes for file in within.values() for form in file.values())}
    files_of = {name: file for file, specs in within.items() for name in specs}
    return json.dumps({"metadata": held, "weight_map": files_of}, indent=2) + "\n"


def totalled(
    progress: Callable[[int, int], object] | None, total: int
) -> Callable[[int], object] | None:
    """Progress by pieces as progress in all."""
    if progress is None:
        return None
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return add


def _require_name(out: Path, shard_bytes: int | None) -> None:
    if shard_bytes is None:
        wanted = f"a name that ends in {_SUFFIX}, as it is such a file; or give shard_bytes"
        require(out.suffix == _SUFFIX, "out", str(out), wanted)
        return
    require_count("shard_bytes", shard_bytes)
    wanted = f"a folder: with shard_bytes there are several {_SUFFIX} files"
    require(out.suffix != _SUFFIX, "out", str(out), wanted)


def _shards(specs: Mapping[str, TensorSpec], most: int) -> dict[str, dict[str, TensorSpec]]:
    """File -> its tensors, in their order."""
    shards: list[dict[str, TensorSpec]] = []
    room = 0
    for name, form in specs.items():
        if form.nbytes > room or not shards:
            shards.append({})
            room = most
        shards[-1][name] = form
        room -= form.nbytes
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": each for i, each in enumerate(shards, 1)}
