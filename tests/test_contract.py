"""A rule of a user is checked where it is run: each fault names the rule and the tick.

`FAULTY` holds one rule for each way to break the contract; a new one joins by one entry. Training
(`Averager`) and theory (`profile`) refuse it with the same message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch

from polyak import Averager
from polyak.decays import Schedule
from polyak.rules import AVERAGE, LIVE, Exponential, Rule, Tail, Tick, Window
from polyak.theory import coefficients, explain, match, profile


def copy_then(fraction: Any) -> Callable[[Tick], dict[str, Any]]:
    return lambda tick: {AVERAGE: 1.0 if tick.n == 1 else fraction}


@dataclass(frozen=True)
class Custom(Rule):
    """A rule whose answers are given as functions of the tick."""

    SAVABLE: ClassVar = False

    moves: Callable[[Tick], Any] = field(default=copy_then(0.5), repr=False)
    reads: Callable[[Tick], Any] = field(default=lambda _: {AVERAGE: 1.0}, repr=False)
    convex: Callable[[Tick], Any] | None = field(default=None, repr=False)
    names: Any = (AVERAGE, "slow")
    clock: Callable[[Tick, float], Any] | None = field(default=None, repr=False)

    @property
    def slots(self) -> tuple[str, ...]:
        names: tuple[str, ...] = self.names
        return names

    def tick(self, before: Tick, elapsed: float) -> Tick:
        made: Tick = self.clock(before, elapsed) if self.clock else super().tick(before, elapsed)
        return made

    def fractions(self, tick: Tick) -> dict[str, float]:
        moves: dict[str, float] = self.moves(tick)
        return moves

    def readout(self, tick: Tick) -> dict[str, float]:
        reads: dict[str, float] = self.reads(tick)
        return reads

    def convex_readout(self, tick: Tick) -> dict[str, float]:
        reads: dict[str, float] = self.convex(tick) if self.convex else super().convex_readout(tick)
        return reads

    def __str__(self) -> str:
        return "custom()"


@dataclass(frozen=True)
class Wild(Schedule):
    """A schedule that leaves [0, 1] after time 5."""

    SAVABLE: ClassVar = False
    then: float

    def __call__(self, t: float) -> float:
        return 0.9 if t <= 5 else self.then


def late(value: Any, usual: Any = 0.5) -> Callable[[Tick], dict[str, Any]]:
    """A fraction that goes wrong at update 6, long after the first ones."""
    return lambda tick: {AVERAGE: 1.0 if tick.n == 1 else (value if tick.n == 6 else usual)}


def late_clock(at: int = 6, **wrong: Any) -> Callable[[Tick, float], Tick]:
    """A clock that goes wrong at an update."""

    def clock(before: Tick, elapsed: float) -> Tick:
        tick = Tick(before.n + 1, before.t + elapsed, elapsed)
        return tick._replace(**wrong) if tick.n == at else tick

    return clock


class LateTail(Tail):
    """A tail of a user, whose clock stands at update 6."""

    SAVABLE: ClassVar = False

    def tick(self, before: Tick, elapsed: float) -> Tick:
        made = super().tick(before, elapsed)
        return before if made.n == 6 else made


def wrong_at_6(wanted: str, **wrong: Any) -> tuple[Rule, str, int]:
    """A rule whose clock goes wrong at update 6, the words of its refusal, and that update."""
    message = f"follows Tick(n=5, t=5.0, elapsed=1.0, inner=None), {wanted}"
    return Custom(clock=late_clock(**wrong)), message, 6


NAN, INF = float("nan"), float("inf")
IN = "wanted a fraction in [0, 1]"
SUM = "wanted finite numbers that sum to 1"
NAMES: tuple[Any, ...] = (
    AVERAGE, (AVERAGE, AVERAGE), (AVERAGE, LIVE), (AVERAGE, "average.compensation"), (AVERAGE, "a/b"),
    (AVERAGE, 1), None,
)  # fmt: skip
FAULTY: dict[str, tuple[Rule, str, int]] = {
    "a fraction above 1": (Custom(copy_then(1.5)), f"moves slot 'average' by 1.5, {IN}", 2),
    "a fraction below 0": (Custom(copy_then(-0.1)), f"moves slot 'average' by -0.1, {IN}", 2),
    "a fraction of NaN": (Custom(copy_then(NAN)), f"moves slot 'average' by nan, {IN}", 2),
    "a fraction of text": (Custom(copy_then("half")), f"moves slot 'average' by 'half', {IN}", 2),
    "a fraction of None": (Custom(copy_then(None)), f"moves slot 'average' by None, {IN}", 2),
    "a fraction of True": (Custom(copy_then(True)), f"moves slot 'average' by True, {IN}", 2),
    "a late fraction above 1": (Custom(late(1.01)), f"moves slot 'average' by 1.01, {IN}", 6),
    "a late fraction of NaN": (Custom(late(NAN)), f"moves slot 'average' by nan, {IN}", 6),
    "a first move that is no copy": (
        Custom(lambda _: {AVERAGE: 0.5}),
        "first moves slot 'average' by 0.5, wanted 1: a slot has no value before its first copy",
        1,
    ),
    "a late first move that is no copy": (
        Custom(lambda tick: late(0.5)(tick) | ({"slow": 0.1} if tick.n == 6 else {})),
        "first moves slot 'slow' by 0.1, wanted 1: a slot has no value before its first copy",
        6,
    ),
    "an unknown slot": (
        Custom(lambda _: {"averge": 1.0}),
        "has the fractions {'averge': 1.0}, wanted a mapping slot -> fraction, for slots of"
        " average, slow",
        1,
    ),
    "a late slot that the rule does not have": (
        Custom(lambda tick: late(0.5)(tick) | ({"fast": 1.0} if tick.n == 6 else {})),
        "moves slot 'fast', wanted one of average, slow",
        6,
    ),
    **{
        f"slots {names!r}": (Custom(names=names), f"has the slots {names!r}, wanted a tuple of", 1)
        for names in NAMES
    },
    "fractions of no mapping": (
        Custom(lambda _: 0.5),
        "has the fractions 0.5, wanted a mapping slot -> fraction, for slots of average, slow",
        1,
    ),
    "coefficients that sum to 2": (
        Custom(reads=lambda _: {AVERAGE: 2.0}),
        f"has the readout {{'average': 2.0}}, {SUM}",
        1,
    ),
    "coefficients that sum to .9": (
        Custom(reads=lambda _: {AVERAGE: 0.5, LIVE: 0.4}),
        f"has the readout {{'average': 0.5, 'live': 0.4}}, {SUM}",
        1,
    ),
    "a coefficient of NaN": (
        Custom(reads=lambda _: {AVERAGE: NAN}),
        f"has the readout {{'average': nan}}, {SUM}",
        1,
    ),
    "infinite coefficients": (
        Custom(reads=lambda _: {AVERAGE: INF, LIVE: -INF}),
        f"has the readout {{'average': inf, 'live': -inf}}, {SUM}",
        1,
    ),
    "a readout of no mapping": (
        Custom(reads=lambda _: None),
        "has the readout None, wanted a mapping slot -> coefficient, for slots of average, live",
        1,
    ),
    "a readout of a slot without a value": (
        Custom(reads=lambda _: {"slow": 1.0}),
        "has the readout {'slow': 1.0}, wanted a mapping slot -> coefficient, for slots of"
        " average, live",
        1,
    ),
    "an empty readout": (Custom(reads=lambda _: {}), f"has the readout {{}}, {SUM}", 1),
    "a convex readout below 0": (
        Custom(convex=lambda _: {AVERAGE: 2.0, LIVE: -1.0}),
        "has the convex readout {'average': 2.0, 'live': -1.0}, wanted no coefficient below 0",
        1,
    ),
    "a convex readout that sums to 2": (
        Custom(convex=lambda _: {AVERAGE: 2.0}),
        f"has the convex readout {{'average': 2.0}}, {SUM}",
        1,
    ),
    "a clock that stands": (
        Custom(clock=lambda before, elapsed: Tick(1, before.t + elapsed, elapsed)),
        "follows Tick(n=1, t=1.0, elapsed=1.0, inner=None), wanted a polyak.rules.Tick with n + 1",
        2,
    ),
    "a clock that goes back": (
        Custom(clock=lambda before, elapsed: Tick(before.n + 1, 2 - before.n * elapsed, elapsed)),
        "follows Tick(n=1, t=2.0, elapsed=1.0, inner=None), wanted no smaller t",
        2,
    ),
    "a clock of infinity": (
        Custom(clock=lambda before, elapsed: Tick(before.n + 1, INF, elapsed)),
        "follows Tick(n=0, t=0.0, elapsed=0.0, inner=None), wanted a polyak.rules.Tick with n + 1, n an integer, and",
        1,
    ),
    "a clock that counts in floats": (
        Custom(clock=late_clock(at=1, n=1.0)),
        "follows Tick(n=0, t=0.0, elapsed=0.0, inner=None), wanted a polyak.rules.Tick with n + 1, n an",
        1,
    ),
    "a clock whose time is longer than all": (
        Custom(clock=lambda before, elapsed: Tick(before.n + 1, before.t + elapsed, elapsed + 4)),
        "follows Tick(n=0, t=0.0, elapsed=0.0, inner=None), wanted no smaller t",
        1,
    ),
    "a clock of a plain tuple": (
        Custom(clock=lambda before, elapsed: (before.n + 1, before.t + elapsed, elapsed, None)),
        "follows Tick(n=0, t=0.0, elapsed=0.0, inner=None), wanted a polyak.rules.Tick with n + 1",
        1,
    ),
    "a late clock that stands": wrong_at_6("wanted a polyak.rules", n=5),
    "a late clock that goes back": wrong_at_6("wanted no smaller t", t=4.0),
    "a late clock of NaN": wrong_at_6("wanted a polyak.rules", t=NAN),
    "a late clock of text": wrong_at_6("wanted a polyak.rules", t="6"),
    "a late clock of no time": wrong_at_6("wanted no smaller", elapsed=0),
    "a late inner clock of a number": wrong_at_6("wanted a pol", inner=3),
    "a late clock in a rule that derives from Tail": (
        LateTail(Custom(), 2),
        "follows Tick(n=5, t=5.0, elapsed=1.0, inner=Tick(n=3, t=3.0, elapsed=1.0, inner=None)), wanted a",
        6,
    ),
    "late fractions of no mapping": (
        Custom(lambda tick: copy_then(0.5)(tick) if tick.n < 6 else None),
        "has the fractions None, wanted a mapping slot -> fraction, for slots of average, slow",
        6,
    ),
    "a fault inside a tail": (
        Tail(Custom(copy_then(7.0)), 2),
        f"moves slot 'average' by 7.0, {IN}",
        4,
    ),
    "a schedule above 1": (Exponential(Wild(1.5)), f"moves slot 'average' by -0.5, {IN}", 6),
    "a schedule below 0": (Exponential(Wild(-0.5)), f"moves slot 'average' by nan, {IN}", 6),
    "a schedule of NaN": (Exponential(Wild(NAN)), f"moves slot 'average' by nan, {IN}", 6),
    "an infinite schedule": (Exponential(Wild(INF)), f"moves slot 'average' by -inf, {IN}", 6),
}
cases = pytest.mark.parametrize(("rule", "problem", "update"), FAULTY.values(), ids=FAULTY)


@cases
def test_training_refuses_it_at_its_update(rule: Rule, problem: str, update: int) -> None:
    weights = {"w": torch.ones(2)}
    averager = Averager(weights, rule)
    for _ in range(update - 1):
        averager.update()
    with pytest.raises(ValueError) as caught:
        averager.update()
    assert str(caught.value).startswith(f"{rule} at ") and problem in str(caught.value)
    assert f" at Tick(n={update}, " in str(caught.value) or "follows" in problem
    assert averager.clock.n == update - 1  # a failing update moves nothing


@cases
def test_theory_refuses_it_with_the_same_message(rule: Rule, problem: str, update: int) -> None:
    with pytest.raises(ValueError) as caught:
        profile(rule, 8)
    assert problem in str(caught.value)
    weights = {"w": torch.ones(2)}
    averager = Averager(weights, rule)
    for _ in range(update - 1):
        averager.update()
    with pytest.raises(ValueError) as trained:
        averager.update()
    assert str(caught.value) == str(trained.value)


READS_LATE: Mapping[str, Callable[[Rule], object]] = {
    "profile": lambda rule: profile(rule, 6),
    "coefficients": lambda rule: coefficients(rule, [1.0] * 6),
    "explain": lambda rule: explain(rule, 6),
    "match": lambda rule: match(Exponential, like=rule, steps=6),
}


@pytest.mark.parametrize("read", READS_LATE.values(), ids=READS_LATE)
def test_a_readout_that_goes_wrong_late_is_refused_where_it_is_read(
    read: Callable[[Rule], object],
) -> None:
    rule = Custom(reads=lambda tick: {AVERAGE: 1.0 if tick.n < 6 else 1.1})
    message = r"^custom\(\) at Tick\(n=6, .* has the readout \{'average': 1.1\}, wanted finite"
    with pytest.raises(ValueError, match=message):
        read(rule)
    averager = Averager({"w": torch.ones(2), "running_var": torch.ones(2)}, rule)
    for _ in range(6):
        averager.update()
    for used in (averager.average, lambda: averager.applied().__enter__()):
        with pytest.raises(ValueError, match=message):
            used()


@pytest.mark.parametrize("number", [np.float64, np.float32, torch.tensor], ids=lambda n: n.__name__)
def test_numbers_of_other_libraries_are_fractions_and_coefficients(
    number: Callable[[float], Any],
) -> None:
    rule = Custom(
        moves=lambda tick: {AVERAGE: number(1.0 if tick.n == 1 else 0.25)},
        reads=lambda _: {AVERAGE: number(0.75), LIVE: number(0.25)},
    )
    np.testing.assert_array_equal(profile(rule, 2), [0.5625, 0.4375])
    weights = {"w": torch.zeros(1)}
    averager = Averager(weights, rule)
    averager.update()
    weights["w"] += 1
    averager.update()
    assert averager.average()["w"].item() == 0.4375


def test_numbers_of_other_libraries_are_times_as_a_file_holds_them() -> None:
    def clock(before: Tick, elapsed: float) -> Any:
        n: Any = np.int64(before.n + 1)
        t: Any = np.float32(before.t + 1)
        span: Any = torch.tensor(elapsed)
        return Tick(n, t, span, Tick(n, t, span))

    averager = Averager({"w": torch.zeros(1)}, Custom(clock=clock))
    averager.update()
    wanted = [1, 1.0, 1.0, [1, 1.0, 1.0, None]]
    assert repr(averager.state_dict()["averages"]["average"]["tick"]) == repr(wanted)


class HalfTick(Tick):
    """A clock of a user, with a property more."""

    @property
    def half(self) -> float:
        return 0.5 * self.n


@pytest.mark.parametrize("number", [int, np.int64], ids=["int", "int64"])
def test_a_clock_keeps_its_class(number: Callable[[int], Any]) -> None:
    rule = Custom(
        moves=lambda tick: {AVERAGE: 0.5 / cast(HalfTick, tick).half},
        clock=lambda before, elapsed: HalfTick(number(before.n + 1), before.t + elapsed, elapsed),
    )
    np.testing.assert_allclose(profile(rule, 4), [0.25] * 4)


def test_a_copy_may_be_an_integer() -> None:
    rule = Custom(moves=lambda tick: {AVERAGE: 1 if tick.n == 1 else 0})
    np.testing.assert_array_equal(profile(rule, 3), [1, 0, 0])


ORDERS: list[dict[str, float]] = [
    {"slow": -1.0, AVERAGE: 2.0},
    {"slow": 0.0, AVERAGE: 1.0},
    {AVERAGE: 1.0, "slow": -1.0, LIVE: 1.0},
]


@pytest.mark.parametrize("readout", ORDERS, ids=str)
def test_coefficients_may_come_in_any_order(readout: dict[str, float]) -> None:
    """The sum so far may not pass through 0, whatever the order in which the terms are given."""
    rule = Custom(
        moves=lambda tick: {AVERAGE: 1.0 if tick.n == 1 else 0.5, "slow": 1.0 / tick.n},
        reads=lambda _: readout,
    )
    live = [1.0, 5.0, 2.0]
    weights = {"w": torch.zeros(1, dtype=torch.float64)}
    averager = Averager(weights, rule)
    for value in live:
        weights["w"].fill_(value)
        averager.update()
    held = {AVERAGE: 2.5, "slow": 8 / 3, LIVE: 2.0}
    wanted = sum(c * held[slot] for slot, c in readout.items())
    assert averager.average()["w"].item() == pytest.approx(wanted)
    assert profile(rule, 3) @ live == pytest.approx(wanted)


def test_the_names_of_a_window_are_not_made_at_every_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They may be a million, and a profile runs as many updates."""
    monkeypatch.setattr(Window, "slots", property(lambda _: pytest.fail("slots were asked for")))
    assert profile(Window(4), 9).tolist() == [0] * 5 + [0.25] * 4
    averager = Averager({"w": torch.ones(2)}, Window(3))
    for _ in range(5):
        averager.update()
