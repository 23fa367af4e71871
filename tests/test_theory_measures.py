"""Measures of profiles against their closed forms, and every error message."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import comb, gammaln

from polyak.decays import (
    AnytimeTail,
    HalfLifeRamp,
    InversePower,
    Polynomial,
    Ratio,
)
from polyak.rules import Bema, Exponential, Power, Rule, Tail, Uniform, Window
from polyak.theory import (
    coefficients,
    cutoff,
    effective_window,
    explain,
    frequency_response,
    half_life,
    initial_weight,
    learning_rate_profile,
    mean_age,
    noise_gain,
    profile,
    ramp_lag,
    relative_std,
    step_response,
)
from quick import slow_if
from rule_examples import RULE_EXAMPLES, each_rule

Array = npt.NDArray[np.float64]
ALL = [rule for examples in RULE_EXAMPLES.values() for rule in examples]
every_rule = pytest.mark.parametrize("rule", each_rule(ALL), ids=str)
decays_ = pytest.mark.parametrize("b", [0.3, 0.9, 0.99, 0.999])
sizes = pytest.mark.parametrize("n", [2, 10, 100])


@decays_
def test_long_exponential(b: float) -> None:
    c = profile(Exponential(b), 60_000)
    assert half_life(c) == pytest.approx(np.log(2) / -np.log(b), rel=1e-9)
    assert mean_age(c) == ramp_lag(c) == pytest.approx(b / (1 - b), rel=1e-9)
    assert noise_gain(c) == pytest.approx((1 - b) / (1 + b), rel=1e-9)
    assert effective_window(c) == pytest.approx((1 + b) / (1 - b), rel=1e-9)
    std = relative_std(c)
    assert std is not None
    assert std * 60_000 == pytest.approx(np.sqrt(b) / (1 - b), rel=1e-6)
    np.testing.assert_allclose(step_response(c)[:50], 1 - b ** np.arange(1, 51), atol=1e-11)


@decays_
@pytest.mark.parametrize("t", [5, 50])
def test_short_exponential(b: float, t: int) -> None:
    """The first update copies: lag (b - b^t) / (1 - b), and a noise gain with the start's weight."""
    c = profile(Exponential(b), t)
    assert initial_weight(c) == pytest.approx(b ** (t - 1))
    start = b ** (2 * (t - 1))
    assert noise_gain(c) == pytest.approx(start + (1 - b) ** 2 * (1 - start) / (1 - b**2))
    assert ramp_lag(c) == pytest.approx((b - b**t) / (1 - b))


@decays_
@pytest.mark.parametrize("t", [5, 50])
def test_debiased_exponential(b: float, t: int) -> None:
    c = profile(Exponential(b, debias=True), t)
    assert ramp_lag(c) == pytest.approx(b / (1 - b) - t * b**t / (1 - b**t))
    assert noise_gain(c) == pytest.approx((1 - b) * (1 + b**t) / ((1 + b) * (1 - b**t)))


@sizes
def test_window(n: int) -> None:
    c = profile(Window(n), 1000)
    assert half_life(c) == pytest.approx(n / 2)
    assert mean_age(c) == pytest.approx((n - 1) / 2)
    assert [noise_gain(c), effective_window(c)] == pytest.approx([1 / n, n])
    w = np.linspace(0.01, 3, 20)
    expected = np.abs(np.sin(n * w / 2) / (n * np.sin(w / 2)))
    np.testing.assert_allclose(frequency_response(c, w).magnitude, expected, atol=1e-12)


@decays_
def test_a_window_and_an_exponential_of_its_span_have_lag_and_calm_in_common(b: float) -> None:
    n = round((1 + b) / (1 - b))
    ema, mean = profile(Exponential.from_span(n), 60_000), profile(Window(n), 60_000)
    assert mean_age(ema) == pytest.approx(mean_age(mean), rel=1e-9)
    assert noise_gain(ema) == pytest.approx(noise_gain(mean), rel=1e-9)


@pytest.mark.parametrize("g", [0.0, 1.0, 3.0, 16.97])
def test_power(g: float) -> None:
    t = 20_000
    c = profile(Power(g), t)
    i = np.arange(1, t + 1)
    np.testing.assert_allclose(c, (i / t) ** (g + 1) - ((i - 1) / t) ** (g + 1), atol=1e-12)
    assert mean_age(c) == pytest.approx(np.sum((i[:-1] / t) ** (g + 1)), rel=1e-9)
    assert mean_age(c) == pytest.approx(t / (g + 2) - 0.5, rel=1e-3)
    assert noise_gain(c) == pytest.approx((g + 1) ** 2 / ((2 * g + 1) * t), rel=1e-3)
    continuous = np.sqrt(g + 1) / ((g + 2) * np.sqrt(g + 3))
    assert relative_std(c) == pytest.approx(continuous, rel=1e-3)


@pytest.mark.parametrize("s", [0.02, 0.05, 0.1, 0.25, 0.3])
def test_edm2_relative_std_round_trip(s: float) -> None:
    """The profile of `from_relative_std(s)` has relative std s."""
    assert relative_std(profile(Power.from_relative_std(s), 20_000)) == pytest.approx(s, rel=1e-3)


def test_crowson_is_the_running_mean_and_shamir_zhang() -> None:
    mean = profile(Exponential(InversePower(power=1.0)), 300)
    np.testing.assert_allclose(mean, profile(Uniform(), 300), rtol=1e-11)
    for g in (2.0, 3.5):
        crowson = profile(Exponential(InversePower(inv_gamma=g, power=1.0)), 300)
        shamir_zhang = profile(Exponential(Polynomial(g - 1)), 300)
        np.testing.assert_allclose(crowson, shamir_zhang, rtol=1e-10)


@pytest.mark.parametrize("eta", [0, 1, 3])
def test_shamir_zhang_weighs_by_binomials(eta: int) -> None:
    """w_i is in proportion to C(i + eta - 1, eta); eta 1 is w_i ~ i."""
    i = np.arange(1, 101)
    weights = comb(i + eta - 1, eta)
    c = profile(Exponential(Polynomial(eta)), 100)
    np.testing.assert_allclose(c, weights / weights.sum(), rtol=1e-10)


def test_ratio_warm_up_is_a_polynomial_of_exponent_eight() -> None:
    """TensorFlow: w_i ~ Gamma(i + 9) / Gamma(i + 1) while it ramps, but for the copy at i = 1."""
    t = 5000
    c = profile(Exponential(Ratio(0.9999)), t)
    i = np.arange(2, t + 1)
    shape = np.exp(gammaln(i + 9) - gammaln(i + 1))
    np.testing.assert_allclose(c[1:] / c[-1], shape / shape[-1], rtol=1e-9)
    assert mean_age(c) == pytest.approx(t / 10, rel=0.01)
    assert relative_std(c) == pytest.approx(0.0905, abs=1e-4)
    assert relative_std(profile(Power(8.0), t)) == pytest.approx(0.0905, abs=1e-4)


@pytest.mark.parametrize("n", [1, 5, 20])
def test_ratio_warm_up_leaves_one_over_a_binomial_on_the_start(n: int) -> None:
    """From an initial value that is update 0: decays 1/10 ... n/(n + 9) leave 1 / C(n + 9, 9)."""
    kept = np.prod([Ratio(0.9999)(t) for t in range(1, n + 1)])
    assert kept == pytest.approx(1 / comb(n + 9, 9))
    # The first update copies, so our profile leaves on it the product without the first factor.
    c = profile(Exponential(Ratio(0.9999)), n)
    assert initial_weight(c) == pytest.approx(10 / comb(n + 9, 9))


def test_mean_teacher_includes_its_initial_weights() -> None:
    """min(1 - 1/(step + 1), a) from the construction weights is the mean of them and the iterates.

    With the construction as first update it is our mean until step = a / (1 - a).
    """
    c = profile(Exponential(InversePower(power=1.0, max_decay=0.99)), 90)
    np.testing.assert_allclose(c, np.full(90, 1 / 90), rtol=1e-11)


@pytest.mark.parametrize("ratio", [0.05, 0.09])
def test_half_life_ramp_is_a_power_average(ratio: float) -> None:
    ramp = profile(Exponential(HalfLifeRamp(1e9, ratio=ratio)), 10_000)
    power = profile(Power(np.log(2) / ratio - 1), 10_000)
    assert np.abs(ramp - power).sum() < 0.01
    assert relative_std(power) == pytest.approx({0.05: 0.063, 0.09: 0.102}[ratio], abs=5e-4)


@pytest.mark.parametrize("c", [0.1, 0.5])
def test_anytime_tail_has_the_variance_of_its_tail_at_every_time(c: float) -> None:
    """GEA: noise gain 1 / (c t) at every t once its decay is one; before, the mean's 1 / t."""
    for t in (2, 10, 11, 100, 1000):
        gain = noise_gain(profile(Exponential(AnytimeTail(c)), t))
        begun = t * (t - 1) >= (1 - c) / c**2
        assert gain == pytest.approx(1 / (c * t) if begun else 1 / t, rel=1e-9)


@pytest.mark.parametrize("horizon", [1, 7, 400])
def test_bema_is_exact_on_quadratics(horizon: int) -> None:
    """With fraction 1/n and alpha = 1 / (lr h T) the minimum mu is found exactly, without noise.

    gamma = 1, rho = 1, kappa = 1 is the mean of the iterates; alpha at the readout is scaled in.
    """
    mu, h, lr, start = 2.0, 0.7, 0.1, -5.0
    live = mu + (start - mu) * (1 - lr * h) ** np.arange(horizon + 1)
    c = profile(Bema(kappa=1.0, eta=1.0, gamma=1.0, rho=1.0), horizon)
    mean = profile(Uniform(), horizon)
    extrapolated = (c - mean) * horizon  # alpha is 1 / T: live - anchor
    ends = np.zeros(horizon)
    ends[-1] += 1
    ends[0] -= 1
    np.testing.assert_allclose(extrapolated, ends, atol=1e-12)
    exact = mean @ live[:horizon] + (live[horizon] - live[0]) / (lr * h * horizon)
    assert exact == pytest.approx(mu, abs=1e-12)


def test_bema_without_its_bias_term_is_an_exponential_with_a_schedule() -> None:
    c = profile(Bema(eta=1e9, rho=2.0), 200)
    assert c.min() >= 0
    leading = profile(Bema(), 200)
    assert mean_age(leading) < 0 < mean_age(c)
    assert relative_std(leading) is None


@given(rho=st.floats(-0.95, 0.95), b=st.floats(0.1, 0.95))
def test_noise_gain_of_ar1_input(rho: float, b: float) -> None:
    """(1 - b)(1 + b rho) / ((1 + b)(1 - b rho)) for a long EMA."""
    gain = noise_gain(profile(Exponential(b), 2000), correlation=rho)
    expected = (1 - b) * (1 + b * rho) / ((1 + b) * (1 - b * rho))
    assert gain == pytest.approx(expected, rel=1e-7)


@sizes
@pytest.mark.parametrize("rho", [0.0, 0.5, -0.3, 0.999])
def test_noise_gain_of_ar1_input_through_a_window(n: int, rho: float) -> None:
    gain = noise_gain(profile(Window(n), 200), correlation=rho)
    bracket = (1 + rho) / (1 - rho) - 2 * rho * (1 - rho**n) / (n * (1 - rho) ** 2)
    assert gain == pytest.approx(bracket / n, rel=1e-6)


def test_two_points_apart() -> None:
    c = np.zeros(10)
    c[[2, 9]] = 0.5
    assert noise_gain(c, correlation=0.8) == pytest.approx((1 + 0.8**7) / 2)


def test_a_coarser_cadence_costs_on_white_noise_and_nothing_on_correlated() -> None:
    """b = .99, every 16 steps: white .0050 -> .080; AR(.999) .9095 -> .9099."""
    dense, sparse = (profile(Exponential(0.99), 8000, every=k) for k in (1, 16))
    gains = [noise_gain(c, correlation=r) for r in (0.0, 0.999) for c in (dense, sparse)]
    assert gains == pytest.approx([0.0050, 0.0802, 0.9095, 0.9099], abs=1e-4)


def test_mean_age_at_a_coarser_cadence() -> None:
    """k B / (1 - B) just after an update, B = b^k the decay of one update."""
    c = profile(Exponential(0.99), 8001, every=16)
    assert mean_age(c) == pytest.approx(16 * 0.99**16 / (1 - 0.99**16), rel=1e-9)


@every_rule
def test_group_delay_of_slow_signals_is_the_mean_age(rule: Rule) -> None:
    c = profile(rule, 200)
    slow = 1e-6
    delay = -frequency_response(c, [slow]).phase[0] / slow
    assert delay == pytest.approx(mean_age(c), rel=1e-4, abs=1e-6)


@every_rule
def test_a_ramp_lags_by_the_mean_age(rule: Rule) -> None:
    c = profile(rule, 200)
    ramp = np.arange(200.0)
    assert ramp[-1] - c @ ramp == pytest.approx(ramp_lag(c), abs=1e-9)


@every_rule
def test_the_learning_rate_profile_identity(rule: Rule) -> None:
    """average = x_0 - sum_i W_i u_i on any trajectory, and the profile back from W."""
    x = np.random.default_rng(1).normal(size=121).cumsum()
    c = profile(rule, 120)
    multiplier = learning_rate_profile(c)
    assert x[0] - multiplier @ (x[:-1] - x[1:]) == pytest.approx(c @ x[1:], abs=1e-10)
    np.testing.assert_allclose(multiplier - np.append(multiplier[1:], 0), c, atol=1e-12)


def test_every_array_is_contiguous_and_its_own() -> None:
    """`torch.from_numpy` takes no view that runs backwards."""
    c, w = profile("exponential(0.9)", 50), np.linspace(1, 0, 20)[::-1]
    arrays = [c, step_response(c), learning_rate_profile(c), *frequency_response(c, w)]
    arrays += [*frequency_response(c), coefficients("uniform()", [1.0, 2.0])]
    for array in arrays:
        assert array.flags.c_contiguous and array.flags.owndata and array.strides == (8,)
    assert not np.shares_memory(arrays[3], w)


@every_rule
def test_the_spectrum_is_that_of_the_definition(rule: Rule) -> None:
    c = profile(rule, 130)
    w = np.linspace(-4, 4, 33)
    naive = np.array([np.sum(c[::-1] * np.exp(-1j * each * np.arange(130))) for each in w])
    found = frequency_response(c, w)
    np.testing.assert_allclose(found.magnitude * np.exp(1j * found.phase), naive, atol=1e-11)


@every_rule
def test_the_gain_at_the_cutoff_is_half_and_above_it_below(rule: Rule) -> None:
    c = profile(rule, 150)
    cut = cutoff(c)
    w = np.linspace(0, np.pi if cut is None else cut * (1 - 1e-9), 500)
    assert np.all(frequency_response(c, w).magnitude ** 2 >= 0.5 - 1e-9)
    if cut is not None:
        assert frequency_response(c, [cut]).magnitude[0] ** 2 == pytest.approx(0.5)


def test_no_cutoff_below_three_minus_two_root_two() -> None:
    limit = 3 - 2 * np.sqrt(2)
    assert cutoff(profile(Exponential(limit - 1e-4), 500)) is None
    assert cutoff(profile(Exponential(limit + 1e-4), 500)) == pytest.approx(np.pi, abs=0.1)


def test_default_frequencies() -> None:
    frequencies, magnitude, phase = frequency_response(profile("exponential(0.9)", 100))
    assert (frequencies[0], frequencies[-1]) == (pytest.approx(0.01), pytest.approx(np.pi))
    assert frequencies.shape == magnitude.shape == phase.shape == (400,)


@pytest.mark.parametrize(
    ("c", "age"),
    [
        ([1.0], 0.0),
        ([0.0, 1.0, 0.0, 0.0], 2.0),
        ([0.5, 0.5], 1.0),
        ([0.9, 0.1], 1.0),
        ([0.25, 0.75], 0.5),
        ([-1.0, 1.0, 1.0], 0.0),
    ],
)
def test_half_life_of_short_profiles(c: list[float], age: float) -> None:
    assert half_life(c) == pytest.approx(age)


@every_rule
@pytest.mark.parametrize("every", [1, 3])
def test_an_explanation_gathers_the_measures(rule: Rule, every: int) -> None:
    about = explain(rule, 100, every=every)
    c = profile(rule, 100, every=every)
    assert (about.rule, about.steps, about.every) == (rule, 100, every)
    assert about.half_life == half_life(c) and about.mean_age == about.ramp_lag == mean_age(c)
    assert about.effective_window == effective_window(c) and about.noise_gain == noise_gain(c)
    assert about.relative_std == relative_std(c) and about.cutoff == cutoff(c)
    assert about.initial_weight == c[0]
    assert [row[0] in str(about) for row in about.rows()] == [True] * 8
    assert about.as_dict()["rule"] == str(rule)


@pytest.mark.parametrize(
    ("rule", "every", "steps"),
    [
        (Exponential(0.9), 1, 1000),
        (Exponential(0.999), 1, 32_000),
        (Exponential(0.999), 16, 32_241),
        slow_if((Uniform(), 1, 10_000), True),
        (Uniform(), 7, 9_997),
        (Tail(Exponential(0.9), 3000), 1, 4000),
    ],
    ids=str,
)
def test_explain_chooses_steps(rule: Rule, every: int, steps: int) -> None:
    assert explain(rule, every=every).steps == steps


WANTED = "wanted one dimension: the coefficient of each step, oldest first"
ERRORS: list[tuple[Callable[[], object], str]] = [
    (lambda: mean_age([[1.0]]), f"a profile has shape (1, 1), {WANTED}"),
    (lambda: half_life([]), f"a profile has shape (0,), {WANTED}"),
    (lambda: cutoff(1.0), f"a profile has shape (), {WANTED}"),
    (
        lambda: step_response([1.0, np.nan]),
        "a profile has nan at index 1, wanted finite numbers",
    ),
    (
        lambda: relative_std([0.5, 0.4]),
        "a profile sums to 0.9, wanted 1: pass what polyak.theory.profile returns",
    ),
    (
        lambda: noise_gain([1.0], correlation=1.0),
        "correlation is 1.0, wanted a number in (-1, 1)",
    ),
    (
        lambda: frequency_response([1.0], [np.inf]),
        "frequencies is [inf], wanted a one-dimensional array of finite radians per step",
    ),
]


@pytest.mark.parametrize(("make", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
