"""The coefficients of checkpoints whose merge equals the end of a learning-rate decay.

A run at a constant learning rate leaves k + 1 checkpoints, theta_0 the oldest, with k intervals
between them. A decay would have multiplied the learning rate of interval i, from checkpoint i - 1
to i, by w_i. Each function returns float64 coefficients of shape (k + 1,) that sum to 1, the
oldest checkpoint first.

The plain mean is `Uniform`, an EMA over checkpoints is `Exponential`, weights that grow as i^p are
`Exponential(Polynomial(p))`. `coefficients(rule, [1] * checkpoints)` gives their coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from polyak._checks import require, require_count
from polyak.theory._profiles import Profile

SHAPES: dict[str, Callable[[Profile], Profile]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - np.sqrt(x),
    "cosine": lambda x: (1 + np.cos(math.pi * x)) / 2,
}


def learning_rate_decay(shape: str, checkpoints: int) -> Profile:
    """Compute the multipliers of a decay from 1 to 0 in the intervals between checkpoints.

    w_i = f(i / checkpoints) for the intervals i = 1 .. checkpoints - 1, with f(x) = 1 - x
    ("linear"), 1 - sqrt(x) ("sqrt") or (1 + cos(pi x)) / 2 ("cosine"). Shape (checkpoints - 1,).

    >>> learning_rate_decay("linear", 4)
    array([0.75, 0.5 , 0.25])
    >>> wsm(learning_rate_decay("linear", 4))        # a linear decay is the plain mean
    array([0.25, 0.25, 0.25, 0.25])

    Every checkpoint has a coefficient above 0. With k intervals, f(i / k) would give 0 to the last
    checkpoint, and f((i - 1) / k) to the first. The other coefficients would be those from here for
    one checkpoint less.

    Raises `ValueError` for another shape, or unless `checkpoints` is an integer >= 2.
    Source: WSM (arXiv 2507.17634); sqrt: Hägele et al. (arXiv 2405.18392).
    """
    require(shape in SHAPES, "shape", shape, f"one of {', '.join(map(repr, SHAPES))}")
    count = require_count("checkpoints", checkpoints, "a decay is between checkpoints", least=2)
    return SHAPES[shape](np.arange(1, count) / count)


def wsm(multipliers: npt.ArrayLike) -> Profile:
    """Merge as if the rate had decayed (WSM): c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_k = w_k.

    The merge is exactly `theta_0 - sum_i w_i u_i`, with u_i = theta_(i-1) - theta_i the change of
    interval i: the end of the decayed run, if its gradients were the same.
    `learning_rate_profile(c)[1:]` gives the multipliers back.

    >>> wsm([1.0, 0.5, 0.25])
    array([0.  , 0.5 , 0.25, 0.25])

    Raises `ValueError` unless the multipliers are k >= 1 numbers in [0, 1], none larger than the
    one before.
    Source: WSM (arXiv 2507.17634, theorem 3.1).
    """
    w = np.concatenate(([1.0], _checked(multipliers), [0.0]))
    if len(rises := np.flatnonzero(w[1:] > w[:-1])):
        i = int(rises[0])
        raise ValueError(
            f"multipliers rise from {w[i]} to {w[i + 1]} at index {i}, wanted none larger than the"
            " one before: it would give a coefficient below 0"
        )
    return w[:-1] - w[1:]


def qam(multipliers: npt.ArrayLike) -> Profile:
    """Merge exactly on a quadratic: the coefficients of t^0 .. t^k in prod_i (1 - w_i + w_i t).

    A step of gradient descent on a quadratic multiplies the distance from the minimum by
    M = I - lr H; a step with the learning rate w_i lr multiplies it by (1 - w_i) I + w_i M. So if an
    interval is one step, the merge is exactly the end of the decayed run, on any quadratic. Unlike
    `wsm`, it accounts for the other gradients of that run. The mean index of the checkpoints is the
    sum of w, as with `wsm`. The order of the multipliers does not matter.

    >>> qam([0.5, 0.5])
    array([0.25, 0.5 , 0.25])

    Raises `ValueError` unless the multipliers are k >= 1 numbers in [0, 1].
    Source: QAM, quadratic-accurate merging (2026).
    """
    product = np.ones(1)
    for w in _checked(multipliers).tolist():
        product = np.convolve(product, [1 - w, w])
    return product


def _checked(multipliers: npt.ArrayLike) -> Profile:
    """The multipliers as a float64 array, or `ValueError`."""
    w = np.asarray(multipliers, dtype=np.float64)
    if w.ndim != 1 or len(w) == 0:
        wanted = "(intervals,): one for each interval between checkpoints"
        raise ValueError(f"multipliers have shape {w.shape}, wanted {wanted}")
    if len(wrong := np.flatnonzero(~((w >= 0) & (w <= 1)))):
        first = int(wrong[0])
        raise ValueError(f"multipliers have {w[first]} at index {first}, wanted numbers in [0, 1]")
    return w
