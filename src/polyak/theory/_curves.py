"""The points of a chart of a profile, few enough for a page.

Each function takes a profile `c`, and the number `unit` of steps that each coefficient covers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polyak.theory._measures import (
    Array,
    cutoff,
    frequency_response,
    learning_rate_profile,
    step_response,
)

_BINS = 500
_FEW = 3  # crossings of -3 dB: with more the gain is drawn as an envelope
_STRETCHES = 80  # of an envelope
_SHOWN = 0.999  # of the weight: the rest of a long profile is a flat line


class Curve(NamedTuple):
    """The points of a line: at most 1002, with the highest and the lowest of every stretch."""

    x: list[float]
    y: list[float]


def profile_curve(c: Array, *, every: int = 1, unit: int = 1) -> Curve:
    """The coefficient by age, at the updates, as far back as nearly all of the weight.

    >>> from polyak.theory import profile
    >>> profile_curve(profile("exponential(0.5)", 3, every=2), every=2)
    Curve(x=[0.0, 2.0], y=[0.75, 0.25])
    """
    if unit > 1:  # every stretch has updates, which share its coefficient
        ages = np.arange(_oldest(c) + 1)
        return _thinned(unit * ages, c[::-1][ages] * every / unit)
    sampled = np.arange(len(c)) % every == 0
    sampled[-1] |= c[-1] != 0
    ages = np.flatnonzero(sampled[::-1])
    ages = ages[ages <= _oldest(c)]
    return _thinned(ages, c[::-1][ages])


def step_curve(c: Array, *, unit: int = 1) -> Curve:
    """The step response by the age of the jump, from age 0, as far back as `profile_curve`."""
    response = np.append(0.0, step_response(c))[: _oldest(c) + 2]
    return _thinned(unit * np.arange(len(response)), response)


def learning_rate_curve(c: Array, *, unit: int = 1) -> Curve:
    """The equivalent learning-rate multiplier by step, from step 1."""
    return _thinned(unit * np.arange(len(c)) + 1, learning_rate_profile(c))


class GainCurve(NamedTuple):
    """The gain by frequency for a page of whole decades.

    Where it crosses -3 dB many times, `lower` has the lowest gain of each stretch of frequencies,
    `curve` the highest, and `cutoff`, which would mark one crossing of many, is None.
    """

    curve: Curve
    lower: Curve | None
    bottom: float
    top: float
    cutoff: float | None


def gain_curve(c: Array, *, unit: int = 1) -> GainCurve:
    """The frequency response up to pi / unit; the deepest 2 % (the nulls of a window) are cut off."""
    frequencies, gain, _ = frequency_response(c)
    lowest = max(float(np.quantile(gain, 0.02)), 1e-12)
    bottom, top = 10.0 ** math.floor(math.log10(lowest)), max(1.0, float(gain.max()))
    frequencies, gain = frequencies / unit, np.maximum(gain, bottom)
    if np.count_nonzero(np.diff(gain > math.sqrt(0.5))) > _FEW:
        return GainCurve(*_envelope(c, bottom, unit), bottom, top, None)
    cut = cutoff(c)
    curve = _thinned(frequencies, gain)
    return GainCurve(curve, None, bottom, top, None if cut is None else cut / unit)


def _envelope(c: Array, bottom: float, unit: int) -> tuple[Curve, Curve]:
    """The highest and the lowest gain of each stretch of frequencies, from a spectrum that is dense."""
    gain = np.maximum(np.abs(np.fft.rfft(c, 4 << (len(c) - 1).bit_length())), bottom)[1:]
    frequencies = np.linspace(0, math.pi / unit, len(gain) + 1)[1:]
    cuts = np.geomspace(frequencies[0], frequencies[-1], _STRETCHES)
    places = np.unique(np.searchsorted(frequencies, cuts[1:-1]))
    parts = [part for part in np.split(np.arange(len(gain)), places) if len(part)]
    middles = [float(frequencies[part].mean()) for part in parts]
    highest = Curve(middles, [float(gain[part].max()) for part in parts])
    return highest, Curve(middles, [float(gain[part].min()) for part in parts])


def _oldest(c: Array) -> int:
    """The age that leaves out at most a thousandth of the absolute weight, and a margin."""
    covered = np.cumsum(np.abs(c[::-1]))
    age = int(np.searchsorted(covered, _SHOWN * covered[-1]))
    return min(age + age // 10 + 1, len(c) - 1)


def _thinned(x: npt.NDArray[np.generic], y: Array) -> Curve:
    kept = np.arange(len(y))
    if len(y) > 2 * _BINS:
        bins = np.array_split(kept, _BINS)
        extremes = [(part[np.argmin(y[part])], part[np.argmax(y[part])]) for part in bins]
        kept = np.unique(np.concatenate([kept[[0, -1]], np.ravel(extremes)]))
    return Curve([float(value) for value in x[kept]], y[kept].tolist())
