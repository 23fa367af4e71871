"""A linear combination of stored weights, computed piece by piece when it is asked for.

Of each tensor only one piece is in memory, and of each file only what fits into the processor's
cache. So models may be larger than the memory, and files may be many.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from polyak import norms
from polyak._checks import prefixed, require
from polyak._dtypes import complex_of, has_mean, widest
from polyak._engine.tracking import is_statistic
from polyak._lazy import LazyTensors, TensorSpec, Where, distinct
from polyak._ranks.agreement import together
from polyak.checkpoints._safetensors.files import content
from polyak.checkpoints._safetensors.weights import Begun, SharedFile, begun_files, write
from polyak.offline._coefficients import checked, convex, shares
from polyak.offline._findings import (
    Source,
    all_positive,
    is_variance,
    left_in,
    nonfinite,
    require_alike,
)
from polyak.offline._lora import require_same_constants
from polyak.offline._summation import Summand, Summation, Threads

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CALL = "write"  # what errors call a write by several ranks


class Combination(LazyTensors):
    """`sum of coefficient * weights` over files of one model; each tensor is computed when asked for.

    `mean["head.weight"]` computes a tensor, `model.load_state_dict(mean)` all of them; `write` puts
    them into a file and never holds a whole one. Floating-point and complex tensors are combined.
    Integers and booleans are copied from the last file, and so are the tensors named in `copy`.

    Running statistics (names that end in `running_mean` or `running_var`) have coefficients of
    their own, `statistics`: none is below 0, since an extrapolated variance can be negative.

    The sum is `out <- lerp(out, weights, coefficient / sum of coefficients so far)`, positive
    coefficients first, so weights that all files share come out unchanged. It is computed in
    `accumulate`, or in float64 for weights of float64. Files with coefficient 0 are not read.

    `dtype` is the dtype of the result, or of each tensor by name; by default the widest of the files. Unless
    `allow_nonfinite`, a value that is infinite or NaN in some file is an error, except an infinity that
    all files share.

    Attributes:
        sources: the files' weights.
        coefficients: one for each file; float64, shape (files,), sum 1.
        statistics: the same for running statistics; by default `max(c, 0) / sum of max(c, 0)`.
        specs: name -> dtype and shape of the result.
        copied: the names of the tensors that are copied from the last file.
        left: what else the files hold (`Checkpoint.unused`), with the largest number of tensors of a file.
        nonfinite: tensor -> file -> how many of its values are infinite or NaN; as far as computed.
        negative: names of variances that extrapolation made negative; as far as computed.
        norms: the norms whose running statistics were combined. The combined weights have other
            statistics: estimate them again (`polyak.recalibrate`).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        coefficients: npt.ArrayLike,
        *,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        accumulate: torch.dtype = torch.float32,
        copy: Collection[str] = (),
        statistics: npt.ArrayLike | None = None,
        allow_nonfinite: bool = True,
    ) -> None:
        wanted = "torch.float32 or torch.float64"
        require(accumulate in (torch.float32, torch.float64), "accumulate", accumulate, wanted)
        holds = not isinstance(dtype, torch.dtype) or dtype.is_floating_point
        require(holds, "dtype", dtype, "a floating-point dtype, or None for that of the files")
        self.coefficients = checked(coefficients, len(sources))
        of_statistics = convex(self.coefficients) if statistics is None else statistics
        self.statistics = checked(of_statistics, len(sources))
        of_files = [source.weights.specs for source in sources]
        require_alike(sources, of_files)
        require_same_constants(sources)
        last = of_files[-1]
        self.copied = [n for n, spec in last.items() if n in copy or not has_mean(spec.dtype)]
        self.norms = norms.statistics(last)
        self.left = left_in(sources)
        given = dtype if isinstance(dtype, Mapping) else dict.fromkeys(last, dtype)
        dtypes = {n: {of_file[n].dtype for of_file in of_files} for n in last}
        self._specs = {}
        for n, spec in last.items():
            held = spec.dtype if n in self.copied else widest(dtypes[n])
            self._specs[n] = TensorSpec(spec.shape, _as(given.get(n), held))
        self._sums = {n: _sum_dtype([accumulate, *dtypes[n], self._specs[n].dtype]) for n in last}
        self._described_terms = {
            f"file {i + 1}": f"{float(self.coefficients[i])!r} of {source.label}, "
            f"{float(self.statistics[i])!r} of its running statistics"
            for i, source in enumerate(sources)
        }
        self.sources = tuple(sources)
        self._last = sources[-1].weights
        self._terms, self._convex = (
            [(sources[i].weights, share) for i, share in shares(coefficients)]
            for coefficients in (self.coefficients, self.statistics)
        )
        self._threads = Threads()
        self._extrapolates = bool((self.coefficients < 0).any())
        self._allow_nonfinite = allow_nonfinite
        self._asked = isinstance(dtype, torch.dtype)
        self.nonfinite: dict[str, dict[str, int]] = {}
        self.negative: set[str] = set()

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """name -> shape and dtype of the result."""
        return self._specs

    @property
    def changed(self) -> dict[str, set[torch.dtype]]:
        """name -> dtypes of a tensor in the files, where the result has another dtype; empty if `dtype` was given."""
        of_files = [] if self._asked else [source.weights.specs for source in self.sources]
        dtypes = {n: {of_file[n].dtype for of_file in of_files} for n in self._specs}
        return {n: of for n, of in dtypes.items() if of and of != {self._specs[n].dtype}}

    def read(self, name: str, where: Where = ()) -> Tensor:
        shape, dtype = self._specs[name]
        out = torch.empty(shape, dtype=dtype)
        flat, done = out.view(-1), 0
        for piece in self.pieces(name):
            flat[done : done + len(piece)] = piece
            done += len(piece)
        return out[where] if where else out

    def origins(self, name: str) -> tuple[Hashable, ...]:
        """A value that is equal for names that are one tensor in every file."""
        found = [source.weights.origins(name) for source in self.sources]
        return (*found, self._specs[name], name in self.copied, is_statistic(name))

    @cached_property
    def written(self) -> dict[str, TensorSpec]:
        """The specs of what `write` writes: of tied tensors the first name."""
        return distinct(self)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The elements of a tensor, row by row; a piece stays valid until the next is asked for.

        Raises `ValueError` for a result that its dtype cannot hold, and unless `allow_nonfinite` for
        values that are infinite or NaN.
        """
        dtype = self.specs[name].dtype
        averaged = name not in self.copied
        of_kind = self._convex if is_statistic(name) else self._terms
        terms = of_kind if averaged else [(self._last, 1.0)]
        summands = [Summand(weights.elements(name), share) for weights, share in terms]
        summation = Summation(summands, self._sums[name] if averaged else dtype, dtype)
        with prefixed(name):
            for piece in summation.pieces(self._threads):
                self._note(name, piece, doubtful=averaged and summation.doubtful)
                yield piece

    def _note(self, name: str, piece: Tensor, *, doubtful: bool) -> None:
        """Note what makes a piece of a tensor wrong; the files are examined only if something may."""
        sources = [s for s, c in zip(self.sources, self.coefficients, strict=True) if c]
        if doubtful and name not in self.nonfinite:
            self.nonfinite[name] = nonfinite(sources, name)
        if self.nonfinite.get(name) and not self._allow_nonfinite:
            shown = ", ".join(f"{n} in {file}" for file, n in self.nonfinite[name].items())
            raise ValueError(
                f"values that are infinite or NaN, {shown}: leave these files out, or allow it "
                "(allow_nonfinite=True, --allow-nonfinite)"
            )
        may_be_negative = self._extrapolates and is_variance(name) and name not in self.negative
        if may_be_negative and bool((piece < 0).any()) and all_positive(sources, name):
            self.negative.add(name)

    def write(
        self,
        out: Path | str,
        *,
        shard_bytes: int | None = None,
        overwrite: bool = False,
        progress: Callable[[int, int], object] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        """Write a safetensors file, or with `shard_bytes` a folder of them, complete or not at all.

        Of tensors that are one in every file (tied weights), only the first name is written, as safetensors'
        `save_model` does: `load_model` and `from_pretrained` load the file.

        With a `group` of torch.distributed, all its ranks call this with the same combination and
        share the work: each computes some of the tensors. The files equal those of one process byte
        for byte. `progress(bytes done, bytes in all)` is not called then.
        """
        if group is None:
            write(
                out,
                self.written,
                self.pieces,
                shard_bytes=shard_bytes,
                overwrite=overwrite,
                progress=progress,
            )
        else:
            self._write_together(Path(out), group, shard_bytes, overwrite)

    def _write_together(
        self, out: Path, group: ProcessGroup, shard_bytes: int | None, overwrite: bool
    ) -> None:
        """Write with all ranks of a group. An error of one rank is raised on all; the old files then stay.

        The ranks wait for each other only at the beginning and at the end.
        """
        described = {name: f"{spec.shape} {spec.dtype}" for name, spec in self.specs.items()}
        with (
            begun_files(
                _CALL,
                out,
                self.written,
                {**self._described_terms, **described},
                "give all ranks the same files and options",
                group=group,
                shard_bytes=shard_bytes,
                overwrite=overwrite,
            ) as begun,
            together(_CALL, group),
        ):
            own = _divided(self.written, dist.get_world_size(group))[dist.get_rank(group)]
            for each in begun:
                self._fill(each, [name for name in each.layout.starts if name in own])

    def _fill(self, begun: Begun, names: Iterable[str]) -> None:
        """Write some tensors of a file at their places."""
        with SharedFile(begun) as file:
            for name in names:
                start = begun.layout.starts[name]
                for piece in self.pieces(name):
                    data = content(piece)
                    file.write(data, start)
                    start += data.nbytes
            file.sync()


def _divided(specs: Mapping[str, TensorSpec], ranks: int) -> list[set[str]]:
    """The tensors of each rank: the largest first, each to the rank with the fewest bytes.

    >>> specs = {name: TensorSpec((size,), torch.int8) for name, size in (("a", 1), ("b", 3), ("c", 3))}
    >>> [sorted(names) for names in _divided(specs, 2)]
    [['a', 'b'], ['c']]
    """
    names: list[set[str]] = [set() for _ in range(ranks)]
    nbytes = [0] * ranks
    for name in sorted(specs, key=lambda name: -specs[name].nbytes):
        least = nbytes.index(min(nbytes))
        names[least].add(name)
        nbytes[least] += specs[name].nbytes
    return names


def _as(wanted: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a result: `wanted`, but complex for a complex file; integers stay as they are."""
    if wanted is None or not has_mean(dtype):
        return dtype
    return complex_of(wanted) if dtype.is_complex and not wanted.is_complex else wanted


def _sum_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of a sum: float64 if any dtype is as wide, else float32; complex if the last is."""
    wide = any(dtype in (torch.float64, torch.complex128) for dtype in dtypes)
    real = torch.float64 if wide else torch.float32
    return real.to_complex() if dtypes[-1].is_complex else real
