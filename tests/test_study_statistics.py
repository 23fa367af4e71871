"""Intervals cover the truth, and the one rule reaches each verdict where the truth is known."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipy_bootstrap

from polyak.study._region import Region
from polyak.study._statistics import (
    ClaimVerdict,
    Interval,
    around,
    bootstrap,
    combined,
    share,
    verdict,
)

ABOVE = Region(low=0.0)


def draw(mean: float, seeds: int = 64, generator: int = 0) -> list[float]:
    return list(np.random.default_rng(generator).normal(mean, 1.0, seeds))


@pytest.mark.parametrize(
    ("mean", "wanted"), [(2.0, "holds"), (-2.0, "does not hold"), (0.0, "undecided")]
)
def test_the_rule_finds_the_truth(mean: float, wanted: ClaimVerdict) -> None:
    assert verdict(bootstrap(draw(mean)), ABOVE) == wanted


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (1.0, 2.0, "holds"),
        (0.9, 1.5, "undecided"),
        (1.5, 2.1, "undecided"),
        (0.5, 2.5, "undecided"),
        (0.1, 0.9, "does not hold"),
        (2.1, 3.0, "does not hold"),
    ],
)
def test_an_interval_is_inside_across_or_outside(
    low: float, high: float, wanted: ClaimVerdict
) -> None:
    assert verdict(Interval((low + high) / 2, low, high, 64), Region(1.0, 2.0)) == wanted


def test_few_seeds_decide_nothing() -> None:
    assert verdict(bootstrap([5.0] * 7), ABOVE) == "undecided"
    assert verdict(bootstrap([5.0] * 8), ABOVE) == "holds"
    assert verdict(bootstrap([]), ABOVE) == verdict(share([]), ABOVE) == "undecided"


def test_parts_combine() -> None:
    assert combined(["holds", "holds"]) == "holds"
    assert combined(["holds", "undecided"]) == "undecided"
    assert combined(["undecided", "does not hold", "holds"]) == "does not hold"
    assert set(get_args(ClaimVerdict)) == {"holds", "undecided", "does not hold"}


def test_a_wrong_claim_seldom_holds() -> None:
    """At the edge of the region a 95 % interval lies wholly inside in about 2.5 % of studies."""
    found = [verdict(bootstrap(draw(0.0, generator=i)), ABOVE) for i in range(300)]
    assert found.count("holds") <= 20
    assert found.count("does not hold") <= 20


def test_bootstrap_is_scipy_s_percentile_interval() -> None:
    values = draw(1.0)
    wanted = scipy_bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1)
    ).confidence_interval
    ours = bootstrap(values)
    assert ours.estimate == pytest.approx(np.mean(values))
    assert (ours.low, ours.high) == pytest.approx((wanted.low, wanted.high), abs=0.02)
    assert ours == bootstrap(values)


def test_paired_quantities_share_their_resamples() -> None:
    values = draw(1.0)
    shifted = bootstrap([value + 3 for value in values])
    assert shifted.low == pytest.approx(bootstrap(values).low + 3)


def test_median_of_a_skewed_sample() -> None:
    values = [1.0] * 40 + [100.0] * 24
    assert bootstrap(values, "median").estimate == 1.0
    assert bootstrap(values, "mean").estimate > 30


def test_a_share_of_all_seeds_has_an_interval() -> None:
    every = share([True] * 64)
    assert every.estimate == every.high == 1.0
    assert every.low == pytest.approx(0.025 ** (1 / 64))
    assert share([False] * 64).high == pytest.approx(1 - every.low)


@pytest.mark.parametrize("wins", range(10))
def test_the_interval_of_a_share_is_the_exact_binomial_one(wins: int) -> None:
    found = share([True] * wins + [False] * (9 - wins))
    exact = binomtest(wins, 9).proportion_ci(0.95, method="exact")
    assert found.estimate == wins / 9
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-10)


def test_an_interval_maps_through_an_increasing_function() -> None:
    assert Interval(0.0, -1.0, 1.0, 9).map(math.exp) == Interval(1.0, math.exp(-1), math.e, 9)


def test_around_a_figure() -> None:
    assert 50 in around(50, 0.1) and 45 in around(50, 0.1)
    assert 44.9 not in around(50, 0.1)
