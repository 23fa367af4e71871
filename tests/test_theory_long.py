"""Long averages: every measure of a half-life from 0.1 to 1e15 steps is its closed form, to 1e-6."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, getcontext
from functools import cache

import numpy as np
import pytest

from polyak import charts
from polyak.decays import (
    AnytimeTail,
    Cosine,
    HalfLifeRamp,
    InversePower,
    Polynomial,
    Ratio,
    Schedule,
)
from polyak.rules import AVERAGE, Exponential, Power, Rule, Tick, Window
from polyak.specs import parse
from polyak.theory import Explanation, cadence, equivalents, explain, match
from polyak.theory._curves import gain_curve, learning_rate_curve, profile_curve, step_curve
from polyak.theory._long import Horizon, copies, horizon, profile_at
from quick import first_quick

getcontext().prec = 60
EXACT = 1e-6


def near(value: float, rel: float = EXACT) -> object:
    """Relatively near, however small: `pytest.approx` alone would let 1e-12 pass for 1e-15."""
    return pytest.approx(value, rel=rel, abs=0)


FEW = [0.1]
MORE = [500_000.0, 0.3, 1.0, 1e15, 10.0, 1e4, 1e5, 1e7, 1e9, 1e12, 1e14]
HALF_LIVES = [*FEW, *(pytest.param(h, marks=pytest.mark.slow) for h in MORE)]
of_each = pytest.mark.parametrize("half_life", HALF_LIVES)


@cache
def explained(half_life: float, every: int = 1) -> Explanation:
    return explain(Exponential(half_life=half_life), every=every)


@of_each
def test_every_measure_is_its_closed_form(half_life: float) -> None:
    rate = math.log(2) / half_life
    decay, lost = math.exp(-rate), -math.expm1(-rate)
    about = explained(half_life)
    assert about.half_life == near(half_life)
    assert about.mean_age == about.ramp_lag == near(decay / lost)
    assert about.noise_gain == near(lost / (1 + decay))
    assert about.effective_window == near((1 + decay) / lost)
    start = math.exp(-rate * (about.steps - 1))
    assert about.initial_weight == near(start if start > 1e-150 else 0.0)  # theory cuts off there
    std = finite_std(rate, about.steps)
    assert about.relative_std == near(std / about.steps)
    if decay < 3 - 2 * math.sqrt(2):
        assert about.cutoff is None
    else:
        cut = 2 * math.asin(lost / (2 * math.sqrt(decay)))
        assert about.cutoff == near(cut)
    assert not about.growing


def finite_std(rate: float, steps: int) -> float:
    """The standard deviation of the age of an EMA that began `steps` steps ago with a copy.

    Age k < steps - 1 has the weight (1 - d) d^k, the oldest age steps - 1 the rest, d^(steps - 1).
    """
    decay, lost, oldest = math.exp(-rate), -math.expm1(-rate), steps - 1
    rest = math.exp(-rate * oldest)
    mean = decay / lost * (1 - rest)
    second = decay * (1 + decay) / lost**2 * (1 - rest) - 2 * decay * oldest / lost * rest
    return math.sqrt(second - mean**2)


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 100, 4096])
@pytest.mark.parametrize("half_life", [5e5, 1e12])
def test_a_coarser_cadence_of_a_long_average(half_life: float, every: int) -> None:
    """The half-life stays; mean age k B / (1 - B) and noise gain (1 - B) / (1 + B), B = d^k."""
    about, rate = explained(half_life, every), math.log(2) / half_life * every
    assert about.half_life == near(half_life)
    assert about.mean_age == near(every / math.expm1(rate))
    assert about.noise_gain == near(math.tanh(rate / 2))
    wanted = math.exp(-rate * (about.steps - 1) / every)
    assert about.initial_weight == near(wanted)
    std = every * finite_std(rate, (about.steps - 1) // every + 1)
    assert about.relative_std == near(std / about.steps)


@pytest.mark.parametrize("elapsed", [0.01, 1.0, 7.0, 1e6])
@pytest.mark.parametrize("half_life", [0.01, 0.1, 1.0, 1e3, 1e9, 1e15, 1e17, 1e40])
def test_a_fraction_is_exact_for_any_half_life(half_life: float, elapsed: float) -> None:
    """1 - 2^(-elapsed / half_life), by 60 digits: a decay next to 1 has not that many."""
    exact = 1 - Decimal(2) ** (-Decimal(elapsed) / Decimal(half_life))
    n, rule = 50, Exponential(half_life=half_life)
    tick = Tick(n, n * elapsed, elapsed)
    assert rule.fractions(tick)[AVERAGE] == near(float(exact), rel=1e-12)
    debiased = exact / (1 - Decimal(2) ** (-Decimal(n * elapsed) / Decimal(half_life)))
    found = Exponential(half_life=half_life, debias=True).fractions(tick)[AVERAGE]
    assert found == near(float(debiased), rel=1e-12)


@pytest.mark.parametrize("elapsed", [0.5, 1.0, 1e5])
@pytest.mark.parametrize("span", [1, 1.5, 3, 1e6, 1e15])
def test_a_fraction_is_exact_for_any_span(span: float, elapsed: float) -> None:
    exact = 1 - (1 - 2 / (Decimal(span) + 1)) ** Decimal(elapsed)
    found = Exponential(span=span).fractions(Tick(2, 2 * elapsed, elapsed))[AVERAGE]
    assert found == near(float(exact), rel=1e-12)


def exactly(schedule: Schedule, t: float) -> Decimal:
    """1 - decay(t) by 60 digits, from the formula in the schedule's source."""
    now, before = Decimal(t), Decimal(t) - 1
    match schedule:
        case InversePower(inv_gamma=g, power=p):
            return (1 + before / Decimal(g)) ** -Decimal(p)
        case Ratio(max_decay=most):
            return max(1 - Decimal(most), 9 / (10 + before))
        case HalfLifeRamp(half_life=h, ratio=ratio):
            return 1 - Decimal(2) ** (-1 / min(Decimal(h), Decimal(ratio) * now))
        case Polynomial(exponent=x):
            return (Decimal(x) + 1) / (now + Decimal(x))
        case AnytimeTail(fraction=fraction):
            c = Decimal(fraction)
            root = ((1 - c) / (now * before)).sqrt() / c
            return 1 - c * before / (1 + c * before) * (1 - root)
    raise AssertionError(schedule)


SCHEDULES: list[Schedule] = [
    InversePower(power=1.0),
    InversePower(3.0, 0.75),
    Ratio(1 - 2**-50),
    Ratio(0.99999),
    HalfLifeRamp(1e15),
    HalfLifeRamp(1e300, ratio=0.05),
    AnytimeTail(0.01),
    Polynomial(8.0),
]


@pytest.mark.parametrize("elapsed", [1.0, 4e6])
@pytest.mark.parametrize("t", [1e2, 1e9, 1e13, 1e15])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_schedule_keeps_its_digits_next_to_one(
    schedule: Schedule, t: float, elapsed: float
) -> None:
    exact = 1 - (1 - exactly(schedule, t)) ** Decimal(elapsed)
    found = Exponential(schedule).fractions(Tick(9, t, elapsed))[AVERAGE]
    assert found == near(float(exact), rel=1e-9)


def test_a_cosine_keeps_its_digits_near_its_end() -> None:
    """(1 - start) sin^2(pi left / 2), left the share of the steps that is left."""
    for left in (1e-3, 1e-6, 1e-9):
        wanted = 0.004 * math.sin(math.pi * left / 2) ** 2
        tick = Tick(9, 1 + 1e12 * (1 - left), 1.0)
        found = Exponential(Cosine(0.996, 1e12)).fractions(tick)[AVERAGE]
        assert found == near(wanted, rel=1e-3 if left < 1e-8 else 1e-5)
    assert Exponential(Cosine(0.996, 10)).fractions(Tick(9, 11.0, 1.0)) == {AVERAGE: 0.0}


@pytest.mark.parametrize("t", [10.0, 1e9, 1e15])
def test_a_power_keeps_its_digits_late(t: float) -> None:
    exact = 1 - (1 - 1 / Decimal(t)) ** Decimal("4.5")
    assert Power(3.5).fractions(Tick(9, t, 1.0))[AVERAGE] == near(float(exact), rel=1e-12)


# What takes a rule and chooses the steps.


@pytest.mark.parametrize("by", ["mean_age", "noise_gain"])
@pytest.mark.parametrize(
    "half_life", [0.1, 20.0, pytest.param(5e5, marks=pytest.mark.slow), pytest.param(1e15, marks=pytest.mark.slow)]
)  # fmt: skip
def test_an_exponential_like_one_of_any_half_life_is_that_one(half_life: float, by: str) -> None:
    found = match(Exponential, like=Exponential(half_life=half_life), by=by)
    tick = Tick(2, 2.0, 1.0)
    wanted = Exponential(half_life=half_life).fractions(tick)[AVERAGE]
    assert found.fractions(tick)[AVERAGE] == near(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["mean_age", "noise_gain"])
@pytest.mark.parametrize("half_life", [5e5, 1e15])
def test_a_window_like_a_long_exponential_has_its_span(half_life: float, by: str) -> None:
    found = match(Window, like=Exponential(half_life=half_life), by=by)
    assert isinstance(found, Window)
    assert found.size == near(1 / math.tanh(math.log(2) / half_life / 2))


@pytest.mark.parametrize(
    ("half_life", "error"), first_quick([(5e5, 0.2), (5e5, 0.01), (1e15, 0.2), (1e15, 0.01)])
)
def test_the_cadence_of_a_long_average_is_the_largest(half_life: float, error: float) -> None:
    """The displacement of an EMA: 1 - k lost / (decay (d^-k - 1)), the loss of mean age."""
    rate, found = math.log(2) / half_life, cadence(Exponential(half_life=half_life), error=error)

    def displaced(every: float) -> float:
        return 1 - every * math.expm1(rate) / math.expm1(rate * every)

    assert displaced(found * (1 - 2e-6)) <= error <= displaced((found + 1) * (1 + 2e-6))


@pytest.mark.slow
def test_a_long_average_refuses_a_tiny_error() -> None:
    message = r"error is 0\.0001, wanted 0\.001 or more of so long an average; or pass steps"
    with pytest.raises(ValueError, match=message):
        cadence("exponential(half_life=500000)", error=1e-4)


def test_equivalents_leave_out_what_a_decay_cannot_say() -> None:
    assert len(equivalents("exponential(half_life=1e6)")) == len(equivalents("exponential(0.9)"))
    assert equivalents("exponential(half_life=1e15)") == equivalents("exponential(span=1e15)") == {}
    assert "decay=0.9999999999999" in str(equivalents("exponential(0.9999999999999)"))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["uniform()", "power(3)", "bema()", "exponential(polynomial(2))"])
def test_what_does_not_settle_says_so(spec: str) -> None:
    about = explain(spec)
    assert about.growing and about.steps == 10_000 and about.unit == 1
    spec = str(about.rule)
    assert about.title() == f"{spec} after 10000 steps, updated every step; more steps change it"
    assert explain(spec, 500).title() == f"{spec} after 500 steps, updated every step"


LATE_CHANGES = [
    # At a coarse clock all of these look like copies of the live weights. None is one.
    "tail(exponential(0.9), 1e6)",
    "exponential(half_life_ramp(1000, 1e-6))",
    "exponential(cosine(0.9, 1e6, 0.99))",
    # After 1000 steps nothing seems to change it.
    "exponential(cosine(0.99, 1e9, 0.999))",
    "exponential(cosine(0.99, 1e9, 0.0))",
]


@pytest.mark.slow
@pytest.mark.parametrize("spec", LATE_CHANGES)
def test_what_changes_very_late_says_so(spec: str) -> None:
    assert "more steps change it" in explain(spec).title()


def test_only_what_copies_late_is_a_copy() -> None:
    assert [copies(parse(spec)) for spec in LATE_CHANGES] == [False] * 4 + [True]
    assert copies(parse("exponential(0)")) and copies(Window(1), every=1000)


@pytest.mark.slow
def test_a_plain_copy_does_not_grow() -> None:
    assert not explain("exponential(0)").growing
    assert explain("tail(uniform(), 20000)").growing


@pytest.mark.slow
def test_a_window_too_long_to_be_run_says_so() -> None:
    """It was measured after 10 000 steps, at which a window of a million looks like one of 10 000."""
    assert "more steps change it" in explain(Window(10**6)).title()


LATE = pytest.mark.slow
BEHIND_A_START = [
    # Its clock must be finer than its start asks for, which is what the check of clocks finds.
    pytest.param("exponential(inverse_power(max_decay=0.99999))", 99_999),
    pytest.param("exponential(half_life_ramp(1e9))", 1 / math.expm1(math.log(2) / 1e9), marks=LATE),
    pytest.param(
        "tail(exponential(half_life=1e7), 1e9)", 1 / math.expm1(math.log(2) / 1e7), marks=LATE
    ),
    pytest.param(
        "exponential(half_life=1e9, debias=True)", 1 / math.expm1(math.log(2) / 1e9), marks=LATE
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "mean_age"), BEHIND_A_START)
def test_a_long_average_behind_a_start(rule: str, mean_age: float) -> None:
    about = explain(rule)
    assert not about.growing
    assert about.mean_age == near(mean_age)


# What is drawn.


def of_long(half_life: float) -> tuple[Rule, Horizon]:
    rule = Exponential(half_life=half_life)
    found = horizon(rule)
    assert found is not None and found.unit > 1
    return rule, found


@pytest.mark.slow
def test_the_curves_of_a_long_average() -> None:
    half_life = 5e5
    rate = math.log(2) / half_life
    rule, where = of_long(half_life)
    c, _ = profile_at(rule, where, 1)
    ages, weights = map(np.array, profile_curve(c, unit=where.unit))
    middle = ages + (where.unit - 1) / 2
    np.testing.assert_allclose(weights, -np.expm1(-rate) * np.exp(-rate * middle), rtol=EXACT)
    ages, shown = map(np.array, step_curve(c, unit=where.unit))
    np.testing.assert_allclose(shown, -np.expm1(-rate * ages), rtol=EXACT)
    steps, multiplier = map(np.array, learning_rate_curve(c, unit=where.unit))
    left = where.steps - steps + 1
    np.testing.assert_allclose(multiplier, -np.expm1(-rate * left), rtol=EXACT)
    gain = gain_curve(c, unit=where.unit)
    w, magnitude = map(np.array, gain.curve)
    near = (w < 20 * rate) & (magnitude > gain.bottom)
    exact = -np.expm1(-rate) / np.sqrt(
        np.expm1(-rate) ** 2 + 4 * np.exp(-rate) * np.sin(w / 2) ** 2
    )
    np.testing.assert_allclose(magnitude[near], exact[near], rtol=1e-5)
    assert gain.cutoff == explained(half_life).cutoff


@pytest.mark.slow
def test_a_long_average_has_a_chart() -> None:
    chart = charts.rule_chart(explained(500_000.0)).to_dict()
    assert len(chart["concat"]) == 4
    assert "exponential(half_life=500000.0)" in str(chart["title"])
    assert chart == charts.rule_chart("exponential(half_life=500000.0)").to_dict()


MOST: list[Callable[[], object]] = [
    lambda: explain("exponential(half_life=1e15)", 10**9),
    lambda: match(Exponential, like="exponential(half_life=1e15)", steps=10**9),
    lambda: cadence("exponential(half_life=1e15)", steps=10**9),
]


@pytest.mark.parametrize("call", MOST)
def test_steps_that_are_given_have_a_limit(call: Callable[[], object]) -> None:
    with pytest.raises(
        ValueError, match=r"steps is 1000000000, wanted at most 100,000,000: a prof"
    ):
        call()
