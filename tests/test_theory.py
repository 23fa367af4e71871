"""Profiles: equal to a naive simulation for every rule; the article's statements T1 to T5."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak import theory
from polyak.rules import LIVE, START, Bema, Exponential, Power, Rule, Tail, Tick, Uniform, Window
from polyak.theory import coefficients, profile
from rule_examples import RULE_EXAMPLES, each_rule

Array = npt.NDArray[np.float64]
ALL = [rule for examples in RULE_EXAMPLES.values() for rule in examples]
every_rule = pytest.mark.parametrize("rule", each_rule(ALL), ids=str)


def simulate(rule: Rule, elapsed: list[float], live: Array) -> Array:
    """The average of `live[i]`, i the update: slots moved one by one, as the definition says."""
    slots: dict[str, Array] = {}
    tick = START
    for time, weights in zip(elapsed, live, strict=True):
        tick = rule.tick(tick, time)
        for slot, fraction in rule.fractions(tick).items():
            old = slots.get(slot, weights)
            slots[slot] = old + fraction * (weights - old)
    slots[LIVE] = live[-1]
    average: Array = sum(
        (c * slots[s] for s, c in rule.readout(tick).items()), np.zeros(live.shape[1])
    )
    return average


@every_rule
@settings(max_examples=15)
@given(elapsed=st.lists(st.floats(0.01, 50), min_size=1, max_size=40))
def test_coefficients_equal_the_naive_impulse_response(rule: Rule, elapsed: list[float]) -> None:
    found = coefficients(rule, elapsed)
    assert found.shape == (len(elapsed),) and found.dtype == np.float64
    np.testing.assert_allclose(found, simulate(rule, elapsed, np.eye(len(elapsed))), atol=1e-13)
    assert found.sum() == pytest.approx(1, abs=1e-12)


@every_rule
@settings(max_examples=15)
@given(steps=st.integers(1, 80), every=st.integers(1, 9))
def test_a_profile_is_the_coefficients_at_the_updates(rule: Rule, steps: int, every: int) -> None:
    found = profile(rule, steps, every=every)
    updates = np.arange(0, steps, every)
    expected = simulate(rule, [1.0, *np.diff(updates).tolist()], np.eye(steps)[updates])
    alpha = rule.readout(_last_tick(rule, len(updates), every)).get(LIVE, 0.0)
    expected[updates[-1]] -= alpha  # the live weights of the readout are the last step's
    expected[-1] += alpha
    np.testing.assert_allclose(found, expected, atol=1e-13)


def _last_tick(rule: Rule, updates: int, every: int) -> Tick:
    tick = rule.tick(START, 1.0)
    for _ in range(updates - 1):
        tick = rule.tick(tick, float(every))
    return tick


@every_rule
def test_a_long_profile_sums_to_one_without_denormal_numbers(rule: Rule) -> None:
    c = profile(rule, 20_000)
    assert c.sum() == pytest.approx(1, abs=1e-9)
    assert not np.any((c != 0) & (np.abs(c) < 1e-300))


@every_rule
def test_a_tail_is_the_inner_profile_on_the_last_steps(rule: Rule) -> None:
    tailed = profile(Tail(rule, 13), 50)
    np.testing.assert_allclose(tailed[13:], profile(rule, 37), atol=1e-15)
    assert not tailed[:13].any()


@every_rule
def test_within_a_burn_in_the_average_is_the_live_weights(rule: Rule) -> None:
    c = profile(Tail(rule, 100), 50)
    assert c[-1] == pytest.approx(1) and np.abs(c[:-1]).max() < 1e-15


def test_a_spec_serves_as_a_rule() -> None:
    np.testing.assert_array_equal(profile("window(3)", 5), profile(Window(3), 5))


def test_steps_may_be_those_of_numpy() -> None:
    steps, every = cast(tuple[int, int], (np.int64(6), np.int32(2)))
    np.testing.assert_array_equal(
        profile(Uniform(), steps, every=every), profile(Uniform(), 6, every=2)
    )
    about = theory.explain(Uniform(), steps, every=every)
    assert (
        json.loads(json.dumps(about.as_dict())) == theory.explain(Uniform(), 6, every=2).as_dict()
    )


@pytest.mark.parametrize("decay", [1 - 2**-53, 0.9999999999999998])
def test_a_debiased_average_of_decay_next_to_one_is_the_mean(decay: float) -> None:
    rule = Exponential(decay, debias=True)
    np.testing.assert_allclose(coefficients(rule, [0.1] * 3), [1 / 3] * 3, rtol=1e-12)
    np.testing.assert_allclose(profile(rule, 1000), profile(Uniform(), 1000), rtol=1e-9)


# The article's statements.


@given(decay=st.floats(0, 0.9999), steps=st.integers(2, 60))
def test_t1_recursion(decay: float, steps: int) -> None:
    """T1: avg_t = beta avg_{t-1} + (1 - beta) live_t, on a random walk."""
    live = np.random.default_rng(0).normal(size=steps).cumsum()
    average = live[0]
    for weights in live[1:]:
        average = decay * average + (1 - decay) * weights
    assert profile(Exponential(decay), steps) @ live == pytest.approx(average, abs=1e-12)


@given(decay=st.floats(0, 0.9999), steps=st.integers(1, 60))
def test_t2_expansion(decay: float, steps: int) -> None:
    """T2: (1 - beta) sum_i beta^i live_{t-i}, with what T2 leaves out: the term of the start."""
    ages = np.arange(steps - 1, -1, -1)
    expected = (1 - decay) * decay**ages
    expected[0] = decay ** (steps - 1)
    np.testing.assert_allclose(profile(Exponential(decay), steps), expected, atol=1e-13)


@given(decay=st.floats(0.01, 0.9999), steps=st.integers(1, 60))
def test_t3_bias_correction(decay: float, steps: int) -> None:
    """T3: a zero start divided by 1 - beta^t is the schedule beta (1 - beta^(t-1)) / (1 - beta^t)."""
    ages = np.arange(steps - 1, -1, -1)
    debiased = profile(Exponential(decay, debias=True), steps)
    np.testing.assert_allclose(debiased, (1 - decay) * decay**ages / (1 - decay**steps), rtol=1e-9)
    scheduled = [
        0.0,
        *(decay * (1 - decay ** (t - 1)) / (1 - decay**t) for t in range(2, steps + 1)),
    ]
    kept = [np.prod(scheduled[i + 1 :]) for i in range(steps)]
    np.testing.assert_allclose(debiased, (1 - np.array(scheduled)) * kept, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("decay", [0.2, 0.5, 0.9, 0.99, 0.999])
def test_t4_low_pass(decay: float) -> None:
    """T4: |H|, arg H and the cutoff 2 asin((1 - b) / (2 sqrt b)); larger beta cuts lower."""
    c = profile(Exponential(decay), 40_000)
    w, gain, phase = theory.frequency_response(c, np.linspace(0, np.pi, 50))
    expected = (1 - decay) / np.sqrt(1 - 2 * decay * np.cos(w) + decay**2)
    np.testing.assert_allclose(gain, expected, atol=1e-10)
    angle = -np.arctan2(decay * np.sin(w), 1 - decay * np.cos(w))
    np.testing.assert_allclose(phase, angle, atol=1e-8)
    cut = theory.cutoff(c)
    assert cut == pytest.approx(2 * np.arcsin((1 - decay) / (2 * np.sqrt(decay))), rel=1e-9)
    slower = theory.cutoff(profile(Exponential(decay + 0.0005), 40_000))
    assert cut and slower and slower < cut


@pytest.mark.parametrize("rule", [Exponential(0.99), Exponential(0.9, debias=True), Window(50)])
def test_t5_convergence(rule: Rule) -> None:
    """T5: live weights that converge to L take the average to L, for a fixed decay below 1."""
    steps = np.arange(1, 20_001)
    live = 3 + 1 / steps
    errors = [abs(profile(rule, t) @ live[:t] - 3) for t in (200, 2000, 20_000)]
    assert errors[0] > errors[1] > errors[2] < 1e-4


# Cadence.


@given(decay=st.floats(0.5, 0.999), every=st.integers(1, 20))
def test_cadence_samples_the_same_exponential(decay: float, every: int) -> None:
    """decay^every per update: the profile is the staircase of the EMA of every step."""
    updates = 30
    ages = every * np.arange(updates - 1, -1, -1)
    expected = (1 - decay**every) * decay**ages
    expected[0] = decay ** (every * (updates - 1))
    found = profile(Exponential(decay), updates * every, every=every)
    np.testing.assert_allclose(found[::every], expected, atol=1e-12)


@given(decay=st.floats(0.5, 0.999), every=st.integers(1, 20), extra=st.integers(0, 19))
def test_cadence_keeps_the_half_life_of_an_exponential(
    decay: float, every: int, extra: int
) -> None:
    half_life = np.log(2) / -np.log(decay)
    steps = every * int(40 * half_life / every + 2) + min(extra, every - 1)
    stale = (steps - 1) % every  # the newest update is that many steps old
    found = theory.half_life(profile(Exponential(decay), steps, every=every))
    assert found == pytest.approx(half_life + stale, rel=1e-9)


@given(gamma=st.floats(-0.9, 20), cuts=st.sets(st.integers(1, 99), max_size=20))
def test_power_telescopes_at_any_cadence(gamma: float, cuts: set[int]) -> None:
    """Weights (s^(g+1) - (s - dt)^(g+1)) / t^(g+1) exactly, whatever the times of the updates."""
    times = np.array([0, *sorted(cuts), 100])
    found = coefficients(Power(gamma), np.diff(times).tolist())
    expected = np.diff((times / 100) ** (gamma + 1))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)


@every_rule
def test_uniform_scaling_of_time_changes_only_rules_with_a_time_scale(rule: Rule) -> None:
    if isinstance(rule, (Power, Uniform, Window)):
        ones, tens = coefficients(rule, [1.0] * 30), coefficients(rule, [10.0] * 30)
        np.testing.assert_allclose(ones, tens, atol=1e-14)


# Errors.


@dataclass(frozen=True)
class Broken(Rule):
    def fractions(self, tick: Tick) -> dict[str, float]:
        return {"average": 0.5 / tick.n}


MOST = "wanted at most 100,000,000: a profile holds a coefficient for every step"
ERRORS: list[tuple[Callable[[], object], str]] = [
    (lambda: profile(Uniform(), 0), "steps is 0, wanted an integer >= 1"),
    (lambda: profile(Uniform(), 2.0), "steps is 2.0, wanted an integer >= 1"),  # type: ignore[arg-type]
    (lambda: profile(Uniform(), True), "steps is True, wanted an integer >= 1"),
    (lambda: profile(Uniform(), 3, every=-1), "every is -1, wanted an integer >= 1"),
    (lambda: profile(Uniform(), 10**30), f"steps is {10**30}, {MOST}"),
    (lambda: profile(Uniform(), 10**8 + 1), f"steps is 100000001, {MOST}"),
    (lambda: profile(Uniform(), 10**30, every=10**30), f"every is {10**30}, {MOST}"),
    (lambda: theory.explain(Uniform(), every=0), "every is 0, wanted an integer >= 1"),
    (lambda: theory.explain(Uniform(), every=1.5), "every is 1.5, wanted an integer >= 1"),  # type: ignore[arg-type]
    (lambda: theory.explain(Uniform(), every=10**17), f"every is {10**17}, {MOST}"),
    (lambda: theory.explain(Uniform(), 10**17), f"steps is {10**17}, {MOST}"),
    (lambda: theory.match(Window, like=Uniform(), steps=10**17), f"steps is {10**17}, {MOST}"),
    (
        lambda: coefficients(Bema(), []),
        "elapsed has shape (0,), wanted (updates,): the time that each update spans",
    ),
    (
        lambda: coefficients(Bema(), [[1.0]]),  # type: ignore[list-item]
        "elapsed has shape (1, 1), wanted (updates,): the time that each update spans",
    ),
    (lambda: coefficients(Bema(), [1, 0]), "elapsed has 0.0, wanted finite numbers > 0"),
    (lambda: coefficients(Bema(), [1, np.nan]), "elapsed has nan, wanted finite numbers > 0"),
    (lambda: coefficients(Bema(), [np.inf]), "elapsed has inf, wanted finite numbers > 0"),
    (
        lambda: profile(Broken(), 3),
        "broken() at Tick(n=1, t=1.0, elapsed=1.0, inner=None) first moves slot 'average' by 0.5,"
        " wanted 1: a slot has no value before its first copy",
    ),
]


@pytest.mark.parametrize(("make", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
