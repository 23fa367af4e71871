"""Write weights in the form of another checkpoint: only the bytes of its weights are replaced.

A copy of the file or folder is made, and each tensor is written where the old one lies in it. So nothing
in a pickle has to be understood or made again: nesting, counters, settings, states of optimizers and the
objects of unknown classes stay as they are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from polyak import _system as system
from polyak._checks import difference, report
from polyak._files import naming, writing, writing_folder
from polyak._lazy import LazyTensors, Place, TensorSpec, as_lazy, parts
from polyak._ranks.shard_geometry import Box, part_of
from polyak.checkpoints._checkpoint import Checkpoint
from polyak.checkpoints._dcp.metadata import METADATA
from polyak.checkpoints._open.files import FilePart, OpenFile
from polyak.checkpoints._read import read as read_checkpoint
from polyak.checkpoints._safetensors.files import content, is_safetensors
from polyak.checkpoints._safetensors.weights import totalled
from polyak.checkpoints._torch_save.checksums import renew_checksums
from polyak.checkpoints._torch_save.files import PartReader

Read = Callable[[Path], Checkpoint]

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|pkl|h5|msgpack|onnx)$")
_OF_TRAINING = re.compile(
    r"trainer_state\.json|.*\.distcp|latest|zero_to_fp32\.py|events\.out\..*|.*\.log|\..*"
)
_PIECE = 1 << 20
_SAFE = ".safetensors"


def write_like(
    out: Path | str,
    like: Path | str,
    weights: Mapping[str, Tensor],
    which: str | None = None,
    *,
    read: Read = read_checkpoint,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> list[str]:
    """Write weights in the form of another checkpoint, complete or not at all.

    `like` is a file of torch.save: then everything else in it stays, and torch.load gives the same
    objects with other weights. Or it is a file of safetensors, or a folder as Hugging Face writes: then
    its configurations, tokenizer and index are copied, and its weights are laid out in the same files.
    States of the training in a folder are left out; their names are returned. Or it is a folder of
    torch.distributed.checkpoint: then everything else in it stays. A tensor that shares memory with a weight
    in a file changes with it.

    `which` names the weights of `like` to replace, as in `Checkpoint.weights`. `read` reads `like`; by
    default it is `checkpoints.read`. One name of tied weights is enough. One piece of a tensor is in
    memory at a time. A tensor whose elements do not lie row by row in its storage, such as a transposed
    one, is in memory whole.

    >>> import tempfile
    >>> like = Path(tempfile.mkdtemp()) / "like.pt"
    >>> torch.save({"model": {"w": torch.zeros(2)}, "step": 5}, like)
    >>> write_like(like.with_name("new.pt"), like, {"w": torch.ones(2)})
    []
    >>> torch.load(like.with_name("new.pt"))
    {'model': {'w': tensor([1., 1.])}, 'step': 5}

    Raises `ValueError` for weights with other names, shapes or dtypes than those of `like`, for tied
    weights that differ, for a format whose weights cannot be replaced, and if one of `out` and `like` is
    safetensors by its name or content and the other is not; `FileExistsError` if `out`
    exists, unless `overwrite`; and what `read` raises.
    """
    out, like, lazy = Path(out), Path(like), as_lazy(weights)
    matched = _matched(read(like).weights(which), lazy, like)
    _require_suffix(out, like)
    if not like.is_dir():
        with writing(out, overwrite=overwrite) as file, like.open("rb") as source:
            shutil.copyfileobj(source, file, _PIECE)
            file.flush()
            _replace(Path(file.name), out, lazy, which, read, progress)
        return []
    files = {place.path.relative_to(like) for _, places in matched for place in places}
    with writing_folder(out, overwrite=overwrite) as folder:
        left = _copy(like, folder, files, Path())
        _replace(folder, out, lazy, which, read, progress)
    return left


def _require_suffix(out: Path, like: Path) -> None:
    """Raises `ValueError` if a name says that a file is safetensors and it is not, or the other way round."""
    named, safe = out.suffix == _SAFE, like.is_file() and is_safetensors(OpenFile(like))
    if out.suffix and named != safe and (named or like.is_file()):
        wanted = f"a name that ends in {_SAFE}" if safe else f"a name that does not end in {_SAFE}"
        raise ValueError(f"out is {str(out)!r}, wanted {wanted}: it has the form of {like}")


def _copy(like: Path, folder: Path, files: set[Path], at: Path) -> list[str]:
    """Copy what lies at a place in a folder and belongs to its weights; the names of the rest.

    In a folder of torch.distributed.checkpoint all belong together.
    """
    if (like / at / METADATA).exists():
        _copy_all(like / at, folder / at)
        return []
    left: list[str] = []
    modules = _modules(like / at)
    for path in sorted((like / at).iterdir()):
        here = path.relative_to(like)
        if any(here in file.parents for file in files):
            (folder / here).mkdir()
            left += _copy(like, folder, files, here)
        elif path.is_dir() and (path.name in modules or _is_beside(path)):
            (folder / here).mkdir()
            _copy_all(path, folder / here)
        elif path.is_file() and (here in files or _is_beside(path)):
            _copy_file(path, folder / here)
        else:
            left.append(str(here))
    return left


def _is_beside(path: Path) -> bool:
    """Whether a file, or all in a folder, is neither weights nor a state of the training: settings, a tokenizer."""
    if path.is_dir():
        return path.name[0] != "." and all(map(_is_beside, path.iterdir()))
    of_training = _WEIGHTS.search(path.name) or _OF_TRAINING.fullmatch(path.name)
    return path.is_file() and not of_training


def _modules(like: Path) -> set[str]:
    """The folders of a model of sentence-transformers, whose modules it lists."""
    try:
        modules = json.loads((like / "modules.json").read_text(encoding="utf-8"))
        return {str(module["path"]) for module in modules if module["path"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _copy_all(like: Path, folder: Path) -> None:
    """Copy all files and folders in a folder."""
    for path in sorted(like.iterdir()):
        if path.is_dir():
            (folder / path.name).mkdir()
            _copy_all(path, folder / path.name)
        else:
            _copy_file(path, folder / path.name)


def _copy_file(source: Path, copy: Path) -> None:
    """Copy a file's content; errors of writing do not name the source, as those of `shutil.copyfile` do."""
    with source.open("rb") as content, copy.open("xb") as file:
        shutil.copyfileobj(content, file, _PIECE)


def _replace(
    copy: Path,
    out: Path,
    weights: LazyTensors,
    which: str | None,
    read: Read,
    progress: Callable[[int, int], object] | None,
) -> None:
    """Write weights to their places in a copy, which has its own places read from it."""
    matched = _matched(read(copy).weights(which), weights, out)
    add = totalled(progress, sum(weights.specs[name].nbytes for name, _ in matched))
    changed: dict[tuple[Path, tuple[int, int] | None], list[Place]] = {}
    written: dict[tuple[Place, ...], str] = {}
    with naming(out, copy), ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for name, places in matched:
            for place in places:
                if place.path not in files:
                    files[place.path] = stack.enter_context(place.path.open("r+b"))
                changed.setdefault((place.path, place.archive), []).append(place)
            if places in written:
                _require_same(weights, written[places], name, out)
                continue
            _write(files, places, weights, name)
            written[places] = name
            if add is not None:
                add(weights.specs[name].nbytes)
        for (path, archive), places_of in changed.items():
            if archive is not None:
                renew_checksums(
                    files[path], PartReader(FilePart(OpenFile(path), *archive)), places_of
                )
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())


def _matched(
    held: LazyTensors, weights: LazyTensors, like: Path
) -> list[tuple[str, tuple[Place, ...]]]:
    """The name and the places of each tensor that has elements."""
    places = {name: held.places(name) for name, spec in held.specs.items() if spec.numel}
    if lost := [name for name, found in places.items() if not found]:
        raise ValueError(
            f"{like}: {lost[0]} is not stored as it is read, so it cannot be replaced there; wanted a file of "
            "torch.save or safetensors, or a folder of Hugging Face's or torch.distributed.checkpoint"
        )
    of_place = {places[name]: name for name in held if name in weights and places.get(name)}
    wanted = {name: str(spec) for name, spec in held.specs.items()}
    got = {name: str(spec) for name, spec in weights.specs.items()}
    tied = {name for name in wanted if name not in got and places.get(name) in of_place}
    more = got.keys() - wanted.keys()
    known = {weights.origins(name) for name in got if name in wanted} if more else set()
    doubled = {name for name in more if weights.origins(name) in known}
    wanted = {name: spec for name, spec in wanted.items() if name not in tied}
    got = {name: spec for name, spec in got.items() if name not in doubled}
    if lines := difference(wanted, got):
        raise ValueError(report(f"the weights are not those of {like}", lines))
    return [(name, places[name]) for name in wanted if name in places]


def _write(
    files: Mapping[Path, BinaryIO], places: tuple[Place, ...], weights: LazyTensors, name: str
) -> None:
    """Write a tensor into its storages: piece by piece, if in each the elements lie row by row.

    Each piece is a few boxes of indices (`parts`). What such a box has of a storage is without a gap in
    it, along whichever dimension the tensor is cut.
    """
    shape, dtype = weights.specs[name]
    boxes = {place: part_of(shape, place.where) for place in places}
    if not all(place.is_plain(TensorSpec(box.shape, dtype)) for place, box in boxes.items()):
        _write_parts(files, places, weights[name])
        return
    done = 0  # elements
    for flat in weights.pieces(name):
        for where in parts(shape, done, done + len(flat)):
            box = part_of(shape, where)
            part, flat = flat[: box.numel].view(box.shape), flat[box.numel :]
            done += box.numel
            for place, outer in boxes.items():
                _write_box(files[place.path], place, outer, box, part)


def _write_box(file: BinaryIO, place: Place, outer: Box, box: Box, part: Tensor) -> None:
    """Write the elements of a box of a tensor that lie in a place, which holds the box `outer`."""
    common = box.overlap(outer)
    if 0 not in common.shape:
        steps = zip(common.offsets, outer.offsets, place.stride, strict=True)
        first = place.offset + sum((start - begin) * step for start, begin, step in steps)
        start = place.start + first * part.element_size()
        system.write_at(file.fileno(), content(part[common.within(box)]), start)


def _write_parts(files: Mapping[Path, BinaryIO], places: tuple[Place, ...], tensor: Tensor) -> None:
    """Write the parts of a whole tensor into their storages; the rest of these stays."""
    for place in places:
        file, part = files[place.path], tensor[place.where] if place.where else tensor
        raw = bytearray(system.pread(file.fileno(), place.nbytes, place.start))
        storage = torch.frombuffer(raw, dtype=tensor.dtype)
        storage.as_strided(part.shape, place.stride, place.offset).copy_(part)
        system.write_at(file.fileno(), memoryview(raw), place.start)


def _require_same(weights: LazyTensors, one: str, other: str, out: Path) -> None:
    """Raises `ValueError` if two tensors differ that are one tensor in a file."""
    pairs = zip(weights.pieces(one), weights.pieces(other), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise ValueError(f"{out}: {one} and {other} are one tensor there, and the new ones differ")
