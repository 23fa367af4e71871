"""Synthesis: least squares on dense profiles as the oracle, EDM2's closed forms, real trajectories."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from polyak.rules import LIVE, START, Bema, Exponential, Power, Rule, Uniform, Window
from polyak.specs import as_rule
from polyak.theory import Column, Fit, coefficients, fit
from rule_examples import RULE_EXAMPLES

Array = npt.NDArray[np.float64]
ALL = [rule for examples in RULE_EXAMPLES.values() for rule in examples]


# The definition: slots moved one by one.


def held(rule: Rule, elapsed: Sequence[float], live: Array) -> list[dict[str, Array]]:
    """What each slot holds after every update, and the live weights themselves."""
    slots: dict[str, Array] = {}
    history, tick = [], START
    for time, weights in zip(elapsed, live, strict=True):
        tick = rule.tick(tick, time)
        for slot, fraction in rule.fractions(tick).items():
            old = slots.get(slot, weights)
            slots[slot] = old + fraction * (weights - old)
        slots[LIVE] = weights
        history.append(dict(slots))
    return history


def averaged(rule: Rule, elapsed: Sequence[float], live: Array) -> Array:
    """The average after the last update."""
    slots, tick = held(rule, elapsed, live)[-1], START
    for time in elapsed:
        tick = rule.tick(tick, time)
    return np.asarray(sum(c * slots[slot] for slot, c in rule.readout(tick).items()))


def stored(columns: Sequence[Column], elapsed: Sequence[float], live: Array) -> Array:
    """What was stored, one row for each column."""
    histories = {rule: held(rule or Uniform(), elapsed, live) for rule, _, _ in columns}
    return np.stack([histories[rule][updates - 1][slot] for rule, slot, updates in columns])


def on_dense_profiles(columns: Sequence[Column], target: Rule, elapsed: Sequence[float]) -> Fit:
    """The same least squares by its normal equations' conditions, for columns far from alike."""
    impulses = np.eye(len(elapsed))
    a, b = stored(columns, elapsed, impulses).T, averaged(target, elapsed, impulses)
    base, others = a[:, -1:], a[:, :-1]  # the sum of 1, by the last column
    y = np.linalg.lstsq(others - base, b - base[:, 0], rcond=None)[0]
    c = np.append(y, 1 - y.sum())
    return Fit(c, float(np.linalg.norm(a @ c - b) / np.linalg.norm(b)), float(np.abs(c).sum()))


times = st.lists(st.floats(0.01, 50), min_size=1, max_size=40)
rules = st.sampled_from(ALL)


@st.composite
def columns_of(draw: st.DrawFn, elapsed: list[float]) -> list[Column]:
    """Some of all that some rules hold after some updates, and some live weights."""
    impulses = np.eye(len(elapsed))
    some = draw(st.lists(rules, min_size=1, max_size=3))
    choices = [
        Column(None if slot == LIVE else rule, slot, index + 1)
        for rule in some
        for index, slots in enumerate(held(rule, elapsed, impulses))
        for slot in slots
    ]
    return draw(st.lists(st.sampled_from(choices), min_size=1, max_size=12))


@given(data=st.data(), elapsed=times, target=rules)
def test_the_error_is_that_on_dense_profiles_and_nothing_is_nearer(
    data: st.DataObject, elapsed: list[float], target: Rule
) -> None:
    columns = data.draw(columns_of(elapsed))
    found = fit(columns, target, elapsed)
    c = found.coefficients
    assert c.shape == (len(columns),) and c.dtype == np.float64
    assert c.sum() == pytest.approx(1, abs=1e-12 * found.amplification)
    assert found.amplification == pytest.approx(np.abs(c).sum(), rel=1e-12)

    impulses = np.eye(len(elapsed))
    a, b = stored(columns, elapsed, impulses).T, averaged(target, elapsed, impulses)
    residual, size, rounding = a @ c - b, float(np.linalg.norm(b)), 1e-13 * found.amplification
    assert found.relative_error == pytest.approx(
        np.linalg.norm(residual) / size, abs=rounding / size
    )
    slope = (
        residual @ a
    )  # the same for every column: no exchange of weight between two comes nearer
    assert np.ptp(slope) <= 1e-9 * np.linalg.norm(a, 2) * np.linalg.norm(residual) + rounding


@given(data=st.data(), elapsed=times, target=rules)
def test_a_synthesised_average_is_as_near_as_the_error_says(
    data: st.DataObject, elapsed: list[float], target: Rule
) -> None:
    """By Cauchy and Schwarz on the distances from any one centre, since both sum to 1."""
    columns = data.draw(columns_of(elapsed))
    found = fit(columns, target, elapsed)
    live = np.random.default_rng(len(elapsed)).normal(size=(len(elapsed), 7)).cumsum(axis=0)
    made = found.coefficients @ stored(columns, elapsed, live)
    distance = np.linalg.norm(made - averaged(target, elapsed, live))
    size = np.linalg.norm(coefficients(target, elapsed))
    spread = np.linalg.norm(live - live.mean(axis=0))
    rounding = 1e-12 * found.amplification * float(np.abs(live).max())
    assert distance <= found.relative_error * size * spread + rounding


@given(data=st.data(), elapsed=times, target=rules)
def test_by_increments_the_error_is_that_of_sums_and_nothing_is_nearer(
    data: st.DataObject, elapsed: list[float], target: Rule
) -> None:
    columns = data.draw(columns_of(elapsed))
    found = fit(columns, target, elapsed, norm="increments")
    a, b = stored(columns, elapsed, np.eye(len(elapsed))).T, coefficients(target, elapsed)
    # 1 - W_i is the sum before i: exact where W is next to 1.
    sums = np.cumsum(np.column_stack([a, b])[:-1], axis=0)

    def missed(c: Array) -> float:
        return float(np.linalg.norm(sums @ np.append(c, -1.0)))

    whole = float(np.linalg.norm(sums[:, -1])) or 1.0
    mine = missed(found.coefficients)
    near = 1e-6 * found.amplification  # cancellation grows with it
    assert found.relative_error == pytest.approx(mine / whole, rel=1e-6, abs=near)
    assert found.coefficients.sum() == pytest.approx(1, abs=1e-9 * found.amplification)
    one = data.draw(st.integers(0, len(columns) - 1))
    for step in (1e-3, -1e-3):  # towards one of the columns, or away from it
        other = found.coefficients * (1 - step)
        other[one] += step
        assert mine <= missed(other) + 1e-6 * found.amplification


def test_by_increments_a_target_next_to_the_live_weights_keeps_its_distance() -> None:
    """Its first update has a weight of 1e-10: 1 - W from the tail sums would be off by 2e-6."""
    elapsed, last = [0.06640625, 21.0], [Column(None, LIVE, 2)]
    found = fit(last, Power(gamma=3.0), elapsed, norm="increments")
    assert found.relative_error == pytest.approx(1, rel=1e-14)
    both = [Column(None, LIVE, 1), *last]
    share = Fraction(elapsed[0]) ** 4 / Fraction(sum(elapsed)) ** 4
    exact = fit(both, Power(gamma=3.0), elapsed, norm="increments")
    assert exact.coefficients[0] == pytest.approx(float(share), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("exponential(half_life=3000)", 0.005),
        ("uniform()", 0.003),
        ("power(relative_std=0.15)", 1e-4),
    ],
)
def test_by_increments_the_error_is_a_random_walks(target: str, error: float) -> None:
    """Where the first update keeps a weight, too: no smooth profile has its spike."""
    updates, walks = 20_000, 40
    live = np.cumsum(np.random.default_rng(0).normal(size=(updates, walks)), axis=0)
    columns = snapshots((0.05, 0.10), 40, updates)
    found = fit(columns, target, [1.0] * updates, norm="increments")
    assert found.relative_error < error and found.amplification < 5
    made = sum(
        c
        * (coefficients(column.rule or Uniform(), [1.0] * column.updates) @ live[: column.updates])
        for c, column in zip(found.coefficients, columns, strict=True)
    )
    wanted = coefficients(target, [1.0] * updates) @ live
    distance = np.linalg.norm(wanted - live[-1])
    assert np.linalg.norm(made - wanted) / distance == pytest.approx(found.relative_error, rel=0.3)


def test_by_increments_plain_checkpoints_stand_for_their_neighbours() -> None:
    """Twenty checkpoints of a run make a long EMA; by the profile alone they cannot."""
    columns = [Column(None, LIVE, n) for n in range(500, 10_001, 500)]
    long = "tail(exponential(half_life=2000), 500)"
    near = fit(columns, long, [1.0] * 10_000, norm="increments")
    far = fit(columns, long, [1.0] * 10_000, norm="profile")
    assert near.relative_error < 0.07 and far.relative_error > 5
    ratios = near.coefficients[2:-1] / near.coefficients[3:]
    assert ratios[:-1] == pytest.approx(2 ** (-500 / 2000), rel=1e-2)


@given(data=st.data(), elapsed=times, target=rules)
def test_neither_the_order_nor_a_second_copy_matters(
    data: st.DataObject, elapsed: list[float], target: Rule
) -> None:
    columns = data.draw(columns_of(elapsed))
    found = fit(columns, target, elapsed)
    assume(found.amplification < 1e3)
    order = data.draw(st.permutations(range(len(columns))))
    shuffled = fit([columns[i] for i in order], target, elapsed)
    np.testing.assert_allclose(shuffled.coefficients, found.coefficients[order], atol=1e-6)
    twice = fit(columns + columns, target, elapsed).coefficients
    np.testing.assert_allclose(twice[: len(columns)], found.coefficients / 2, atol=1e-6)
    np.testing.assert_allclose(twice[len(columns) :], found.coefficients / 2, atol=1e-6)
    assert shuffled.relative_error == pytest.approx(found.relative_error, rel=1e-9, abs=1e-9)


@given(data=st.data(), elapsed=times)
def test_what_is_stored_is_found(data: st.DataObject, elapsed: list[float]) -> None:
    """All slots of a rule, among other columns: its own readout is the solution, without error."""
    target = data.draw(rules)
    slots = held(target, elapsed, np.eye(len(elapsed)))[-1]
    own = [Column(None if slot == LIVE else target, slot, len(elapsed)) for slot in slots]
    found = fit(own + data.draw(columns_of(elapsed)), target, elapsed)
    assert found.relative_error < 1e-9


# Long runs: many blocks of updates, uneven times.


@pytest.fixture(scope="module")
def uneven() -> list[float]:
    return [float(time) for time in np.random.default_rng(0).uniform(0.2, 3.0, 40_000)]


@pytest.mark.slow
def test_long_runs_are_those_of_dense_profiles(uneven: list[float]) -> None:
    """Columns by `coefficients` at the update where they were stored, target and all."""
    updates = [9_000, 16_384, 16_385, 33_000, 40_000]
    some = ["power(3)", "exponential(0.999)", "tail(uniform(), 40_000)", "power(relative_std=0.1)"]
    columns = [Column(as_rule(rule), "average", n) for rule in some for n in updates]
    columns += [Column(None, LIVE, n) for n in (1, 20_000, 40_000)]
    a = np.zeros((len(uneven), len(columns)))
    for index, (rule, _, n) in enumerate(columns):
        a[:n, index] = coefficients(rule, uneven[:n]) if rule else np.eye(1, n, n - 1)[0]
    for target in ("power(1)", "exponential(0.9995)", "bema()", "uniform()"):
        found = fit(columns, target, uneven)
        b = coefficients(target, uneven)
        residual = a @ found.coefficients - b
        size = np.linalg.norm(b)
        assert found.relative_error == pytest.approx(np.linalg.norm(residual) / size, rel=1e-9)
        slope = residual @ a
        assert np.ptp(slope) <= 1e-9 * np.linalg.norm(a, 2) * np.linalg.norm(residual)


@pytest.mark.parametrize("slot_of_target", range(0, 60, 7))
def test_a_stored_target_is_one_hot(uneven: list[float], slot_of_target: int) -> None:
    some = [Power.from_relative_std(0.05), Power.from_relative_std(0.1), Exponential(0.9999)]
    columns = [Column(rule, "average", n) for n in range(2000, 40_001, 2000) for rule in some]
    rule, _, updates = wanted = columns[slot_of_target]
    assert rule
    columns = [column for column in columns if column.updates <= updates]
    found = fit(columns, rule, uneven[:updates])
    np.testing.assert_allclose(
        found.coefficients, [float(column == wanted) for column in columns], atol=1e-9
    )
    assert found.relative_error < 1e-12


def test_slots_of_every_kind_are_columns() -> None:
    """The readout of `Bema` and of `Window` from their own slots: their own coefficients."""
    bema, elapsed = Bema(), [400.0] * 50
    own = [Column(bema, "average", 50), Column(bema, "anchor", 50), Column(None, LIVE, 50)]
    alpha = (10 + 49 * 400) ** -0.2
    np.testing.assert_allclose(fit(own, bema, elapsed).coefficients, [1, -alpha, alpha], atol=1e-12)
    window = Window(5)
    deltas = [Column(window, slot, 50) for slot in window.slots]
    np.testing.assert_allclose(fit(deltas, window, elapsed).coefficients, [0.2] * 5, atol=1e-12)


def test_plain_checkpoints_are_averaged_uniformly() -> None:
    """Of n updates K are stored: 1 / K each, and the rest of a uniform mean is missed."""
    n, k = 1000, 40
    found = fit([Column(None, LIVE, i) for i in range(25, n + 1, 25)], "uniform()", [1.0] * n)
    np.testing.assert_allclose(found.coefficients, [1 / k] * k, atol=1e-14)
    assert found.relative_error == pytest.approx(math.sqrt(n / k - 1), rel=1e-12)
    assert found.amplification == pytest.approx(1)
    every = fit([Column(None, LIVE, i + 1) for i in range(k)], "uniform()", [2.0, 0.5] * (k // 2))
    np.testing.assert_allclose(every.coefficients, [1 / k] * k, atol=1e-14)
    assert every.relative_error < 1e-14


def test_columns_far_from_alike_have_the_dense_solution() -> None:
    elapsed = [0.5, 2.0] * 100
    some: list[Rule] = [Exponential(0.9), Exponential(0.99), Power(2.0), Uniform()]
    columns = [Column(rule, "average", n) for rule in some for n in (180, 190, 200)]
    found, expected = (
        fit(columns, "window(30)", elapsed),
        on_dense_profiles(columns, Window(30), elapsed),
    )
    np.testing.assert_allclose(found.coefficients, expected.coefficients, atol=1e-9)
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-9)
    assert found.amplification == pytest.approx(expected.amplification, rel=1e-9)


@pytest.mark.slow
def test_the_matrix_is_never_held() -> None:
    """300 columns of 100 000 updates would be 240 MB."""
    n = 100_000
    some = [Power.from_relative_std(s) for s in (0.05, 0.1)]
    columns = [Column(rule, "average", n * i // 150) for rule in some for i in range(1, 151)]
    tracemalloc.start()
    try:
        fit(columns, "power(relative_std=0.15)", [1.0] * n)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


# EDM2 (arXiv 2312.02696): power functions in continuous time.


def inner_product(gamma_a: float, time_a: float, gamma_b: float, time_b: float) -> float:
    """Algorithm 3: the integral of p_a p_b, p(s) = (gamma + 1) s^gamma / t^(gamma + 1) up to t."""
    exponent = gamma_b if time_a < time_b else -gamma_a
    ratio: float = (time_a / time_b) ** exponent / max(time_a, time_b)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / (gamma_a + gamma_b + 1)


NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


@given(st.floats(0, 20), st.floats(0.1, 1), st.floats(0, 20), st.floats(0.1, 1))
def test_the_inner_product_is_the_integral(ga: float, ta: float, gb: float, tb: float) -> None:
    end = min(ta, tb)
    s = end * (NODES + 1) / 2
    both = (ga + 1) * (s / ta) ** ga / ta * (gb + 1) * (s / tb) ** gb / tb
    assert inner_product(ga, ta, gb, tb) == pytest.approx(both @ WEIGHTS * end / 2, rel=1e-5)


def snapshots(stds: Sequence[float], n: int, updates: int) -> list[Column]:
    """Averages of several widths after each n-th of the run."""
    some = [Power.from_relative_std(s) for s in stds]
    return [Column(rule, "average", updates * i // n) for rule in some for i in range(1, n + 1)]


@pytest.mark.parametrize("wanted", [0.03, 0.075, 0.15, 0.2, 0.25])
@pytest.mark.parametrize("n", [8, 32])
def test_it_is_edm2s_closed_form(n: int, wanted: float) -> None:
    """Algorithm 3: the Gram matrix's system, whose solution x EDM2 scales to a sum of 1.

    The nearest of sum 1 is x + o (1 - sum x) / sum o, o solving the system for ones: ours but for
    the steps of time. Scaled x differs from it by less than the error of either.
    """
    updates, target = 16_384, Power.from_relative_std(wanted)
    columns = snapshots((0.05, 0.1), n, updates)
    gammas = [
        (rule.gamma, count / updates) for rule, _, count in columns if isinstance(rule, Power)
    ]
    gram = np.array([[inner_product(*a, *b) for b in gammas] for a in gammas])
    x = np.linalg.solve(gram, [inner_product(*a, target.gamma, 1.0) for a in gammas])
    o = np.linalg.solve(gram, np.ones(len(x)))
    found, largest = fit(columns, target, [1.0] * updates), np.abs(x).max()
    nearest = x + o * (1 - x.sum()) / o.sum()
    np.testing.assert_allclose(found.coefficients, nearest, atol=1e-6 * largest)
    np.testing.assert_allclose(
        found.coefficients, x / x.sum(), atol=0.2 * found.relative_error * largest
    )


@pytest.mark.parametrize(
    ("stds", "slope", "tolerance"), [((0.05, 0.1), 3.8, 0.35), ((0.1,), 2.0, 0.15)]
)
@pytest.mark.parametrize("wanted", [0.075, 0.15])
def test_the_squared_error_falls_as_a_power_of_the_snapshots(
    stds: tuple[float, ...], slope: float, tolerance: float, wanted: float
) -> None:
    """n^-4 with two averages for every snapshot (EDM2's figure), n^-2 with one."""
    target, updates = Power.from_relative_std(wanted), 2**14
    errors = [
        fit(snapshots(stds, n, updates), target, [1.0] * updates).relative_error ** 2
        for n in (16, 32, 64)
    ]
    slopes = -np.diff(np.log2(errors))
    np.testing.assert_allclose(slopes, slope, atol=tolerance)


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("power(relative_std=0.15)", 0.0016),
        ("exponential(half_life=1000)", 0.0003),
        ("tail(uniform(), 16000)", 0.0036),
    ],
)
def test_forty_snapshots_make_other_averages(target: str, error: float) -> None:
    found = fit(snapshots((0.05, 0.1), 40, 20_000), target, [1.0] * 20_000)
    assert error / 2 < found.relative_error < error
    assert found.amplification < 5


# Errors.

ELAPSED = [1.0] * 10
ERRORS: list[tuple[Callable[[], object], str]] = [
    (
        lambda: fit([Column(Uniform(), "average", 5)], "uniform()", ELAPSED, norm="L2"),  # type: ignore[arg-type]
        "norm is 'L2', wanted \"profile\" or \"increments\"",
    ),
    (lambda: fit([], "uniform()", ELAPSED), "there are no columns, wanted one for every stored tensor"),
    (
        lambda: fit([Column(Uniform(), "average", 5), Column(Bema(), "anker", 5)], "uniform()", ELAPSED),
        "columns[1].slot is 'anker', wanted a slot of bema(): average, anchor",
    ),
    (
        lambda: fit([Column(None, "average", 5)], "uniform()", ELAPSED),
        "columns[0].slot is 'average', wanted a slot of the live weights: live",
    ),
    (
        lambda: fit([Column("uniform()", "average", 5)], "uniform()", ELAPSED),  # type: ignore[arg-type]
        "columns[0].rule is 'uniform()', wanted a polyak rule, or None for the live weights",
    ),
    *(
        (
            lambda updates=updates: fit([Column(Uniform(), "average", updates)], "uniform()", ELAPSED),
            f"columns[0].updates is {updates}, wanted an integer from 1 to the 10 of elapsed",
        )
        for updates in (0, 11, 2.0, math.nan, True)
    ),
    *(
        (
            lambda slot=slot, updates=updates: fit(
                [Column(Window(12), slot, updates)], "uniform()", ELAPSED
            ),
            f"columns[0].updates is {updates}, wanted a later one: slot {slot!r} of window(12) has no"
            " value before its first copy",
        )
        for slot, updates in (("window.4", 4), ("window.11", 10))
    ),
    (
        lambda: fit([Column(None, LIVE, 1)], "uniform()", []),
        "elapsed has shape (0,), wanted (updates,): the time that each update spans",
    ),
    (
        lambda: fit([Column(None, LIVE, 1)], "uniform()", [1, math.inf]),
        "elapsed has inf, wanted finite numbers > 0",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


def test_a_target_that_is_no_rule_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"a rule is 0\.999, wanted a polyak rule"):
        fit([Column(None, LIVE, 1)], 0.999, [1.0])  # type: ignore[arg-type]
