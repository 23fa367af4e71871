"""Compare the paired values of two arms, or of many: which is better.

Two arms of one seed start from the same weights and see the same batches, so they are compared within the
seed. `ours` and `theirs` are values by seed, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ncf, norm, t

from polyak.study._statistics import (
    BOOTSTRAP_SEED,
    CONFIDENCE,
    RESAMPLES,
    Interval,
    known,
    proportion,
)

Array = NDArray[np.float64]

EFFECT = 0.05
POWER = 0.8
MOST_SEEDS = 100_000
MOST_RATIO = 4.0
LARGEST_LOG = 700.0  # exp of more is not a float


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[list[float], list[float]]:
    """The values of the seeds for which both are numbers."""
    both = [pair for pair in zip(ours, theirs, strict=True) if len(known(pair)) == 2]
    return [own for own, _ in both], [other for _, other in both]


def gains(
    ours: Sequence[float] | Array,
    theirs: Sequence[float] | Array,
    lower_is_better: bool,
    is_share: bool,
) -> list[float]:
    """How much better ours is by seed, positive if it is better: log ratios for a share, else differences."""
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    change = np.log(a) - np.log(b) if is_share else a - b
    signed: list[float] = ((-change if lower_is_better else change) + 0.0).tolist()
    return signed


def as_share(gain: float, lower_is_better: bool) -> float:
    """A gain that is a (mean) log ratio, as a share of the other's value.

    >>> round(as_share(0.1, True), 3), round(as_share(0.1, False), 3)
    (0.095, 0.105)
    """
    sign = -1 if lower_is_better else 1
    return sign * math.expm1(min(sign * gain, LARGEST_LOG))


def improvement(ours: Sequence[float], theirs: Sequence[float], lower_is_better: bool) -> Interval:
    """The probability that ours is better on a seed: wins + ties / 2, as a share of the seeds.

    The interval is Clopper-Pearson's, with the beta distribution at a half where there are ties.
    """
    gains = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    wins = ((gains < 0) if lower_is_better else (gains > 0)).sum() + (gains == 0).sum() / 2
    return proportion(float(wins), len(gains))


def effect_size(differences: Sequence[float]) -> Interval:
    """Cohen's d of paired differences, `mean / standard deviation`, with its interval for normal differences.

    The interval is `d -+ 1.96 sqrt(1 / n + d^2 / (2 (n - 1)))`: the deviation is estimated, too. Source: Hedges and
    Olkin 1985. 0 if all differences are 0; NaN for fewer than two, or if they are one number other than 0.
    """
    array = np.asarray(differences, dtype=float)
    if len(array) > 1 and not array.any():
        return Interval(0.0, 0.0, 0.0, len(array))
    deviation = float(array.std(ddof=1)) if len(array) > 1 else 0.0
    if not deviation > 1e-12 * abs(float(array.mean() if len(array) else 0.0)):
        return Interval(math.nan, math.nan, math.nan, len(array))
    size, n = float(array.mean()) / deviation, len(array)
    reach = float(norm.isf((1 - CONFIDENCE) / 2)) * math.sqrt(1 / n + size**2 / (2 * (n - 1)))
    return Interval(size, size - reach, size + reach, n)


def sign_flip(differences: Sequence[float]) -> float:
    """The p-value of "the mean difference is 0", two-sided: how often random signs reach it.

    Under the hypothesis each seed's difference is as likely with either sign. 1 for no difference.
    """
    array = np.asarray(differences, dtype=float)
    signs = np.random.default_rng(BOOTSTRAP_SEED).choice([-1.0, 1.0], (RESAMPLES, len(array)))
    reached = np.abs(signs @ array) >= abs(array.sum()) * (1 - 1e-12)
    return float((1 + reached.sum()) / (1 + RESAMPLES))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number by Holm's steps: the i-th smallest of m times m - i + 1.

    Rejecting those below 5 % rejects a true hypothesis in at most 5 % of studies. Source: Holm 1979.
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda each: p_values[each])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def seeds_needed(deviation: float, effect: float = math.log1p(EFFECT)) -> int:
    """The fewest seeds with which a paired t-test at 5 % finds an effect with a probability of 80 %.

    `deviation` is the standard deviation of the paired differences, in the unit of `effect`: of log
    ratios, for the default effect of 5 %. At most 100 000 are counted.
    """
    if deviation <= 0:
        return 2
    low, high = 2, 4
    while high < MOST_SEEDS and _power(high, effect / deviation) < POWER:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if _power(middle, effect / deviation) >= POWER else (middle + 1, high)
        )
    return min(low, MOST_SEEDS)


def _power(seeds: int, standardised: float) -> float:
    """The probability that a two-sided paired t-test finds an effect of this many deviations."""
    centre = math.sqrt(seeds) * standardised
    if centre > 30:  # far beyond what scipy's distribution can compute, and certain
        return 1.0
    edge = float(t.isf((1 - CONFIDENCE) / 2, seeds - 1))
    # Of t squared: scipy's lower tail of a noncentral t is NaN for many centres.
    return float(ncf.sf(edge**2, 1, seeds - 1, centre**2))


def time_to_target(
    curve: Sequence[float], steps: Sequence[int], target: float, lower_is_better: bool
) -> float:
    """The first evaluated step whose validation value reaches the target; infinite if none does."""
    for value, step in zip(curve, steps, strict=True):
        if value <= target if lower_is_better else value >= target:
            return float(step)
    return math.inf


def performance_profile(
    times: Mapping[str, Sequence[float] | Array], limits: Sequence[float]
) -> dict[str, Array]:
    """For each arm and limit: the share of problems on which its time is within `limit` x the best arm's.

    `times[arm][i]` is the time on problem i, infinite for a miss, which is within no limit. A problem
    is a seed of a study, or of several studies. Source: Dolan and More 2002.
    """
    table = np.array([list(each) for each in times.values()], dtype=float)
    best = table.min(axis=0)
    with np.errstate(invalid="ignore"):
        ratios = np.where(np.isfinite(table), table / best, np.inf)
    return {
        name: np.array([(row <= limit).mean() for limit in limits])
        for name, row in zip(times, ratios, strict=True)
    }


def profile_score(ratios: Sequence[float]) -> float:
    """The area under a performance profile from 1 to 4, as a share: 1 if it is best everywhere.

    `ratios` are the arm's times divided by the best arm's. Source: AlgoPerf.
    """
    within = np.clip(MOST_RATIO - np.asarray(ratios, dtype=float), 0.0, MOST_RATIO - 1)
    return float(within.mean() / (MOST_RATIO - 1))
