"""Cadence: the largest `every` whose displacement of the profile stays below an error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak import theory
from polyak.rules import Bema, Exponential, Power, Rule, Tail, Uniform, Window


@pytest.mark.slow
@given(decay=st.floats(0.9, 0.9995), error=st.floats(0.005, 0.2))
@settings(max_examples=20)
def test_it_is_the_largest_within_the_error(decay: float, error: float) -> None:
    rule, steps = Exponential(decay), 20_000
    every = theory.cadence(rule, error=error, steps=steps)
    if every > 1:
        assert theory.displacement(rule, steps, every=every) <= error
    assert theory.displacement(rule, steps, every=every + 1) > error


@pytest.mark.parametrize("every", [2, 16, 100])
def test_displacement_of_an_exponential_has_its_closed_form(every: int) -> None:
    decay = 0.999
    # Within a block of k steps all weight moves to the newest: its mean distance from there is
    # 1/(1-d) - k d^k/(1-d^k) - 1.
    moved = 1 / (1 - decay) - every * decay**every / (1 - decay**every) - 1
    found = theory.displacement(Exponential(decay), 40_000, every=every)
    assert found == pytest.approx(moved / (decay / (1 - decay)), rel=1e-9)


def test_the_half_life_stays() -> None:
    every = theory.cadence("exponential(0.999)", error=0.05)
    sparse = theory.half_life(theory.profile("exponential(0.999)", 20_000, every=every))
    dense = theory.half_life(theory.profile("exponential(0.999)", 20_000))
    assert sparse == pytest.approx(dense, abs=every)


def test_growing_windows_are_judged_at_the_step_given() -> None:
    assert theory.cadence(Uniform(), steps=1000) == pytest.approx(15, abs=1)
    assert theory.cadence(Uniform(), steps=10_000) == pytest.approx(150, abs=1)
    assert theory.cadence(Power(3.0), steps=10_000) < theory.cadence(Uniform(), steps=10_000)


def test_a_window_counts_updates_and_a_copy_has_no_age() -> None:
    assert theory.cadence(Window(100)) == 1
    assert theory.cadence(Exponential(0.0)) == 1


@pytest.mark.slow
def test_a_rule_that_only_copies_at_first_needs_the_number_of_steps() -> None:
    assert theory.cadence(Tail(Exponential(0.0), 50_000)) == 1
    with pytest.raises(ValueError, match=r"still copies .* after 10000 steps.* pass steps="):
        theory.cadence(Tail(Exponential(0.99), 1_000_000))
    assert theory.cadence(Tail(Exponential(0.99), 1_000_000), steps=1_000) == 1


@pytest.mark.parametrize("rule", [Exponential(0.99), Uniform(), Power(3.0)], ids=str)
def test_the_divisor_is_the_mean_age_without_negative_coefficients(rule: Rule) -> None:
    fine, coarse = theory.profile(rule, 993), theory.profile(rule, 993, every=8)
    moved = np.abs(np.cumsum(coarse - fine)).sum()
    found = theory.displacement(rule, 1000, every=8)
    assert found == pytest.approx(moved / theory.mean_age(fine), rel=1e-12)


@pytest.mark.parametrize("rule", [Bema(), Bema(rho=1.0), Tail(Bema(), 300)], ids=str)
def test_a_rule_that_extrapolates_has_a_positive_displacement(rule: Rule) -> None:
    """Its mean age is below 0, so a share of that would let every cadence pass."""
    assert theory.mean_age(theory.profile(rule, 2000)) < 0
    shares = [theory.displacement(rule, 2000, every=every) for every in (1, 2, 10, 100)]
    assert shares[0] == 0 and shares == sorted(shares) and shares[1] > 0
    for error in (0.01, 0.2):
        every = theory.cadence(rule, error=error, steps=2000)
        assert theory.displacement(rule, 2000, every=every) <= error
        assert theory.displacement(rule, 2000, every=every + 1) > error


def test_without_an_age_only_every_step_is_the_same() -> None:
    shares = [theory.displacement("exponential(0)", 10, every=every) for every in (1, 2)]
    assert shares == [0.0, float("inf")]


def test_steps_may_be_those_of_numpy() -> None:
    steps = np.int64(1000)
    assert theory.cadence(Uniform(), steps=steps) == theory.cadence(Uniform(), steps=1000)  # type: ignore[arg-type]
    assert theory.displacement(Uniform(), np.int64(10), every=np.int64(1)) == 0  # type: ignore[arg-type]


COUNT = "wanted an integer >= 1"
ERRORS: list[tuple[Callable[[], object], str]] = [
    (lambda: theory.cadence("uniform()", steps=0), f"steps is 0, {COUNT}"),
    (lambda: theory.cadence("uniform()", steps=-4), f"steps is -4, {COUNT}"),
    (lambda: theory.cadence("uniform()", steps=2.5), f"steps is 2.5, {COUNT}"),  # type: ignore[arg-type]
    (lambda: theory.displacement("uniform()", 0, every=1), f"steps is 0, {COUNT}"),
    (lambda: theory.displacement("uniform()", 9, every=0), f"every is 0, {COUNT}"),
    (
        lambda: theory.cadence("uniform()", steps=10**9),
        "steps is 1000000000, wanted at most 100,000,000: a profile holds a coefficient for every"
        " step",
    ),
]


@pytest.mark.parametrize(("make", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize("error", [0, 1, -0.1, float("nan"), "0.1", None])
def test_an_error_is_a_share(error: float) -> None:
    with pytest.raises(
        ValueError, match=r"error is .*, wanted a share of the mean age in \(0, 1\)"
    ):
        theory.cadence("uniform()", error=error)
