"""Independent: what the values of two studies without a common seed say about which is better.

`ours` and `theirs` are values of different seeds, so no value belongs to another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import mannwhitneyu, t

from polyak.study._statistics import CONFIDENCE, Interval, proportion


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The difference of two means with Welch's interval; NaN bounds for fewer than two values of either.

    The deviations of the two may differ. Its number of seeds is that of the smaller sample.
    """
    counts = np.array([len(ours), len(theirs)])
    fewer = int(counts.min())
    if not fewer:
        return Interval(math.nan, math.nan, math.nan, 0)
    estimate = float(np.mean(ours) - np.mean(theirs))
    if fewer < 2:
        return Interval(estimate, math.nan, math.nan, fewer)
    errors = np.array([np.var(values, ddof=1) for values in (ours, theirs)]) / counts
    half = 0.0
    if errors.sum() > 0:
        freedom = errors.sum() ** 2 / (errors**2 / (counts - 1)).sum()
        half = float(t.isf((1 - CONFIDENCE) / 2, freedom) * math.sqrt(errors.sum()))
    return Interval(estimate, estimate - half, estimate + half, fewer)


def superiority(ours: Sequence[float], theirs: Sequence[float], lower_is_better: bool) -> Interval:
    """The probability that a run of ours is better than one of theirs, ties by half: Mann and Whitney's U / (n m).

    Its variance is at most `p (1 - p) / min(n, m)`, that of a share of so many seeds (van Dantzig 1951).
    The interval is Clopper-Pearson's of such a share, so it is rather too wide.
    """
    fewer = min(len(ours), len(theirs))
    if not fewer:
        return proportion(0.0, 0)
    gains = np.subtract.outer(np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float))
    better = (gains < 0) if lower_is_better else (gains > 0)
    return proportion(float(better.mean() + (gains == 0).mean() / 2) * fewer, fewer)


def rank_sum(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Mann and Whitney's p-value of "neither is better", two-sided; 1 without values."""
    if not len(ours) or not len(theirs) or len({*ours, *theirs}) == 1:
        return 1.0
    return float(mannwhitneyu(ours, theirs, alternative="two-sided").pvalue)
