"""Combining: linear combinations of stored weights, computed piece by piece when they are asked for.

Of every tensor as much is in memory as one piece, and of every file as much as the processor's cache
holds: models may be larger than the memory, and files may be many.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyak import norms
from polyak._checks import difference, report, require
from polyak._engine.readout import NamedTensors
from polyak.checkpoints import _mapped as mapped
from polyak.checkpoints import _writing as writing
from polyak.checkpoints._checkpoint import Weights
from polyak.checkpoints._parts import Chunked, unread
from polyak.checkpoints._tensorfile import Form, forms
from polyak.offline import _dividing as dividing
from polyak.offline._summing import Summation, Term, Threads

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SLACK = 1e-6  # how far the sum of coefficients that are typed in may be from 1


class Source(NamedTuple):
    """Stored weights, and what messages call them: the file, as a rule."""

    label: str
    weights: Weights


class Combination(NamedTensors):
    """`sum of coefficient * weights` over files of one model, tensor by tensor when asked for.

    `mean["head.weight"]` computes a tensor, `model.load_state_dict(mean)` all of them; `write` puts
    them into a file and never holds one whole. Floating-point and complex tensors are combined;
    integers and booleans have no mean, so they are those of the last file, as are those in `copy`.

    The sum is `out <- lerp(out, weights, coefficient / sum of coefficients so far)`, positive
    coefficients first: weights that all files share come out as they are. It is made in
    `accumulate`, or in float64 for weights of float64; files whose coefficient is 0 are not read.

    `dtype` is that of the result, or of each tensor by name; by default the last file's.

    Attributes:
        coefficients: one for each file; float64, shape (files,), sum 1.
        forms: name -> dtype and shape of the result.
        copied: the names of the tensors that are those of the last file.
        norms: the norms whose running statistics were combined; those of the combined weights are
            others, so estimate them anew (`polyak.recalibrate`).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        coefficients: npt.ArrayLike,
        *,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        accumulate: torch.dtype = torch.float32,
        copy: Collection[str] = (),
    ) -> None:
        wanted = "torch.float32 or torch.float64"
        require(accumulate in (torch.float32, torch.float64), "accumulate", accumulate, wanted)
        holds = not isinstance(dtype, torch.dtype) or dtype.is_floating_point
        require(holds, "dtype", dtype, "a floating-point dtype, or None for that of the files")
        self.coefficients = _checked(coefficients, len(sources))
        found = [forms(source.weights) for source in sources]
        _require_alike(sources, found)
        last = found[-1]
        self.copied = [n for n, each in last.items() if n in copy or not _has_mean(each.dtype)]
        self.norms = norms.statistics(last)
        given = dtype if isinstance(dtype, Mapping) else dict.fromkeys(last, dtype)
        self.forms = {
            n: Form(_as(given.get(n), each.dtype), each.shape) for n, each in last.items()
        }
        self._sums = {
            name: _sum_dtype([accumulate, self.forms[name].dtype, *(f[name].dtype for f in found)])
            for name in last
        }
        self._told = {
            f"file {i + 1}": f"{float(coefficient)!r} of {source.label}"
            for i, (coefficient, source) in enumerate(zip(self.coefficients, sources, strict=True))
        }
        self._last = sources[-1].weights
        self._terms = [(sources[i].weights, share) for i, share in _shares(self.coefficients)]
        self._threads = Threads()

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self.forms[name]
        out = torch.empty(shape, dtype=dtype)
        flat, done = out.view(-1), 0
        for piece in self.pieces(name):
            flat[done : done + len(piece)] = piece
            done += len(piece)
        return out

    @property
    def known(self) -> Mapping[str, object]:
        return self.forms

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor's elements, row by row; each piece holds until the next is asked for.

        Raises `ValueError` for a result that its dtype cannot hold.
        """
        dtype = self.forms[name].dtype
        averaged = name not in self.copied
        of = self._terms if averaged else [(self._last, 1.0)]
        terms = [Term(unread(weights, name), share) for weights, share in of]
        summation = Summation(terms, self._sums[name] if averaged else dtype, dtype)
        try:
            yield from summation.pieces(self._threads)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for (weights, _), term in zip(of, terms, strict=True):
            if isinstance(term.tensor, Chunked) or mapped.place(term.tensor) is None:
                _release(weights, name)

    def write(
        self,
        out: Path | str,
        *,
        shard_bytes: int | None = None,
        overwrite: bool = False,
        progress: Callable[[int, int], object] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        """Writes a safetensors file, or with `shard_bytes` a folder of them (`writing.write`).

        With a `group` of torch.distributed all its ranks call it, having made the same combination,
        and share the work: each computes some of the tensors, and writes them into the same files.
        They are those that one process writes. `progress` is not told then.
        """
        if group is not None:
            dividing.write(
                out,
                self.forms,
                self.pieces,
                told=self._told,
                group=group,
                shard_bytes=shard_bytes,
                overwrite=overwrite,
            )
            return
        writing.write(
            out,
            self.forms,
            self.pieces,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            progress=progress,
        )


def _release(weights: Weights, name: str) -> None:
    """Gives the memory back that mapped files have taken for a tensor that is not one's as it lies."""
    release: Callable[[str], object] | None = getattr(weights, "release", None)
    if release is not None:
        release(name)


def _shares(coefficients: npt.NDArray[np.float64]) -> list[tuple[int, float]]:
    """The index and the share of each term that counts: `coefficient / sum of those so far`.

    Positive ones come first: the sums so far are then above 0, and at least 1 in the end.
    """
    counting = [(i, float(c)) for i, c in enumerate(coefficients) if c != 0]
    total, shares = 0.0, []
    for index, coefficient in sorted(counting, key=lambda each: each[1] < 0):
        total += coefficient
        shares.append((index, coefficient / total))
    return shares


def _checked(coefficients: npt.ArrayLike, files: int) -> npt.NDArray[np.float64]:
    """Coefficients that sum to 1, as float64, or `ValueError`."""
    found = np.asarray(coefficients, dtype=np.float64)
    require(files > 0, "files", [], "one file or more")
    if found.shape != (files,):
        raise ValueError(f"coefficients have shape {found.shape}, wanted ({files},): one a file")
    if not np.isfinite(found).all() or abs(found.sum() - 1) > _SLACK:
        raise ValueError(
            f"coefficients are {found.tolist()} and sum to {found.sum():.8g}, wanted finite numbers "
            "that sum to 1; divide them by their sum"
        )
    result: npt.NDArray[np.float64] = found / found.sum()
    return result


def _require_alike(sources: Sequence[Source], forms: Sequence[Mapping[str, Form]]) -> None:
    """Raises `ValueError` listing in which names, shapes and kinds of numbers a file differs."""
    wanted = {name: _described(each) for name, each in forms[0].items()}
    for source, of_source in zip(sources, forms, strict=True):
        got = {name: _described(each) for name, each in of_source.items()}
        if lines := difference(wanted, got):
            title = f"{source.label} is not of the same model as {sources[0].label}"
            raise ValueError(report(title, lines))
    require(bool(wanted), f"{sources[0].label}", "without a tensor", "weights to combine")


def _described(each: Form) -> str:
    return f"{_kind(each.dtype)} {each.shape}"


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point:
        return "floating-point"
    return "boolean" if dtype == torch.bool else "integer"


def _has_mean(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _as(wanted: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a result from a file's: `wanted`, complex where that is; integers as they are."""
    if wanted is None or not _has_mean(dtype):
        return dtype
    return wanted.to_complex() if dtype.is_complex and not wanted.is_complex else wanted


def _sum_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of a sum: float32, or float64 if any is as wide; complex where the last is."""
    wide = any(dtype in (torch.float64, torch.complex128) for dtype in dtypes)
    real = torch.float64 if wide else torch.float32
    return real.to_complex() if dtypes[-1].is_complex else real
