"""The quality of weights by a function of the user, and how sure a difference is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyak._checks import require

Better = Literal["lower", "higher"]
Evaluate = Callable[[dict[str, Tensor]], float | Sequence[float] | npt.NDArray[np.float64] | Tensor]
"""Takes weights by name; gives their quality, or one for each example."""

_RESAMPLES = 2000
_AT_ONCE = 1 << 20
_TAILS = (0.025, 0.975)


class Judged(NamedTuple):
    """A quality, and that of each example if the function gave them: then it is their mean."""

    quality: float
    examples: npt.NDArray[np.float64] | None = None


def judged(evaluate: Evaluate, weights: dict[str, Tensor], where: str) -> Judged:
    """The quality of weights; raises `ValueError` with `where` unless all its numbers are finite."""
    given = evaluate(weights)
    try:
        values = _numbers(given)
    except (TypeError, ValueError, RuntimeError):
        values = np.array(math.nan)
    if not values.size or not np.isfinite(values).all():
        shown = (
            repr(given) if values.ndim == 0 else f"{values.size} numbers that are not all finite"
        )
        raise ValueError(
            f"evaluate returned {shown} {where}, wanted a finite number, or one for each example"
        )
    return Judged(float(values.mean()), values if values.ndim and len(values) > 1 else None)


def _numbers(given: object) -> npt.NDArray[np.float64]:
    held = given.detach().cpu().double().numpy() if isinstance(given, torch.Tensor) else given
    values = np.asarray(held, dtype=np.float64)
    return values.reshape(-1) if values.ndim else values


def interval(made: Judged, other: Judged) -> tuple[float, float] | None:
    """A 95 % interval of the difference of two qualities, made minus other; None without examples.

    Percentiles of a paired bootstrap: 2000 times, as many examples are drawn as there are, the same for
    both. The draws are the same in every call.

    >>> import numpy as np
    >>> a, b = np.arange(100.0), np.arange(100.0) % 7
    >>> low, high = interval(Judged(a.mean(), a), Judged(b.mean(), b))
    >>> bool(low < a.mean() - b.mean() < high)
    True

    Raises `ValueError` if they have different numbers of examples.
    """
    if made.examples is None or other.examples is None:
        return None
    count = len(made.examples)
    if len(other.examples) != count:
        raise ValueError(
            f"evaluate returned {count} and {len(other.examples)} numbers, wanted one for each of the same "
            "examples"
        )
    differences, draws = made.examples - other.examples, np.random.default_rng(0)
    at_once = max(1, _AT_ONCE // count)
    means = [
        differences[draws.integers(0, count, (min(at_once, _RESAMPLES - done), count))].mean(1)
        for done in range(0, _RESAMPLES, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), _TAILS)
    return float(low), float(high)


def sign_of(better: Better) -> int:
    """The factor that turns a quality into one whose higher values are better."""
    require(better in get_args(Better), "better", better, '"lower" or "higher"')
    return 1 if better == "higher" else -1
