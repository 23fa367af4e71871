"""Statistics of pairs and of many arms: each equals an oracle that computes it in another way."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from polyak.study._comparisons import (
    as_share,
    effect_size,
    gains,
    holm,
    improvement,
    performance_profile,
    profile_score,
    seeds_needed,
    sign_flip,
    time_to_target,
)
from polyak.study._statistics import bootstrap, share


def pairs(
    seeds: int = 16, shift: float = 0.3, generator: int = 0
) -> tuple[list[float], list[float]]:
    random = np.random.default_rng(generator)
    theirs = random.uniform(1.0, 2.0, seeds)
    return list(theirs + random.normal(-shift, 0.3, seeds)), list(theirs)


def test_the_interquartile_mean_is_scipy_s() -> None:
    values = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1000.0]
    assert bootstrap(values, "iqm").estimate == np.mean(values[2:6])
    ours = bootstrap(values * 3, "iqm")
    wanted = stats.bootstrap(
        (values * 3,), lambda x, axis: stats.trim_mean(x, 0.25, axis=axis), method="percentile",
        n_resamples=10_000, rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert (ours.low, ours.high) == pytest.approx((wanted.low, wanted.high), rel=0.1)


def test_a_median_may_be_infinite() -> None:
    mostly = bootstrap([1.0] * 14 + [math.inf] * 2, "median")
    assert (mostly.estimate, mostly.low, mostly.high) == (1.0, 1.0, 1.0)
    half = bootstrap([1.0] * 7 + [math.inf] * 9, "median")
    assert half.estimate == half.high == math.inf and half.low == 1.0
    assert bootstrap([math.inf] * 9, "median").low == math.inf


@pytest.mark.parametrize("lower", [True, False])
def test_a_gain_is_a_geometric_mean_of_ratios(lower: bool) -> None:
    ours, theirs = pairs()
    ratios = np.array(ours) / theirs
    mean = bootstrap(gains(ours, theirs, lower, is_share=True))
    found = mean.map(lambda value: as_share(value, lower))
    sign = -1 if lower else 1
    assert found.estimate == pytest.approx(sign * (stats.gmean(ratios) - 1))
    rows = np.random.default_rng(1).integers(0, 16, (2000, 16))
    resampled = sign * (stats.gmean(ratios[rows], axis=1) - 1)
    wanted = np.quantile(resampled, (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize("lower", [True, False])
def test_a_gain_in_the_metric_s_unit_is_a_difference(lower: bool) -> None:
    assert gains([1.0, -2.0, 0.0], [0.5, -1.0, 0.0], lower, is_share=False) == (
        [-0.5, 1.0, 0.0] if lower else [0.5, -1.0, 0.0]
    )
    assert as_share(-1e9, True) == -as_share(1e9, False) == -math.expm1(700.0)


@pytest.mark.parametrize("lower", [True, False])
def test_the_probability_of_improvement_is_the_share_of_wins(lower: bool) -> None:
    ours, theirs = pairs()
    wins = [(a < b) == lower for a, b in zip(ours, theirs, strict=True)]
    found, wanted = improvement(ours, theirs, lower), share(wins)
    assert found.estimate == wanted.estimate
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


@pytest.mark.parametrize("wins", range(10))
def test_a_tie_is_half_a_win(wins: int) -> None:
    """With ties the interval lies between those of the shares without a tie on either side."""
    theirs = [1.0] * 9
    ours = [0.5] * wins + [1.0] * (9 - wins)
    found = improvement(ours, theirs, lower_is_better=True)
    assert found.estimate == (wins + (9 - wins) / 2) / 9
    worst, best = share([True] * wins + [False] * (9 - wins)), share([True] * 9)
    assert worst.low <= found.low <= found.estimate <= found.high <= best.high == 1.0
    assert improvement(theirs, theirs, True).estimate == 0.5


def test_the_effect_size_is_the_t_statistic_of_scipy() -> None:
    ours, theirs = pairs()
    differences = np.array(ours) - theirs
    found = effect_size(list(differences))
    assert found.estimate * 4 == pytest.approx(stats.ttest_rel(ours, theirs).statistic)
    assert found.low < found.estimate < found.high < 0
    assert effect_size([0.0, 0.0]).estimate == 0
    for undefined in ([], [1.0], [2.0, 2.0, 2.0], [0.1, 0.1, 0.1]):
        assert math.isnan(effect_size(undefined).estimate)


@pytest.mark.parametrize("size", [0.0, 1.0, -4.0])
def test_the_interval_of_an_effect_size_has_the_size_in_95_of_100_studies(size: float) -> None:
    studies = np.random.default_rng(0).normal(size, 1, (1000, 16))
    found = [effect_size(list(differences)) for differences in studies]
    assert sum(each.low <= size <= each.high for each in found) == pytest.approx(950, abs=25)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3])
def test_random_signs_are_scipy_s_exact_permutations(shift: float) -> None:
    ours, theirs = pairs(10, shift)
    differences = np.array(ours) - theirs
    exact = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", vectorized=True, n_resamples=np.inf
    ).pvalue
    assert sign_flip(list(differences)) == pytest.approx(exact, abs=0.012)
    assert sign_flip([0.0] * 8) == 1.0


def test_random_signs_reject_a_true_hypothesis_seldom() -> None:
    found = [sign_flip(list(np.random.default_rng(i).normal(0, 1, 12))) for i in range(300)]
    assert 3 <= sum(p < 0.05 for p in found) <= 30


@pytest.mark.parametrize("generator", range(5))
def test_holm_is_the_closed_test_of_bonferroni(generator: int) -> None:
    """An arm's corrected p-value is the largest Bonferroni p-value of all sets of arms with it."""
    values = np.random.default_rng(generator).uniform(0, 0.2, 6) ** 1.5
    given = dict(zip("abcdef", values, strict=True))
    wanted = {
        name: max(
            min(1.0, len(chosen) * min(given[each] for each in chosen))
            for size in range(1, 7)
            for chosen in itertools.combinations(given, size)
            if name in chosen
        )
        for name in given
    }
    assert holm(given) == pytest.approx(wanted)
    assert list(holm(given)) == list(given)


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_are_those_of_published_tables(effect: float, seeds: int) -> None:
    """A paired t-test, two-sided at 5 %, power 80 %: Cohen's d and pairs, as G*Power lists them."""
    assert seeds_needed(1.0, effect) == seeds


def test_seeds_needed_find_the_effect_in_four_of_five_studies() -> None:
    deviation = 0.06
    seeds = seeds_needed(deviation)
    random = np.random.default_rng(0)
    samples = random.normal(math.log(1.05), deviation, (4000, seeds))
    assert np.mean(stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05) == pytest.approx(
        0.8, abs=0.06
    )
    assert seeds_needed(0.0) == 2 and seeds_needed(1e-6) == 2
    assert seeds_needed(1e9) == 100_000
    assert [seeds_needed(d) for d in (0.003, 0.004, 0.0055, 0.009, 0.012)] == [2, 2, 3, 3, 3]
    found = [seeds_needed(float(d)) for d in np.linspace(0.001, 0.1, 200)]
    assert found == sorted(found)  # more noise never needs fewer seeds


@pytest.mark.parametrize(
    ("curve", "lower", "wanted"),
    [([5, 3, 4], True, 20), ([5, 4, 3.5], True, math.inf), ([1, 3, 2], False, 20), ([3, 9], True, 10),
     ([math.nan, 2], True, 20), ([], True, math.inf)],
)  # fmt: skip
def test_time_to_target(curve: list[float], lower: bool, wanted: float) -> None:
    steps = [10, 20, 30][: len(curve)]
    assert time_to_target(curve, steps, 3.0, lower) == wanted


def test_a_performance_profile_is_a_count_of_problems() -> None:
    random = np.random.default_rng(3)
    times = {name: list(random.choice([1.0, 2.0, 3.0, 7.0, math.inf], 40)) for name in "abc"}
    times["c"][0] = times["b"][0] = times["a"][0] = math.inf  # nobody reaches it
    limits = [1.0, 1.5, 2.0, 4.0, 100.0]
    found = performance_profile(times, limits)
    for name, own in times.items():
        for limit, value in zip(limits, found[name], strict=True):
            best = [min(times[n][i] for n in times) for i in range(40)]
            within = sum(
                math.isfinite(o) and o <= limit * b for o, b in zip(own, best, strict=True)
            )
            assert value == pytest.approx(within / 40)


def test_the_score_of_a_profile_is_its_area() -> None:
    ratios = [1.0, 1.0, 1.7, 3.2, 9.0, math.inf]
    grid = np.linspace(1, 4, 30_001)
    area = np.mean([[ratio <= limit for ratio in ratios] for limit in grid])
    assert profile_score(ratios) == pytest.approx(area, abs=1e-4)
    assert profile_score([1.0, 1.0]) == 1.0 and profile_score([math.inf]) == 0.0
