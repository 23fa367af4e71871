"""95 % intervals over seeds, and the one rule that turns an interval into a verdict.

The seeds are the independent repetitions, so the bootstrap resamples seeds. Two networks of one seed are
compared within that seed first. Means and medians have percentile bootstrap intervals. Shares of seeds
have exact binomial intervals, because a bootstrap of a share of 0 or 1 has no width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, trim_mean

from polyak.study._region import Region

CONFIDENCE = 0.95
RESAMPLES = 10_000
BOOTSTRAP_SEED = 20_240_613
FEWEST_SEEDS = 8

Statistic = Literal["mean", "median", "iqm"]
ClaimVerdict = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval and the number of seeds it rests on."""

    estimate: float
    low: float
    high: float
    seeds: int

    def as_dict(self) -> dict[str, float | None]:
        """The fields by name, for JSON: None for NaN and infinity."""
        return {name: v if math.isfinite(v) else None for name, v in asdict(self).items()}

    def map(self, change: Any) -> Interval:
        """The interval of an increasing function of the quantity."""
        return Interval(change(self.estimate), change(self.low), change(self.high), self.seeds)


def around(figure: float, tolerance: float) -> Region:
    """The values that differ from a figure by at most a share `tolerance` of it."""
    return Region(figure * (1 - tolerance), figure * (1 + tolerance))


def known(values: Iterable[float]) -> list[float]:
    """The values that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def bootstrap(
    values: Sequence[float] | NDArray[np.float64], statistic: Statistic = "mean"
) -> Interval:
    """The mean, median or interquartile mean over seeds with its percentile bootstrap interval.

    All quantities with the same number of seeds use the same resamples, so that paired quantities are
    resampled in pairs. Values may be infinite for a median. Without values the result is NaN.
    """
    array = np.asarray(values, dtype=float)
    if not len(array):
        return Interval(math.nan, math.nan, math.nan, 0)
    compute = _STATISTICS[statistic]
    resampled = compute(array[_resamples(len(array))], axis=1)
    return _percentiles(float(compute(array, axis=0)), resampled, len(array))


def stratified(groups: Sequence[Sequence[float]]) -> Interval:
    """The mean of the groups' means with its percentile bootstrap interval; each group is resampled by itself."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    resampled = np.zeros(RESAMPLES)
    for array in map(np.asarray, groups):
        drawn = generator.integers(0, len(array), size=(RESAMPLES, len(array)))
        resampled += array[drawn].mean(axis=1) / len(groups)
    estimate = float(np.mean([np.mean(group) for group in groups]))
    return _percentiles(estimate, resampled, sum(map(len, groups)))


def _percentiles(estimate: float, resampled: NDArray[np.float64], seeds: int) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    # Between a number and infinity there is nothing to interpolate.
    method: Any = "linear" if np.isfinite(resampled).all() else "inverted_cdf"
    low, high = np.quantile(resampled, (tail, 1 - tail), method=method)
    return Interval(estimate, float(low), float(high), seeds)


def share(wins: Sequence[bool]) -> Interval:
    """The share of seeds with a property, with its exact (Clopper-Pearson) interval."""
    return proportion(sum(wins), len(wins))


def proportion(wins: float, count: int) -> Interval:
    """`wins / count` with Clopper-Pearson's interval, by the beta distribution, so that a win can be a half."""
    if not count:
        return Interval(math.nan, math.nan, math.nan, 0)
    tail = (1 - CONFIDENCE) / 2
    low = beta.ppf(tail, wins, count - wins + 1) if wins > 0 else 0.0
    high = beta.isf(tail, wins + 1, count - wins) if wins < count else 1.0
    return Interval(float(wins / count), float(low), float(high), count)


def verdict(interval: Interval, claimed: Region) -> ClaimVerdict:
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


def _interquartile_mean(values: NDArray[np.float64], axis: int) -> Any:
    """The mean of the middle half: a quarter of the values is cut off at each end."""
    return trim_mean(values, 0.25, axis=axis)


_STATISTICS: dict[str, Callable[..., Any]] = {
    "mean": np.mean,
    "median": np.median,
    "iqm": _interquartile_mean,
}


@lru_cache(maxsize=4)
def _resamples(count: int) -> NDArray[np.int64]:
    """One resample of the seeds per row."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    return generator.integers(0, count, size=(RESAMPLES, count))
