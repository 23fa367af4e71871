"""Writing: weights into one safetensors file or a folder of them, laid out as Hugging Face does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from polyak import files
from polyak.checkpoints import tensorfile
from polyak.checkpoints.tensorfile import Form, Pieces
from polyak.checks import is_integer, require

_SUFFIX = ".safetensors"
_METADATA = {"format": "pt"}  # transformers takes no file without it
INDEX = "model.safetensors.index.json"


def write(
    out: Path | str,
    forms: Mapping[str, Form],
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
    _require_name(out, shard_bytes)
    told = _told(progress, sum(form.nbytes for form in forms.values()))
    if shard_bytes is None:
        tensorfile.write(out, forms, pieces, _METADATA, overwrite=overwrite, progress=told)
        return
    shards = _shards(forms, shard_bytes)
    with files.writing_folder(out, overwrite=overwrite) as folder:
        for file, names in shards.items():
            of_file = {name: forms[name] for name in names}
            tensorfile.write(folder / file, of_file, pieces, _METADATA, progress=told)
        (folder / INDEX).write_text(_index(forms, shards))


def _require_name(out: Path, shard_bytes: int | None) -> None:
    if shard_bytes is None:
        wanted = f"a name that ends in {_SUFFIX}, as it is such a file; or give shard_bytes"
        require(out.suffix == _SUFFIX, "out", str(out), wanted)
        return
    require(is_integer(shard_bytes, 1), "shard_bytes", shard_bytes, "an integer >= 1")
    wanted = f"a folder: with shard_bytes there are several {_SUFFIX} files"
    require(out.suffix != _SUFFIX, "out", str(out), wanted)


def _told(
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


def _shards(forms: Mapping[str, Form], most: int) -> dict[str, list[str]]:
    """File -> the names of its tensors, in their order."""
    shards: list[list[str]] = []
    room = 0
    for name, form in forms.items():
        if form.nbytes > room or not shards:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= form.nbytes
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": each for i, each in enumerate(shards, 1)}


def _index(forms: Mapping[str, Form], shards: Mapping[str, Iterable[str]]) -> str:
    index = {
        "metadata": {"total_size": sum(form.nbytes for form in forms.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    return json.dumps(index, indent=2) + "\n"
