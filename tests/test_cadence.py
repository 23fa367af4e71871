"""Cadence: the largest `every` whose displacement of the profile stays below an error."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak import theory
from polyak.rules import Exponential, Power, Uniform, Window


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
    assert theory.cadence(Uniform(), steps=1000) == pytest.approx(10, abs=1)
    assert theory.cadence(Uniform(), steps=10_000) == pytest.approx(100, abs=1)
    assert theory.cadence(Power(3.0), steps=10_000) < theory.cadence(Uniform(), steps=10_000)


def test_a_window_counts_updates_and_a_copy_has_no_age() -> None:
    assert theory.cadence(Window(100)) == 1
    assert theory.cadence(Exponential(0.0)) == 1


@pytest.mark.parametrize("error", [0, 1, -0.1, float("nan")])
def test_an_error_is_a_share(error: float) -> None:
    with pytest.raises(
        ValueError, match=r"error is .*, wanted a share of the mean age in \(0, 1\)"
    ):
        theory.cadence("uniform()", error=error)
