"""Compare what was written with sums that are computed in another way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyak._checks import difference, report
from polyak._engine.tracking import is_statistic
from polyak._lazy import LazyTensors, Where, parts
from polyak.offline._combination import Combination
from polyak.offline._comparison import wide

_TENSORS = 32  # this many are compared
_ELEMENTS = 1 << 16  # at the beginning, in the middle and at the end of each
_SECONDS = 0.3
_BYTES = 1 << 26


class Forecast(NamedTuple):
    """The cost of writing a combination: bytes to read and to write, and about how many seconds."""

    read_bytes: int
    written_bytes: int
    seconds: float


def forecast(made: Combination) -> Forecast:
    """Estimate the cost of writing a combination, in bytes and seconds. It computes a part to measure the speed."""
    specs = made.written
    terms = zip(made.sources, made.coefficients.tolist(), strict=True)
    read = [source.weights.specs[name].nbytes for source, c in terms if c for name in specs]
    total, done, began = sum(spec.nbytes for spec in specs.values()), 0, time.perf_counter()
    for piece in (
        p for name in sorted(specs, key=lambda n: -specs[n].nbytes) for p in made.pieces(name)
    ):
        done += piece.nbytes
        if time.perf_counter() - began > _SECONDS or done > _BYTES:
            break
    seconds = (time.perf_counter() - began) * total / max(done, 1)
    return Forecast(sum(read), total, seconds)


def verify(made: Combination, written: LazyTensors) -> int:
    """Compare sampled tensors of a combination, as they were written, with direct sums in float64.

    The largest tensor and up to 31 others are compared: the first elements, those in the middle and the
    last. Returns the number of tensors. One name of tied weights is enough.

    Raises `ValueError` with the tensor that differs by more than rounding, or with the names, shapes
    and dtypes that differ.
    """
    known = {made.origins(name) for name in written if name in made}
    there = [name for name in made if name in written or made.origins(name) not in known]
    wanted = {name: str(made.specs[name]) for name in there}
    if lines := difference(wanted, {name: str(spec) for name, spec in written.specs.items()}):
        raise ValueError(report("what was written differs from what was computed", lines))
    names = _sample(made, there)
    for name in names:
        for where in _places(made.specs[name].shape):
            _require_close(name, made, written.read(name, where), where)
    return len(names)


def _sample(made: Combination, names: Sequence[str]) -> list[str]:
    every = -(-len(names) // (_TENSORS - 1))
    largest = max(names, key=lambda name: made.specs[name].nbytes)
    return list(dict.fromkeys([largest, *names[::every]]))


def _places(shape: tuple[int, ...]) -> Iterator[Where]:
    """Boxes at the beginning, in the middle and at the end of a tensor."""
    size = torch.Size(shape).numel()
    starts = {0, max(size // 2 - _ELEMENTS // 2, 0), max(size - _ELEMENTS, 0)}
    for start in sorted(starts):
        yield from parts(shape, start, min(start + _ELEMENTS, size))


def _require_close(name: str, made: Combination, got: Tensor, where: Where) -> None:
    copied = name in made.copied
    shares = (made.statistics if is_statistic(name) else made.coefficients).tolist()
    shares = [0.0] * (len(shares) - 1) + [1.0] if copied else shares
    values = [wide(source.weights.read(name, where)) for source in made.sources]
    direct, size = _summed(values, shares)
    allowed = torch.zeros_like(size) if copied else _rounding(got.dtype, direct, len(shares) * size)
    written = wide(got)
    near = (written - direct).abs() <= allowed
    near |= torch.isclose(written, direct, 0, 0, equal_nan=True)
    wrong = ~near & (direct.abs().isfinite() | copied)
    if wrong.any():
        index = int(wrong.flatten().nonzero()[0])
        wrote, wanted = (tensor.flatten()[index].item() for tensor in (written, direct))
        raise ValueError(
            f"{name}: {wrote!r} was written, and the direct sum is {wanted!r} (element {index} of "
            f"{list(where)})"
        )


def _summed(values: Sequence[Tensor], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`sum of share * value`, and the same of absolute values; values without a share do not count."""
    counting = [(value, share) for value, share in zip(values, shares, strict=True) if share]
    direct = torch.stack([share * value for value, share in counting]).sum(0)
    size = torch.stack([abs(share) * value.abs() for value, share in counting]).sum(0)
    return direct, size


def _rounding(dtype: torch.dtype, result: Tensor, size: Tensor) -> Tensor:
    """The largest error of a rightly rounded result, and of sums of such a size."""
    of_result = torch.finfo(dtype)
    of_sums = torch.finfo(torch.float64 if of_result.bits == 64 else torch.float32)
    return of_result.eps * (result.abs() + of_result.tiny) + of_sums.eps * size
