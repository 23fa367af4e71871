"""Statistics: 95 % intervals over seeds, and the one rule that turns an interval into a verdict.

The seeds are the independent repetitions, so the bootstrap resamples seeds. Two networks of one seed are
compared within that seed first. Means and medians have percentile bootstrap intervals. Shares of seeds
have exact binomial intervals, because a bootstrap of a share of 0 or 1 has no width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

CONFIDENCE = 0.95
RESAMPLES = 10_000
BOOTSTRAP_SEED = 20_240_613
FEWEST_SEEDS = 8

Statistic = Literal["mean", "median"]
ClaimVerdict = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval and the number of seeds it rests on."""

    estimate: float
    low: float
    high: float
    seeds: int

    def map(self, change: Any) -> Interval:
        """The interval of an increasing function of the quantity."""
        return Interval(change(self.estimate), change(self.low), change(self.high), self.seeds)


@dataclass(frozen=True)
class ClaimedRange:
    """The values of a quantity for which a claim is true, bounds included."""

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def around(figure: float, tolerance: float) -> ClaimedRange:
    """The values that differ from a figure by at most a share `tolerance` of it."""
    return ClaimedRange(figure * (1 - tolerance), figure * (1 + tolerance))


def bootstrap(
    values: Sequence[float] | NDArray[np.float64], statistic: Statistic = "mean"
) -> Interval:
    """The mean or median over seeds with its percentile bootstrap interval.

    All quantities with the same number of seeds use the same resamples, so that paired quantities are
    resampled in pairs. Without values the result is NaN.
    """
    array = np.asarray(values, dtype=float)
    if not len(array):
        return Interval(math.nan, math.nan, math.nan, 0)
    compute = np.mean if statistic == "mean" else np.median
    resampled = compute(array[_resamples(len(array))], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return Interval(float(compute(array)), float(low), float(high), len(array))


def share(wins: Sequence[bool]) -> Interval:
    """The share of seeds with a property, with its exact (Clopper-Pearson) interval."""
    if not wins:
        return Interval(math.nan, math.nan, math.nan, 0)
    test = binomtest(sum(wins), len(wins))
    exact = test.proportion_ci(CONFIDENCE, method="exact")
    return Interval(float(test.statistic), float(exact.low), float(exact.high), len(wins))


def verdict(interval: Interval, claimed: ClaimedRange) -> ClaimVerdict:
    """The one rule: the claim holds if the interval is inside the claimed range, and does not if outside.

    It is undecided if the interval crosses a bound, and with fewer than 8 seeds, for which a bootstrap
    interval is much too narrow.
    """
    if interval.seeds < FEWEST_SEEDS or math.isnan(interval.estimate):
        return "undecided"
    if interval.low in claimed and interval.high in claimed:
        return "holds"
    disjoint = interval.high < claimed.low or interval.low > claimed.high
    return "does not hold" if disjoint else "undecided"


def combined(verdicts: Sequence[ClaimVerdict]) -> ClaimVerdict:
    """The verdict on a claim: it holds if all parts hold, and does not if one part does not."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "undecided" if "undecided" in verdicts else "holds"


@lru_cache(maxsize=4)
def _resamples(count: int) -> NDArray[np.int64]:
    """One resample of the seeds per row."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    return generator.integers(0, count, size=(RESAMPLES, count))
