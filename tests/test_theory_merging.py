"""Merging: the trajectory identity, gradient descent on real quadratics, published coefficients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak.rules import Uniform
from polyak.theory import coefficients, learning_rate_decay, learning_rate_profile, qam, wsm

Array = npt.NDArray[np.float64]
SHAPES = ["linear", "sqrt", "cosine"]
unit = st.floats(0, 1)
falling = st.lists(unit, min_size=1, max_size=30).map(lambda w: sorted(w, reverse=True))
any_order = st.lists(unit, min_size=1, max_size=30)


def descent(gradient: Callable[[Array], Array], start: Array, rates: Sequence[float]) -> Array:
    """The checkpoints of gradient descent: the start, and the weights after every step."""
    checkpoints = [start]
    for rate in rates:
        checkpoints.append(checkpoints[-1] - rate * gradient(checkpoints[-1]))
    return np.stack(checkpoints)


def quadratic(seed: int, size: int = 6) -> tuple[Callable[[Array], Array], Array]:
    """The gradient of a random quadratic of curvatures up to 1, and a start."""
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.normal(size=(size, size)))[0]
    hessian = rotation @ np.diag(random.uniform(0.01, 1, size)) @ rotation.T
    minimum = random.normal(size=size)
    return lambda weights: hessian @ (weights - minimum), random.normal(size=size)


# wsm


@given(falling)
def test_wsm_scales_the_changes_between_checkpoints(w: list[float]) -> None:
    """merge = theta_0 - sum_i w_i u_i, on any trajectory; all coefficients >= 0, of sum 1."""
    trajectory = np.random.default_rng(len(w)).normal(size=(len(w) + 1, 5)).cumsum(axis=0)
    changes = trajectory[:-1] - trajectory[1:]
    c = wsm(w)
    np.testing.assert_allclose(c @ trajectory, trajectory[0] - w @ changes, atol=1e-12)
    assert c.min() >= 0 and c.sum() == pytest.approx(1, abs=1e-12)


@given(falling)
def test_wsm_and_the_learning_rate_profile_are_inverse(w: list[float]) -> None:
    np.testing.assert_allclose(learning_rate_profile(wsm(w)), [1, *w], atol=1e-14)
    c = wsm(w)
    np.testing.assert_allclose(wsm(np.minimum(learning_rate_profile(c)[1:], 1)), c, atol=1e-14)


@given(falling)
def test_wsm_is_the_decayed_run_where_the_gradient_stays(w: list[float]) -> None:
    slope = np.array([1.0, -2.0, 0.5])
    run = descent(lambda _: slope, np.ones(3), [0.3] * len(w))
    decayed = descent(lambda _: slope, np.ones(3), [0.3 * each for each in w])[-1]
    np.testing.assert_allclose(wsm(w) @ run, decayed, atol=1e-12)


# Named decays


def test_the_published_coefficients_of_the_square_root_decay() -> None:
    """w_i = 1 - sqrt(i / 4) of WSM, whose last coefficient is 0: our four checkpoints."""
    c = wsm(learning_rate_decay("sqrt", 4))
    np.testing.assert_allclose(c, [0.5, 0.2071, 0.1589, 0.1340], atol=5e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpoints", [2, 3, 10, 101])
def test_other_ways_of_counting_only_leave_out_a_checkpoint(shape: str, checkpoints: int) -> None:
    """f(i / k), i = 1 .. k, leaves out the last of k + 1 checkpoints; f((i - 1) / k) the first."""
    decay: dict[str, Callable[[float], float]] = {
        "linear": lambda x: 1 - x,
        "sqrt": lambda x: 1 - math.sqrt(x),
        "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
    }
    points = [decay[shape](i / checkpoints) for i in range(checkpoints + 1)]
    points[-1] = 0.0
    ours = wsm(learning_rate_decay(shape, checkpoints))
    assert ours.shape == (checkpoints,) and ours.min() > 0
    np.testing.assert_allclose(wsm(points[1:]), [*ours, 0], atol=1e-15)
    np.testing.assert_allclose(wsm(points[:-1]), [0, *ours], atol=1e-15)


@pytest.mark.parametrize("checkpoints", [2, 7, 64])
def test_a_linear_decay_is_the_uniform_mean(checkpoints: int) -> None:
    merged = wsm(learning_rate_decay("linear", checkpoints))
    np.testing.assert_allclose(merged, coefficients(Uniform(), [1.0] * checkpoints), atol=1e-15)


# qam


@given(any_order, st.integers(0, 5))
def test_qam_is_the_decayed_run_on_a_quadratic(w: list[float], seed: int) -> None:
    gradient, start = quadratic(seed)
    run = descent(gradient, start, [0.9] * len(w))
    decayed = descent(gradient, start, [0.9 * each for each in w])[-1]
    np.testing.assert_allclose(qam(w) @ run, decayed, atol=1e-12)


def test_wsm_is_not_the_decayed_run_on_a_quadratic() -> None:
    """Where `qam` is exact to rounding, `wsm` is off by a hundredth."""
    gradient, start = quadratic(0)
    w = learning_rate_decay("sqrt", 9)
    run = descent(gradient, start, [0.9] * len(w))
    decayed = descent(gradient, start, (0.9 * w).tolist())[-1]
    assert np.linalg.norm(wsm(w) @ run - decayed) > 0.01
    assert np.linalg.norm(qam(w) @ run - decayed) < 1e-14


@given(st.lists(unit, min_size=1, max_size=8))
def test_qam_counts_the_intervals_taken(w: list[float]) -> None:
    """Coefficient j: the chance that j of independent events of chances w happen."""
    expected = np.zeros(len(w) + 1)
    for happened in itertools.product([False, True], repeat=len(w)):
        chance = [p if yes else 1 - p for p, yes in zip(w, happened, strict=True)]
        expected[sum(happened)] += math.prod(chance)
    np.testing.assert_allclose(qam(w), expected, atol=1e-14)


@given(falling)
def test_qam_sums_to_one_and_has_the_mean_of_wsm(w: list[float]) -> None:
    c, index = qam(w), np.arange(len(w) + 1)
    assert c.min() >= 0 and c.sum() == pytest.approx(1, abs=1e-12)
    assert c @ index == pytest.approx(wsm(w) @ index, abs=1e-12)
    np.testing.assert_allclose(qam(w[::-1]), c, atol=1e-14)


def test_qam_of_equal_multipliers_is_binomial() -> None:
    expected = [math.comb(1000, j) * 0.3**j * 0.7 ** (1000 - j) for j in range(300, 310)]
    np.testing.assert_allclose(qam([0.3] * 1000)[300:310], expected, rtol=1e-10)


@pytest.mark.parametrize("merge", [wsm, qam])
def test_the_ends_are_checkpoints(merge: Callable[[Sequence[float]], Array]) -> None:
    """No learning rate at all is the oldest checkpoint; an undecayed one is the newest."""
    np.testing.assert_array_equal(merge([0.0, 0.0]), [1, 0, 0])
    np.testing.assert_array_equal(merge([1.0, 1.0]), [0, 0, 1])
    assert not np.signbit(merge([1.0, 0.5])).any()


# Errors.

SHAPE = "wanted (intervals,): one for each interval between checkpoints"
BOTH: list[tuple[object, str]] = [
    ([], f"multipliers have shape (0,), {SHAPE}"),
    (0.5, f"multipliers have shape (), {SHAPE}"),
    ([[0.5]], f"multipliers have shape (1, 1), {SHAPE}"),
    ([1.0, 1.5], "multipliers have 1.5 at index 1, wanted numbers in [0, 1]"),
    ([-0.25], "multipliers have -0.25 at index 0, wanted numbers in [0, 1]"),
    ([0.5, math.nan], "multipliers have nan at index 1, wanted numbers in [0, 1]"),
]
RISE = (
    "multipliers rise from 0.2 to 0.5 at index 2, wanted none larger than the one before: it would"
    " give a coefficient below 0"
)
ERRORS: list[tuple[Callable[[], object], str]] = [
    *((lambda w=w: wsm(w), message) for w, message in BOTH),
    *((lambda w=w: qam(w), message) for w, message in BOTH),
    (lambda: wsm([0.5, 0.2, 0.5]), RISE),
    (
        lambda: learning_rate_decay("1-sqrt", 5),
        "shape is '1-sqrt', wanted one of 'linear', 'sqrt', 'cosine'",
    ),
    *(
        (
            lambda count=count: learning_rate_decay("sqrt", count),
            f"checkpoints is {count}, wanted an integer >= 2: a decay is between checkpoints",
        )
        for count in (0, 1, 4.0, True)
    ),
]


@pytest.mark.parametrize(("make", "message"), ERRORS)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
