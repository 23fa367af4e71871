"""Decay schedules: laws of all, the closed form of each, every error message."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyak
from polyak import Averager, decays
from polyak.decays import (
    SCHEDULES,
    AnytimeTail,
    Constant,
    Cosine,
    HalfLifeRamp,
    InversePower,
    Polynomial,
    Ratio,
    Schedule,
    Told,
)
from polyak.rules import ArticleEMA, Exponential, Rule, Tail
from polyak.theory import profile
from rule_examples import SCHEDULE_EXAMPLES

ALL = [schedule for examples in SCHEDULE_EXAMPLES.values() for schedule in examples]


def test_every_schedule_has_an_example() -> None:
    assert set(SCHEDULE_EXAMPLES) == set(SCHEDULES), "write examples into tests/rule_examples.py"
    assert {schedule.__name__ for schedule in SCHEDULES} <= set(decays.__all__)


@pytest.mark.parametrize("schedule", ALL, ids=str)
@settings(max_examples=25)
@given(t=st.floats(min_value=1, max_value=1e12))
def test_a_schedule_is_a_decay_at_all_times(schedule: Schedule, t: float) -> None:
    assert 0 <= schedule(t) <= 1


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_a_schedule_is_a_hashable_frozen_value(schedule: Schedule) -> None:
    twin = copy.deepcopy(schedule)
    assert schedule == twin and hash(schedule) == hash(twin)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.extra = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("power", "decay", "t"),
    [
        (2 / 3, 0.999, 31_622.8),
        (2 / 3, 0.9999, 1e6),
        (3 / 4, 0.999, 1e4),
        (3 / 4, 0.9999, 215_443.5),
    ],
)
def test_ramps_of_the_article(power: float, decay: float, t: float) -> None:
    """T: power 2/3 reaches .999 at 31.6 K and .9999 at 1 M; power 3/4 at 10 K and 215.4 K."""
    schedule = InversePower(power=power)
    assert schedule(t) == pytest.approx(decay, abs=1e-9)
    assert schedule(t - 2) < decay < schedule(t + 2)


def test_inverse_power_is_clamped_and_starts_with_a_copy() -> None:
    schedule = InversePower(inv_gamma=5.0, power=1.0, min_decay=0.1, max_decay=0.8)
    assert (schedule(1), schedule(1e6)) == (0.1, 0.8)
    assert InversePower()(1) == 0


@given(t=st.integers(1, 10**6), inv_gamma=st.floats(1, 50))
def test_crowson_of_power_one_is_polynomial_averaging(t: int, inv_gamma: float) -> None:
    """inv_gamma g is exponent g - 1; inv_gamma 1 is the running mean."""
    crowson = InversePower(inv_gamma=inv_gamma, power=1.0)
    assert crowson(t) == pytest.approx(Polynomial(inv_gamma - 1)(t), rel=1e-12, abs=1e-15)
    assert InversePower(power=1.0)(t) == pytest.approx(1 - 1 / t, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("decay", "end"), [(0.999, 8_990), (0.9999, 89_990)])
def test_the_ratio_ramp_ends_where_its_docstring_says(decay: float, end: int) -> None:
    assert round((10 * decay - 1) / (1 - decay)) == end
    ramp = Ratio(decay)
    assert ramp(end) < decay == ramp(end + 2)


def test_cosine_starts_ends_and_is_half_way_in_the_middle() -> None:
    ramp = Cosine(0.9, steps=100, end=0.99)
    assert ramp(1) == pytest.approx(0.9)
    assert ramp(51) == pytest.approx(0.945)
    assert (ramp(101), ramp(1e9)) == (0.99, 0.99)


def test_half_life_ramp_is_a_share_of_the_time_then_constant() -> None:
    ramp = HalfLifeRamp(1000.0, ratio=0.05)
    assert ramp(200) == pytest.approx(0.5 ** (1 / 10))
    assert ramp(20_000) == ramp(1e9) == 0.5 ** (1 / 1000)


@pytest.mark.parametrize("tiny", [5e-324, 1e-310, 1e-200])
def test_half_life_ramp_of_next_to_nothing_keeps_nothing(tiny: float) -> None:
    assert HalfLifeRamp(1.0, ratio=tiny)(0.1) == HalfLifeRamp(tiny)(0.1) == 0
    assert HalfLifeRamp(tiny, ratio=tiny)(tiny) == 0


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_anytime_tail_is_the_mean_until_the_formula_is_a_decay(c: float) -> None:
    schedule = AnytimeTail(c)
    for t in range(1, 200):
        if t * (t - 1) < (1 - c) / c**2:
            assert schedule(t) == (t - 1) / t
    assert AnytimeTail(1e-200)(10) == 0.9


INFINITE, NAN = math.inf, math.nan
DECAY = "wanted a decay in [0, 1]; 0.999 keeps 99.9 % of the old average"
POSITIVE = "wanted a finite number > 0"
ERRORS: list[tuple[Callable[[], object], str]] = [
    (lambda: Constant(1.1), f"Constant.decay is 1.1, {DECAY}"),
    (lambda: Constant(NAN), f"Constant.decay is nan, {DECAY}"),
    (lambda: Constant(True), f"Constant.decay is True, {DECAY}"),
    (lambda: InversePower(inv_gamma=0), f"InversePower.inv_gamma is 0, {POSITIVE}"),
    (lambda: InversePower(power=-1), f"InversePower.power is -1, {POSITIVE}"),
    (
        lambda: InversePower(min_decay=-0.1),
        f"InversePower.min_decay is -0.1, {DECAY}",
    ),
    (
        lambda: InversePower(max_decay=1.1),
        f"InversePower.max_decay is 1.1, {DECAY}",
    ),
    (
        lambda: InversePower(min_decay=0.9, max_decay=0.5),
        "InversePower (min_decay, max_decay) is (0.9, 0.5), wanted min <= max",
    ),
    (lambda: Ratio(1.5), f"Ratio.max_decay is 1.5, {DECAY}"),
    (lambda: Cosine(1.5, 10), f"Cosine.start is 1.5, {DECAY}"),
    (lambda: Cosine(0.5, 0), f"Cosine.steps is 0, {POSITIVE}"),
    (lambda: Cosine(0.5, 10, end=2), f"Cosine.end is 2, {DECAY}"),
    (lambda: HalfLifeRamp(INFINITE), f"HalfLifeRamp.half_life is inf, {POSITIVE}"),
    (lambda: HalfLifeRamp(1, ratio=0), f"HalfLifeRamp.ratio is 0, {POSITIVE}"),
    (lambda: AnytimeTail(1), "AnytimeTail.fraction is 1, wanted a number in (0, 1)"),
    (lambda: Polynomial(-1), "Polynomial.exponent is -1, wanted a finite number >= 0"),
    (lambda: Polynomial("3"), "Polynomial.exponent is '3', wanted a finite number >= 0"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


SAME: dict[str, Callable[[float], Rule]] = {
    "exponential": Exponential,
    "constant": lambda d: Exponential(Constant(d)),
    "inverse_power": lambda d: Exponential(InversePower(min_decay=d, max_decay=d)),
    "cosine": lambda d: Exponential(Cosine(d, steps=7, end=d)),
    "told": lambda d: Exponential(Told(d)),
    "in a tail": lambda d: Tail(Exponential(d), 0),
    "article_ema": lambda d: ArticleEMA(d, 0, min_value=d, first_copy=False),
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_a_decay_means_the_same_however_it_is_given(kind: str, decay: float) -> None:
    """0 keeps nothing, and 1 keeps what the first update copied."""
    weights = {"w": torch.zeros((), dtype=torch.float64)}
    averager, held = Averager(weights, SAME[kind](decay)), 1.0
    for value in (1.0, 3.0, -2.0, 8.0):
        weights["w"].fill_(value)
        averager.update()
        held = value if value == 1 else decay * held + (1 - decay) * value
        assert averager.average()["w"].item() == pytest.approx(held, abs=1e-15)


def test_debias_at_decay_1_is_the_mean_of_all() -> None:
    assert profile(Exponential(1.0, debias=True), 5) == pytest.approx([0.2] * 5)
    assert profile(Exponential(1 - 1e-12, debias=True), 5) == pytest.approx([0.2] * 5)


def test_a_limit_of_1_is_no_limit() -> None:
    for t in (1, 2, 100, 1e9):
        assert Ratio(1.0)(t) == t / (9 + t)
        assert InversePower(max_decay=1.0)(t) == InversePower()(t)


def test_the_host_tells_the_decay_of_each_update() -> None:
    momentum = Told(0.5)
    weights = {"w": torch.zeros((), dtype=torch.float64)}
    averager = Averager(weights, Exponential(momentum))
    held = 0.0
    averager.update()
    for step, decay in enumerate([0.9, 0.0, 1.0, 0.99, 0.3]):
        weights["w"].fill_(step + 1.0)
        momentum.tell(decay)
        averager.update()
        held = decay * held + (1 - decay) * (step + 1.0)
        assert averager.average()["w"].item() == pytest.approx(held, abs=1e-14)


def test_a_told_decay_is_saved_as_the_rule_that_was_typed(tmp_path: Path) -> None:
    momentum, weights = Told(0.5), {"w": torch.ones(2)}
    averager = Averager(weights, Exponential(momentum))
    averager.update()
    momentum.tell(0.9)
    averager.update()
    polyak.save(tmp_path / "it", averager)
    again = Averager(weights, "exponential(told(0.5))")
    polyak.load(tmp_path / "it", again)
    assert again.count == 2 and again.rules == averager.rules
    assert pickle.loads(pickle.dumps(momentum))(1) == 0.9
    with pytest.raises(ValueError, match=r"Told decay is 1.5, wanted a decay in \[0, 1\]"):
        momentum.tell(1.5)
