"""Rules: the laws that hold of all, what each is, every error message."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak import decays, rules
from polyak.decays import Ratio
from polyak.rules import (
    LIVE,
    RULES,
    START,
    ArticleEMA,
    Bema,
    Exponential,
    Power,
    Rule,
    Tail,
    Tick,
    Uniform,
    Window,
)
from polyak.specs import parse
from rule_examples import RULE_EXAMPLES, SCHEDULE_EXAMPLES, each_rule

ALL = [rule for examples in RULE_EXAMPLES.values() for rule in examples]
every_rule = pytest.mark.parametrize("rule", each_rule(ALL), ids=str)
elapsed_times = st.lists(st.floats(0.01, 100), min_size=1, max_size=40)


def ticks(rule: Rule, elapsed: list[float]) -> Iterator[Tick]:
    tick = START
    for time in elapsed:
        tick = rule.tick(tick, time)
        yield tick


def test_every_rule_has_an_example() -> None:
    assert set(RULE_EXAMPLES) == set(RULES), "write examples into tests/rule_examples.py"
    assert {rule.__name__ for rule in RULES} <= set(rules.__all__)
    told = (Path(__file__).parent.parent / "README.md").read_text()
    untold = [rule.__name__ for rule in RULES if f"| `{rule.__name__}(" not in told]
    assert not untold, "write a row into the table of rules in README.md"


FIRST: list[Any] = [
    *(found[0] for found in RULE_EXAMPLES.values()),
    *(found[0] for found in SCHEDULE_EXAMPLES.values()),
]


@pytest.mark.parametrize("example", FIRST, ids=str)
def test_every_option_is_checked(example: Any) -> None:
    for option in dataclasses.fields(example):
        if option.init:
            with pytest.raises(ValueError, match="is nan, wanted"):
                dataclasses.replace(example, **{option.name: math.nan})


@every_rule
@settings(max_examples=25)
@given(elapsed=elapsed_times)
def test_fractions_are_fractions_and_a_first_move_is_a_copy(
    rule: Rule, elapsed: list[float]
) -> None:
    moved: set[str] = set()
    for tick in ticks(rule, elapsed):
        for slot, fraction in rule.fractions(tick).items():
            assert slot in rule.slots
            assert 0 <= fraction <= 1
            assert fraction == 1 or slot in moved
            moved.add(slot)


@every_rule
@settings(max_examples=25)
@given(elapsed=elapsed_times)
def test_a_readout_sums_to_one_and_reads_only_what_was_stored(
    rule: Rule, elapsed: list[float]
) -> None:
    moved = {LIVE}
    for tick in ticks(rule, elapsed):
        moved |= set(rule.fractions(tick))
        assert set(rule.readout(tick)) <= moved
        assert sum(rule.readout(tick).values()) == pytest.approx(1)


@every_rule
@settings(max_examples=25)
@given(elapsed=elapsed_times)
def test_a_tick_counts_updates_and_time(rule: Rule, elapsed: list[float]) -> None:
    for n, tick in enumerate(ticks(rule, elapsed), start=1):
        assert (tick.n, tick.elapsed) == (n, elapsed[n - 1])
        assert tick.t == pytest.approx(sum(elapsed[:n]))


@every_rule
def test_a_rule_is_a_hashable_frozen_value_that_prints_as_typed(rule: Rule) -> None:
    twin = copy.deepcopy(rule)
    assert rule == twin and hash(rule) == hash(twin)
    assert parse(str(rule)) == rule
    assert eval(repr(rule), {**vars(rules), **vars(decays)}) == rule
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.extra = 1  # type: ignore[attr-defined]


@given(half_life=st.floats(0.1, 1e9), elapsed=st.floats(0.1, 100))
def test_from_half_life(half_life: float, elapsed: float) -> None:
    rule = Exponential.from_half_life(half_life)
    assert rule.decay**half_life == pytest.approx(0.5)  # type: ignore[operator]
    fraction = rule.fractions(Tick(2, 2 * elapsed, elapsed))["average"]
    assert 1 - fraction == pytest.approx(0.5 ** (elapsed / half_life))


@given(n=st.floats(1, 1e9))
def test_from_span(n: float) -> None:
    decay = Exponential.from_span(n, debias=True).decay
    assert isinstance(decay, float)
    assert (1 + decay) / (1 - decay) == pytest.approx(n, rel=1e-6)


@given(s=st.floats(0.001, 0.300283))
def test_relative_std_round_trip(s: float) -> None:
    g = Power.from_relative_std(s).gamma
    assert math.sqrt(g + 1) / ((g + 2) * math.sqrt(g + 3)) == pytest.approx(s, rel=1e-6)


@pytest.mark.parametrize("s", [1e-8, 1.1e-9, 9e-10, 1e-20, 1e-103, 1e-160, 1e-300])
def test_a_tiny_relative_std(s: float) -> None:
    """s = 1 / (gamma + 3) but for terms of the second order."""
    assert Power.from_relative_std(s).gamma == pytest.approx(1 / s - 3, rel=1e-12)


@pytest.mark.parametrize(
    ("s", "gamma"),
    [(0.05, 16.9722), (0.10, 6.9372), (0.15, 3.5579), (0.20, 1.8262), (0.25, 0.7198)],
)
def test_relative_std_of_edm2(s: float, gamma: float) -> None:
    assert Power.from_relative_std(s).gamma == pytest.approx(gamma, abs=1e-4)


@given(decay=st.floats(0.01, 0.99), times=st.lists(st.floats(0.1, 9), min_size=2, max_size=9))
def test_debias_is_a_ratio_of_what_zero_starts_lack(decay: float, times: list[float]) -> None:
    *_, tick = ticks(rule := Exponential(decay, debias=True), times)
    expected = (1 - decay**tick.elapsed) / (1 - decay**tick.t)
    assert rule.fractions(tick)["average"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("decay", "elapsed"),
    [(1 - 2**-53, 0.1), (1 - 2**-52, 1.0), (1 - 1e-12, 0.1), (1 - 2**-53, 1e-310)],
)
def test_debias_next_to_decay_one_is_the_mean(decay: float, elapsed: float) -> None:
    *_, third = ticks(rule := Exponential(decay, debias=True), [elapsed] * 3)
    assert rule.fractions(third)["average"] == pytest.approx(1 / 3, rel=1e-9)


@pytest.mark.parametrize("decay", [0, 0.0])
def test_debias_at_decay_zero_copies(decay: float) -> None:
    assert Exponential(decay, debias=True).fractions(Tick(2, 2.0, 1.0)) == {"average": 1.0}


def test_a_schedule_is_taken_per_unit_of_time() -> None:
    rule = Exponential(Ratio(0.9))
    assert rule.fractions(Tick(2, 1000.0, 3.0))["average"] == pytest.approx(1 - 0.9**3)


@pytest.mark.parametrize(("s", "alpha"), [(0, 0.6310), (1, 0.6190), (400, 0.3003)])
@pytest.mark.parametrize("first", [1.0, 400.0])
def test_bema_is_the_papers_form(s: int, alpha: float, first: float) -> None:
    """(rho + gamma s)^-eta, rho 10, eta .2; s is the time since the anchor, whenever that was."""
    *_, tick = ticks(Bema(), [first, *([s / 4, 3 * s / 4] if s else [])])
    readout = Bema().readout(tick)
    assert readout[LIVE] == pytest.approx((10 + s) ** -0.2) == pytest.approx(alpha, abs=1e-4)
    assert readout["anchor"] == -readout[LIVE]
    if s:
        assert Bema().fractions(tick) == {"average": pytest.approx((10 + s) ** -0.5)}


@every_rule
@settings(max_examples=25)
@given(elapsed=elapsed_times)
def test_a_convex_readout_has_no_term_below_zero(rule: Rule, elapsed: list[float]) -> None:
    for tick in ticks(rule, elapsed):
        plain, convex = rule.readout(tick), rule.convex_readout(tick)
        assert min(convex.values()) >= 0 and sum(convex.values()) == pytest.approx(1)
        assert set(convex) <= set(plain)
        if min(plain.values()) >= 0:
            assert convex == plain


def test_a_tail_begins_at_the_first_update_after_its_start() -> None:
    tail = Tail(Window(2), start=4)
    counts = [tick.inner.n for tick in ticks(tail, [2.0] * 5) if tick.inner]
    assert counts == [1, 1, 1, 2, 3]
    assert tail.slots == Window(2).slots


def test_the_articles_decay_by_call() -> None:
    rule = ArticleEMA(beta=0.999, update_after_step=100)
    assert [rule.decay(call) for call in (1, 100, 101)] == [0, 0, 0]
    assert rule.decay(102) == pytest.approx(1 - 2 ** (-2 / 3))
    assert rule.decay(101 + 31_622 - 1) < rule.decay(10**6) == 0.999


DECAY = "wanted a decay in [0, 1]; 0.999 keeps 99.9 % of the old average"
FINITE, POSITIVE = "wanted a finite number >= 0", "wanted a finite number > 0"
ONE = "exactly one of decay, half_life, span"
FLAG = "wanted True or False: whether to correct for a start at zero"
ERRORS: list[tuple[Callable[[], object], str]] = [
    (lambda: Exponential(1.1), f"Exponential.decay is 1.1, {DECAY}"),
    (lambda: Exponential("a"), f"Exponential.decay is 'a', {DECAY}"),  # type: ignore[arg-type]
    (
        lambda: Exponential(Ratio(0.9), debias=True),
        "Exponential.decay with debias=True is 'ratio(0.9)', wanted a constant decay: a schedule is"
        " its own warm-up, so leave out debias",
    ),
    (lambda: Exponential(0.9, "no"), f"Exponential.debias is 'no', {FLAG}"),  # type: ignore[arg-type]
    (lambda: Exponential(0.9, 1000), f"Exponential.debias is 1000, {FLAG}"),  # type: ignore[arg-type]
    (
        lambda: Exponential.from_span(3, debias=None),  # type: ignore[arg-type]
        f"Exponential.debias is None, {FLAG}",
    ),
    (lambda: Exponential.from_half_life(0), f"Exponential.half_life is 0, {POSITIVE}"),
    (lambda: Exponential(half_life=True), f"Exponential.half_life is True, {POSITIVE}"),
    (lambda: Exponential.from_span(0.5), "Exponential.span is 0.5, wanted a finite number >= 1"),
    (lambda: Exponential(), f"Exponential takes {ONE}, got none"),
    (lambda: Exponential(0.9, half_life=3), f"Exponential takes {ONE}, got decay and half_life"),
    (lambda: Exponential(half_life=3, span=5), f"Exponential takes {ONE}, got half_life and span"),
    (lambda: Power(), "Power takes exactly one of gamma, relative_std, got none"),
    (
        lambda: Power(3, relative_std=0.1),
        "Power takes exactly one of gamma, relative_std, got gamma and relative_std",
    ),
    (lambda: Power(-1), "Power.gamma is -1, wanted a finite number > -1"),
    (
        lambda: Power.from_relative_std(0.3003),
        "Power.relative_std is 0.3003, wanted 0 < s <= 0.300283, the largest relative std of a power"
        " function",
    ),
    (
        lambda: Power.from_relative_std(0),
        "Power.relative_std is 0, wanted 0 < s <= 0.300283, the largest relative std of a power"
        " function",
    ),
    (
        lambda: Window(0),
        "Window.size is 0, wanted an integer >= 1: the number of updates to average",
    ),
    (
        lambda: Window(2.0),  # type: ignore[arg-type]
        "Window.size is 2.0, wanted an integer >= 1: the number of updates to average",
    ),
    (
        lambda: Window(True),
        "Window.size is True, wanted an integer >= 1: the number of updates to average",
    ),
    (lambda: Bema(kappa=-1), f"Bema.kappa is -1, {FINITE}"),
    (lambda: Bema(eta=math.nan), f"Bema.eta is nan, {FINITE}"),
    (lambda: Bema(gamma=0), f"Bema.gamma is 0, {POSITIVE}"),
    (
        lambda: Bema(rho=0.5),
        "Bema.rho is 0.5, wanted a number >= 1: below it, a fraction exceeds 1",
    ),
    (lambda: Tail("uniform()", 3), "Tail.rule is 'uniform()', wanted a rule, such as Uniform()"),  # type: ignore[arg-type]
    (
        lambda: Tail(Uniform(), -1),
        "Tail.start is -1, wanted a finite number >= 0, in units of time",
    ),
    (lambda: ArticleEMA(beta=1.1), f"EMA beta is 1.1, {DECAY}"),
    (lambda: ArticleEMA(min_value=-1), f"EMA min_value is -1, {DECAY}"),
    (
        lambda: ArticleEMA(beta=0.5, min_value=0.9),
        "EMA (min_value, beta) is (0.9, 0.5), wanted min_value <= beta",
    ),
    (lambda: ArticleEMA(inv_gamma=0), f"EMA inv_gamma is 0, {POSITIVE}"),
    (lambda: ArticleEMA(power=0), f"EMA power is 0, {POSITIVE}"),
    (
        lambda: ArticleEMA(update_after_step=-1),
        "EMA update_after_step is -1, wanted an integer >= 0",
    ),
    (
        lambda: ArticleEMA(update_after_step=True),
        "EMA update_after_step is True, wanted an integer >= 0",
    ),
    (
        lambda: ArticleEMA(first_copy=1),  # type: ignore[arg-type]
        "EMA first_copy is 1, wanted True or False: whether the first averaging call copies",
    ),
]


@pytest.mark.parametrize(("make", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
