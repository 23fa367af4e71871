"""A profile in one number or one curve.

Each function takes a profile `c`: the coefficient of each step's live weights in the average,
oldest step first, summing to 1, as `profile` returns it. The age of the newest step is 0.
All raise `ValueError` unless the array is one-dimensional, finite and sums to 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polyak._checks import as_number, is_number, require

Array = npt.NDArray[np.float64]
_HALF_POWER = 0.5
_RESOLVED = 4  # points of the spectrum per point of the profile


def _checked(c: npt.ArrayLike) -> Array:
    """The profile as a float64 array, or `ValueError`."""
    profile = np.asarray(c, dtype=np.float64)
    if profile.ndim != 1 or len(profile) == 0:
        wanted = "one dimension: the coefficient of each step, oldest first"
        raise ValueError(f"a profile has shape {profile.shape}, wanted {wanted}")
    if not np.isfinite(profile).all():
        first = int(np.flatnonzero(~np.isfinite(profile))[0])
        raise ValueError(f"a profile has {profile[first]} at index {first}, wanted finite numbers")
    if abs(profile.sum() - 1) > 1e-6:
        wanted = "1: pass what polyak.theory.profile returns"
        raise ValueError(f"a profile sums to {profile.sum():.6g}, wanted {wanted}")
    return profile


def _ages(c: Array) -> Array:
    return np.arange(len(c) - 1, -1, -1, dtype=np.float64)


def step_response(c: npt.ArrayLike) -> Array:
    """Compute how much of a jump the average shows: S[k] = sum of c over ages <= k.

    Index k: the jump is k + 1 steps old, so that k + 1 steps have the new weights. Shape (steps,);
    the last entry is 1. An EMA far from its start has S[k] = 1 - decay^(k + 1).

    >>> step_response([0.125, 0.125, 0.25, 0.5])
    array([0.5  , 0.75 , 0.875, 1.   ])
    """
    return np.cumsum(_checked(c)[::-1])


def half_life(c: npt.ArrayLike) -> float:
    """Find the smallest age a, in steps, such that the steps younger than a have half of the weight.

    S(a) = sum of c over ages < a. S is known at the sampled steps. Between two of them the rest 1 - S
    is taken to fall geometrically, as an EMA's does. So an EMA has exactly ln 2 / -ln decay, at every
    cadence, and a mean of n steps has n / 2 for even n. If one step has the half (the first step
    of a short EMA, a plain copy), the half-life is the age of that step.

    >>> half_life([0.25, 0.25, 0.25, 0.25]), half_life([0.0, 0.0, 1.0])
    (2.0, 0.0)
    """
    c = _checked(c)
    sampled = np.flatnonzero(c)[::-1]
    ages = np.append(len(c) - 1 - sampled, len(c))
    older = np.concatenate(([1.0], 1 - np.cumsum(c[sampled])[:-1], [0.0]))
    after = int(np.argmax(older <= 0.5))
    start, end = float(older[after - 1]), float(older[after])
    share = math.log(2 * start) / math.log(start / end) if end > 0 else 0.0
    return float(ages[after - 1] + share * (ages[after] - ages[after - 1]))


def mean_age(c: npt.ArrayLike) -> float:
    """Compute the mean age of the averaged weights, in steps: sum of c * age.

    decay / (1 - decay) for a long EMA, (n - 1) / 2 for a mean of n. It is the delay of slow signals
    (the group delay at frequency 0). For a rule that extrapolates (`Bema`) it is negative.

    >>> mean_age([0.25, 0.25, 0.25, 0.25])
    1.5
    """
    c = _checked(c)
    return float(c @ _ages(c))


def ramp_lag(c: npt.ArrayLike) -> float:
    """Compute how far the average is behind live weights of constant speed, in steps.

    live_i = i gives live - average = sum of c * age: for each rule the lag is the mean age.

    >>> ramp_lag([0.25, 0.25, 0.25, 0.25])
    1.5
    """
    return mean_age(c)


def noise_gain(c: npt.ArrayLike, *, correlation: float = 0.0) -> float:
    """Compute the variance of the average of stationary noise, as a share of the noise's variance.

    White noise: sum of c^2; (1 - decay) / (1 + decay) for a long EMA, 1 / n for a mean of n. With
    `correlation` rho of neighbouring steps (an AR(1) process): sum_ij c_i c_j rho^|i - j|.
    Iterates of SGD are not white: on a quadratic of curvature h, rho = 1 - learning_rate * h.

    >>> noise_gain([0.25, 0.25, 0.25, 0.25]), noise_gain([0.5, 0.5], correlation=0.5)
    (0.25, 0.75)

    Raises `ValueError` for a correlation outside (-1, 1).
    """
    c, correlation = _checked(c), as_number(correlation)
    holds = is_number(correlation) and -1 < correlation < 1
    require(holds, "correlation", correlation, "a number in (-1, 1)")
    if correlation == 0:
        return float(c @ c)
    size = 2 * len(c)
    products = np.fft.irfft(np.abs(np.fft.rfft(c, size)) ** 2, size)[: len(c)]
    weights = 2 * float(correlation) ** np.arange(len(c))
    return float(products @ weights - products[0])


def effective_window(c: npt.ArrayLike) -> float:
    """Compute the number of steps whose plain mean has the same noise gain: 1 / sum of c^2.

    (1 + decay) / (1 - decay) for a long EMA, which is its span; n for a mean of n.

    >>> effective_window([0.25, 0.25, 0.25, 0.25])
    4.0
    """
    return 1 / noise_gain(c)


def relative_std(c: npt.ArrayLike) -> float | None:
    """Compute the standard deviation of the averaged weights' positions, as a share of all steps.

    sqrt(sum of c * (i - mean)^2) / steps, i the step. For `Power(gamma)` it tends to
    sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)). It is None if negative coefficients (`Bema`)
    make the sum negative.

    >>> round(relative_std([0.25, 0.25, 0.25, 0.25]), 4)
    0.2795

    Source: EDM2 (arXiv 2312.02696, section 3.1).
    """
    c = _checked(c)
    ages = _ages(c)
    variance = float(c @ (ages - c @ ages) ** 2)
    return math.sqrt(variance) / len(c) if variance >= 0 else None


def initial_weight(c: npt.ArrayLike) -> float:
    """Return the weight left on the first update, which is the start of the average: c[0].

    >>> initial_weight([0.125, 0.125, 0.25, 0.5])
    0.125
    """
    return float(_checked(c)[0])


def learning_rate_profile(c: npt.ArrayLike) -> Array:
    """Compute the multiplier of each step's change that makes training end at the average.

    W_i = sum_{j >= i} c_j. With x_0 the weights before step 1 and u_i = x_{i-1} - x_i the change of
    step i, `average = x_0 - sum_i W_i u_i` holds exactly. So on the same trajectory, the average is
    where a run with its learning rate multiplied by W_i would end: an EMA is a decay to 0 by
    1 - decay^(age + 1), a uniform mean a linear decay. Shape (steps,); W_1 = 1.

    >>> learning_rate_profile([0.25, 0.25, 0.25, 0.25])
    array([1.  , 0.75, 0.5 , 0.25])

    Source: Sandler et al. (arXiv 2301.02312); WSM (arXiv 2507.17634, theorem 3.1).
    """
    return step_response(c)[::-1].copy()  # torch takes no view that runs backwards


class FrequencyResponse(NamedTuple):
    """Frequencies in radians per step, magnitudes (1 passes all), phases in radians in (-pi, pi]."""

    frequencies: Array
    magnitude: Array
    phase: Array


def frequency_response(
    c: npt.ArrayLike, frequencies: npt.ArrayLike | None = None
) -> FrequencyResponse:
    """Compute what the average leaves of an oscillation of the live weights, by frequency.

    H(w) = sum over ages k of c * exp(-i w k); magnitude |H|, phase arg H, w in radians per step
    (a period of 2 pi / w steps). By default 400 frequencies from 1 / steps to pi, evenly spaced on a
    logarithmic axis. A long EMA: |H| = (1 - decay) / sqrt(1 - 2 decay cos w + decay^2).

    >>> frequency_response([0.5, 0.5], [0.0, 3.141592653589793]).magnitude.round(9)
    array([1., 0.])

    Raises `ValueError` unless the frequencies are finite and one-dimensional.
    """
    c = _checked(c)
    if frequencies is None:
        frequencies = np.geomspace(1 / len(c), math.pi, 400)
    w = np.array(frequencies, dtype=np.float64, order="C")  # a copy: the result owns its arrays
    if w.ndim != 1 or not np.isfinite(w).all():
        wanted = "a one-dimensional array of finite radians per step"
        raise ValueError(f"frequencies is {frequencies!r}, wanted {wanted}")
    response = _spectrum(c, w)
    return FrequencyResponse(w, np.abs(response), np.angle(response))


def cutoff(c: npt.ArrayLike) -> float | None:
    """Compute the -3 dB cutoff: the lowest frequency, in radians per step, where |H|^2 falls to 1/2.

    A long EMA has 2 asin((1 - decay) / (2 sqrt(decay))), and none (None) below decay
    3 - 2 sqrt(2) = 0.17. Divide by 2 pi for cycles per step.

    >>> round(cutoff([0.5, 0.5]), 4), cutoff([1.0])
    (1.5708, None)
    """
    c = _checked(c)
    size = 1 << (_RESOLVED * len(c) - 1).bit_length()
    gains = np.abs(np.fft.rfft(c, size)) ** 2
    below = np.flatnonzero(gains <= _HALF_POWER)
    if len(below) == 0:
        return None
    spacing = 2 * math.pi / size
    return _half_power(c, (int(below[0]) - 1) * spacing, int(below[0]) * spacing)


def _half_power(c: Array, above: float, below: float) -> float:
    """The frequency between two where the gain crosses 1/2, by bisection."""
    for _ in range(40):
        middle = (above + below) / 2
        if abs(_spectrum(c, np.array([middle]))[0]) ** 2 > _HALF_POWER:
            above = middle
        else:
            below = middle
    return (above + below) / 2


def _spectrum(c: Array, w: Array) -> npt.NDArray[np.complex128]:
    """H(w). With ages as block * row + column, a frequency takes only 2 sqrt(steps) exponentials."""
    block = math.isqrt(len(c) - 1) + 1
    by_age = np.zeros(block * block)
    by_age[: len(c)] = c[::-1]
    column = np.arange(block)
    rows = np.exp(-1j * np.outer(w, block * column)) @ by_age.reshape(block, block)
    response: npt.NDArray[np.complex128] = (rows * np.exp(-1j * np.outer(w, column))).sum(axis=1)
    return response
