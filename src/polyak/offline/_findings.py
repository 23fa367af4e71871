"""Faults that make an average of files wrong, by tensor and file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch

from polyak._checks import difference, report
from polyak._lazy import LazyTensors, TensorSpec
from polyak.checkpoints._checkpoint import Weights
from polyak.offline._comparison import compare

_PIECE = 1 << 16  # elements that are examined at a time
_SAMPLED = 16  # tensors of a file that are compared first
_BEGINNING = 1024  # elements of each
_BYTES = "_extra_state"  # of a module, such as one of Transformer Engine
_VARIANCE = re.compile(r"(^|_)(var|variance|std)$")


class Source(NamedTuple):
    """Stored weights, and the label that messages use for them: usually the file.

    `left` is what else the file holds (`Checkpoint.unused`).
    """

    label: str
    weights: Weights
    left: Mapping[str, int] = {}


def require_alike(sources: Sequence[Source], of_files: Sequence[Mapping[str, TensorSpec]]) -> None:
    """Raises `ValueError` with the names, shapes and kinds of numbers in which a file differs."""
    wanted = {name: _described(name, spec) for name, spec in of_files[0].items()}
    for source, of_file in zip(sources, of_files, strict=True):
        got = {name: _described(name, spec) for name, spec in of_file.items()}
        if lines := difference(wanted, got):
            title = f"{source.label} is not of the same model as {sources[0].label}"
            raise ValueError(report(title, lines))
    if not wanted:
        raise ValueError(f"{sources[0].label} has no tensor to average")


def _described(name: str, spec: TensorSpec) -> str:
    """The kind of numbers and the shape; a pickle that a module keeps as bytes may have any length."""
    kind = _kind(spec.dtype)
    return kind if name.endswith(_BYTES) and kind == "integer" else f"{kind} {spec.shape}"


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point:
        return "floating-point"
    return "boolean" if dtype == torch.bool else "integer"


def left_in(sources: Iterable[Source]) -> dict[str, int]:
    """The other contents of the files, each with the largest number of tensors of a file."""
    left: dict[str, int] = {}
    for what, number in (item for source in sources for item in source.left.items()):
        left[what] = max(number, left.get(what, 0))
    return left


def nonfinite(sources: Sequence[Source], name: str) -> dict[str, int]:
    """The file -> how many values of a tensor in it are infinite or NaN.

    An infinity that all files have at the same place, as in a mask, does not count.
    """
    counts = [0] * len(sources)
    of_files = [source.weights.elements(name).pieces(_PIECE) for source in sources]
    for pieces in zip(*of_files, strict=True):
        shared = pieces[0].isinf()
        for piece in pieces[1:]:
            shared = shared & (piece == pieces[0])
        for i, piece in enumerate(pieces):
            counts[i] += int((~piece.isfinite() & ~shared).sum())
    return {source.label: n for source, n in zip(sources, counts, strict=True) if n}


def is_variance(name: str) -> bool:
    """Whether a name says that a tensor has no negative value."""
    return _VARIANCE.search(name.rpartition(".")[2]) is not None


def all_positive(sources: Sequence[Source], name: str) -> bool:
    """Whether no file has a negative value of a tensor."""
    of_files = [source.weights.elements(name).pieces(_PIECE) for source in sources]
    return not any(bool((piece < 0).any()) for piece in chain(*of_files))


def duplicates(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """The pairs of files that hold the same weights: the later one, and the first that equals it.

    All files are compared by samples. Only those whose samples are equal are read whole.
    """
    found: list[tuple[str, str]] = []
    by_sample: dict[bytes, list[Source]] = {}
    for source in sources:
        others = by_sample.setdefault(_sample(source.weights), [])
        same = next((other for other in others if _equal(source, other)), None)
        if same is None:
            others.append(source)
        else:
            found.append((source.label, same.label))
    return found


def _equal(a: Source, b: Source) -> bool:
    paths = Path(a.label), Path(b.label)
    one = all(path.exists() for path in paths) and paths[0].samefile(paths[1])
    return one or compare(a.weights, b.weights).equal


def _sample(weights: LazyTensors) -> bytes:
    """A digest of the beginnings of some tensors."""
    names = list(weights)
    digest = hashlib.sha256()
    for name in names[:: max(1, len(names) // _SAMPLED)]:
        for piece in islice(weights.elements(name).pieces(_BEGINNING), 1):
            digest.update(piece.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
