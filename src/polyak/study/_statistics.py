"""Statistics: 95 % intervals over seeds, and the one rule that turns an interval into a verdict.

Seeds are the independent repetitions, so seeds are resampled; two networks of one seed are compared
within that seed first. Means and medians have percentile bootstrap intervals, shares of seeds have
exact binomial ones, since a bootstrap of a share of 0 or 1 has no width.
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
Verdict = Literal["holds", "does not hold", "undecided"]


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
class Region:
    """The values of a quantity under which a claim is true, bounds included."""

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def around(figure: float, tolerance: float) -> Region:
    """The values within a share `tolerance` of a figure."""
    return Region(figure * (1 - tolerance), figure * (1 + tolerance))


def bootstrap(
    values: Sequence[float] | NDArray[np.float64], statistic: Statistic = "mean"
) -> Interval:
    """The mean or median over seeds with its percentile bootstrap interval.

    The resamples are the same for every quantity of equally many seeds, so paired quantities are
    resampled in pairs. No value at all gives NaN.
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
    """The share of seeds in which something is so, with its exact (Clopper-Pearson) interval."""
    if not wins:
        return Interval(math.nan, math.nan, math.nan, 0)
    test = binomtest(sum(wins), len(wins))
    exact = test.proportion_ci(CONFIDENCE, method="exact")
    return Interval(float(test.statistic), float(exact.low), float(exact.high), len(wins))


def verdict(interval: Interval, claimed: Region) -> Verdict:
    """The one rule: inside the claimed region it holds, outside it does not, across it is undecided.

    Undecided too on fewer than 8 seeds, where a bootstrap interval is much too narrow.
    """
    if interval.seeds < FEWEST_SEEDS or math.isnan(interval.estimate):
        return "undecided"
    if interval.low in claimed and interval.high in claimed:
        return "holds"
    disjoint = interval.high < claimed.low or interval.low > claimed.high
    return "does not hold" if disjoint else "undecided"


def combined(verdicts: Sequence[Verdict]) -> Verdict:
    """A claim of several parts: false if one part is, true if all are."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "undecided" if "undecided" in verdicts else "holds"


@lru_cache(maxsize=4)
def _resamples(count: int) -> NDArray[np.int64]:
    """Row by row the seeds of one resample."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    return generator.integers(0, count, size=(RESAMPLES, count))
