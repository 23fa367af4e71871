"""One set of weights from several checkpoint files, by a rule or by coefficients."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy.typing as npt
import torch

from polyak._checks import named, require
from polyak.checkpoints._checkpoint import Checkpoint
from polyak.checkpoints._read import read
from polyak.checkpoints._unfit import unfit
from polyak.offline._coefficients import require_list
from polyak.offline._combination import Combination
from polyak.offline._comparison import of_one_model
from polyak.offline._findings import Source
from polyak.rules import Rule
from polyak.theory._profiles import Profile, coefficients


def average(
    files: Sequence[os.PathLike[str] | str | Checkpoint],
    rule: Rule | str | Sequence[float] | Profile = "uniform()",
    *,
    elapsed: Sequence[float] | None = None,
    which: str | None = None,
    copy: Sequence[str] = (),
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    accumulate: torch.dtype = torch.float32,
    allow_nonfinite: bool = True,
) -> Combination:
    """Average checkpoint files: `sum of coefficient * weights`, each file being one update.

    All files must have the same names and shapes. Only headers are read before a tensor is asked for.

    >>> import tempfile
    >>> from safetensors.torch import load_file, save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> paths = [folder / f"{i}.safetensors" for i in range(3)]
    >>> for i, path in enumerate(paths):
    ...     save_file({"w": torch.full((2,), float(i))}, path)
    >>> average(paths)["w"], average(paths, "exponential(0.5)").coefficients
    (tensor([1., 1.]), array([0.25, 0.25, 0.5 ]))
    >>> average(paths, [0.5, 0.0, 0.5]).write(folder / "mean.safetensors")
    >>> load_file(folder / "mean.safetensors")
    {'w': tensor([1., 1.])}

    Args:
        files: in any formats that `polyak.checkpoints.read` reads, the oldest first; those that `choose`
            found in a run; or what was read, such as `[read(path, key="g_ema") for path in paths]`.
        rule: a rule or its spec, with the coefficients `theory.coefficients(rule, elapsed)`; or
            coefficients of any sign with sum 1, such as `theory.wsm`, `theory.qam` or those of a
            soup. Running statistics have no coefficient below 0: with a rule they have
            `theory.coefficients(rule, elapsed, convex=True)`, else `max(c, 0) / sum of max(c, 0)`.
        elapsed: the time between a file and the file before it, in the rule's unit; by default 1.
        which: the weights to take from each file: the name of an average, or "live"; by default the
            live weights, or the only average of a file without live weights.
        copy: names of tensors, or patterns, to take from the last file, as integers and booleans are.
        dtype: the dtype of the result, or of each tensor by name; by default the widest in the files.
        accumulate: the dtype of the sums: float32, or float64 at half the speed.
        allow_nonfinite: whether values that are infinite or NaN in some file may come into the result. An
            infinity that all files share is always allowed.

    Raises `ValueError` for an empty list; for files that differ in names, shapes or kinds of numbers,
    with the differences; for a file without `which`, or with several averages to choose from; for
    coefficients that do not sum to 1 within 1e-6, or are not one per file; for `elapsed` together with
    coefficients. Raises `OSError` and `ValueError` for files that cannot be read.
    Source: model soups (arXiv 2203.05482), LAWA (arXiv 2209.14981), WSM (arXiv 2507.17634).
    """
    require_list("files", files, "file")
    shares, statistics = shares_of(rule, len(files), elapsed)
    sources = opened(files, which, copy)
    return Combination(
        sources,
        shares,
        copy=matching(copy, sources),
        dtype=dtype,
        accumulate=accumulate,
        statistics=statistics,
        allow_nonfinite=allow_nonfinite,
    )


def opened(
    files: Sequence[os.PathLike[str] | str | Checkpoint],
    which: str | None,
    copy: Sequence[str] = (),
) -> list[Source]:
    """The weights called `which` of each file (`Checkpoint.weights`), with the file as label.

    Raises `ValueError` for weights that have no average, but for those that `copy` names.
    """
    sources = [
        _source(f if isinstance(f, Checkpoint) else read(Path(f)), which, copy) for f in files
    ]
    alike = of_one_model(*(source.weights for source in sources))
    return [source._replace(weights=each) for source, each in zip(sources, alike, strict=True)]


def _source(found: Checkpoint, which: str | None, copy: Sequence[str]) -> Source:
    weights = found.weights(which)
    copied = {name for pattern in copy for name in named(pattern, weights.specs)}
    averaged = {name: spec for name, spec in weights.specs.items() if name not in copied}
    if problem := unfit(averaged, found.shapes):
        raise ValueError(f"{found.path}: {problem}")
    return Source(str(found.path), weights, found.unused(which))


def matching(patterns: Sequence[str], sources: Sequence[Source]) -> set[str]:
    """The names of the tensors that patterns mean; raises `ValueError` for a pattern without one."""
    names, meant = sources[-1].weights.specs, set[str]()
    for pattern in patterns:
        found = named(pattern, names)
        wanted = f"a tensor's name or a pattern of names, such as {', '.join(list(names)[:5])}"
        require(bool(found), "copy", pattern, wanted)
        meant.update(found)
    return meant


def shares_of(
    rule: Rule | str | Sequence[float] | Profile, files: int, elapsed: Sequence[float] | None
) -> tuple[npt.ArrayLike, npt.ArrayLike | None]:
    """The coefficients of weights, and those of running statistics if a rule gives them."""
    if not isinstance(rule, (Rule, str)):
        require(
            elapsed is None,
            "elapsed",
            elapsed,
            "no elapsed times: a rule uses them, and coefficients were given",
        )
        return rule, None
    times = [1.0] * files if elapsed is None else elapsed
    if len(times) != files:
        raise ValueError(f"elapsed has {len(times)} times, wanted {files}: one for each file")
    return coefficients(rule, times), coefficients(rule, times, convex=True)
