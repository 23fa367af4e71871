"""`match`: the member of a family with the lag or the calm of another average."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak.rules import Bema, Exponential, Power, Rule, Tail, Uniform, Window
from polyak.theory import match, mean_age, noise_gain, profile
from quick import some_quick

MEASURES = {"mean_age": mean_age, "noise_gain": noise_gain}
both = pytest.mark.parametrize("by", MEASURES)


@both
@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_an_exponential_like_a_window_has_its_span(n: int, by: str) -> None:
    found = match(Exponential, like=Window(n), by=by, steps=None if n > 1 else 50)
    assert isinstance(found, Exponential)
    assert found.decay == pytest.approx(Exponential.from_span(n).decay, rel=1e-10, abs=1e-12)


@both
@pytest.mark.parametrize(("decay", "size"), [(0.5, 3), (0.9, 19), (0.99, 199), (0.9876, 160)])
def test_a_window_like_an_exponential_has_the_nearest_size(
    decay: float, size: int, by: str
) -> None:
    assert match(Window, like=Exponential(decay), by=by) == Window(size)


@both
@settings(max_examples=20)
@given(decay=st.floats(0.01, 0.995))
def test_an_exponential_is_like_itself(decay: float, by: str) -> None:
    found = match(Exponential, like=Exponential(decay), by=by)
    assert cast(Exponential, found).decay == pytest.approx(decay, rel=1e-9)


@both
@settings(max_examples=20)
@given(gamma=st.floats(0.01, 50), steps=st.integers(50, 500))  # at 0 the noise gain is flat
def test_a_power_is_like_itself(gamma: float, steps: int, by: str) -> None:
    found = match(Power, like=Power(gamma), by=by, steps=steps)
    assert cast(Power, found).gamma == pytest.approx(gamma, rel=1e-6, abs=1e-6)


@both
@pytest.mark.parametrize("family", [Exponential, Power, Window])
@pytest.mark.parametrize("like", ["power(relative_std=0.1)", "tail(uniform(), 600)", "window(77)"])
def test_a_match_has_the_measure(family: type[Rule], like: str, by: str) -> None:
    measure = MEASURES[by]
    found = measure(profile(match(family, like=like, by=by, steps=1000), 1000))
    tolerance = 0.01 if family is Window else 1e-9
    assert found == pytest.approx(measure(profile(like, 1000)), rel=tolerance)


def test_a_match_waits_for_a_late_start() -> None:
    assert match(Window, like=Tail(Exponential(0.9), 5000)) == Window(19)


GROWS = (
    "its window grows with the run, or needs more than 262,144 updates; pass steps=, the number of"
    " steps after which to compare"
)
ERRORS: list[tuple[Callable[[], object], str]] = [
    (
        lambda: match(Uniform, like=Window(3)),
        "family is Uniform, wanted one of the rule classes Exponential, Window, Power",
    ),
    (
        lambda: match(Window, like=Window(3), by="half_life"),
        "by is 'half_life', wanted one of 'mean_age', 'noise_gain'",
    ),
    (
        lambda: match(Exponential, like=Uniform()),
        f"uniform() changes with the number of steps: {GROWS}",
    ),
    (
        lambda: match(Power, like=Window(3)),
        f"a power average changes with the number of steps: {GROWS}",
    ),
    (
        lambda: match(Window, like=Bema(), steps=100),
        "no Window has the mean_age of bema() after 100 steps: take another family or measure",
    ),
    (
        lambda: match(Power, like=Exponential(0.99), steps=10),
        "no Power has the mean_age of exponential(0.99) after 10 steps: take another family or"
        " measure",
    ),
    (lambda: match(Window, like=Window(3), steps=0), "steps is 0, wanted an integer >= 1"),
]


@pytest.mark.parametrize(
    ("make", "message"),
    some_quick(ERRORS, lambda each: not each[1].startswith("uniform() changes")),
    ids=[message for _, message in ERRORS],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
