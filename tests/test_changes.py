"""An average goes on from other weights, under another rule, in another dtype: in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from models import Everything, assert_same, pointers, wander
from polyak import Averager, Bema, Exponential, Power, Tail, Uniform, Window
from polyak.rules import AVERAGE, START, Rule, Tick
from polyak.rules._clocks import tick_after
from polyak.theory import coefficients, profile
from rule_examples import RULE_EXAMPLES, each_rule

EXAMPLES = [rule for rules in RULE_EXAMPLES.values() for rule in rules]
SINGLE = [rule for rule in EXAMPLES if len(rule.slots) == 1]


def trained(rule: Any, steps: int = 6, **options: Any) -> tuple[nn.Module, Averager]:
    torch.manual_seed(0)
    model = Everything()
    averager = Averager(model, rule, **options)
    train(model, averager, range(steps))
    return model, averager


def train(model: nn.Module, averager: Averager, steps: range) -> None:
    for step in steps:
        wander(model, step)
        averager.update()


# begin


@pytest.mark.parametrize("rule", each_rule(SINGLE), ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_from_an_average_and_its_count_it_goes_on_bit_for_bit(
    rule: polyak.Rule, every: int
) -> None:
    model, averager = trained(rule, 7, every=every)
    again = Averager(model, rule, every=every)
    again.begin(averager.average(), averager.count)
    assert (again.count, again.clock) == (averager.count, averager.clock)
    for step in range(7, 13):
        wander(model, step)
        averager.update()
        again.update()
    assert_same(again.average(), averager.average())


@pytest.mark.parametrize("rule", each_rule(EXAMPLES), ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_every_rule_begins_as_if_its_first_update_had_copied(
    rule: polyak.Rule, rounding: Any
) -> None:
    """A target network that begins apart from its model."""
    first = {"w": torch.full((3,), 5.0)}
    seen, other = {"w": first["w"].clone()}, {"w": torch.zeros(3)}
    wanted, begun = (Averager(each, rule, rounding=rounding) for each in (seen, other))
    wanted.update()
    begun.begin(first)
    for step in range(5):
        for averager, weights in ((wanted, seen), (begun, other)):
            weights["w"].copy_(torch.arange(3.0) + step)
            averager.update()
    assert_same(begun.average(), wanted.average())


def test_a_mapping_of_any_kind_is_copied_and_its_buffers_are_the_models_where_it_has_none() -> None:
    model, averager = trained("exponential(0.5)", 1)
    given = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    averager.begin(given, 7)
    average = averager.average()
    given["scale"].zero_()
    assert average["scale"].item() == averager.average()["scale"].item() == 1.0
    assert torch.equal(average["norm.running_mean"], model.get_buffer("norm.running_mean"))
    assert torch.equal(average["counter"], model.get_buffer("counter"))
    averager.begin(model.state_dict(), 7)
    assert_same(averager.average(), dict(model.state_dict()))


def test_tied_weights_may_be_given_by_either_name() -> None:
    for name in ("embedding.weight", "head.weight"):
        model, averager = trained("uniform()", 1)
        given = {n: t for n, t in model.state_dict().items() if "weight" not in n or "body" in n}
        given |= {"norm.weight": torch.ones(4), name: torch.full((5, 4), 3.0)}
        averager.begin(given)
        assert torch.equal(averager.average()["head.weight"], torch.full((5, 4), 3.0))


def test_one_of_several_averages_begins_and_the_other_goes_on() -> None:
    rules = {"a": Exponential(0.5), "b": Uniform()}
    model, averager = trained(rules, 4)
    before = averager.average("b")
    averager.begin({n: torch.zeros_like(t) for n, t in model.state_dict().items()}, 9, "a")
    assert not averager.average("a")["scale"].any()
    assert_same(
        {n: t for n, t in averager.average("b").items() if t.is_floating_point()},
        {n: t for n, t in before.items() if t.is_floating_point()},
    )
    averager.begin(model.state_dict())
    assert_same(averager.average("a"), averager.average("b"))


BAD: dict[str, tuple[Callable[[Averager, dict[str, Tensor]], object], str]] = {
    "missing": (lambda a, w: a.begin({"scale": w["scale"]}), r"missing: .*embedding.weight"),
    "extra": (lambda a, w: a.begin({**w, "other": w["scale"]}), r"begin: .*\n  extra: other"),
    "a number as a name": (lambda a, w: a.begin({**w, 1: w["scale"]}), r"begin: .*\n  extra: 1"),  # type: ignore[dict-item]
    "a shape": (lambda a, w: a.begin({**w, "scale": torch.ones(2)}), r"scale: .*wanted"),
    "too large a count": (
        lambda a, w: a.begin(w, 10**9),
        r"begin: count is 1000000000, wanted at most 100000000",
    ),
    "a count": (lambda a, w: a.begin(w, 0), r"begin: count is 0, wanted an integer >= 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_refused_and_changes_nothing(kind: str) -> None:
    model, averager = trained("exponential(0.5)", 3)
    call, words = BAD[kind]
    average = averager.average()
    with pytest.raises(ValueError, match=words):
        call(averager, dict(model.state_dict()))
    assert_same(averager.average(), average)
    assert averager.count == 3


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("rule", ["uniform()", "power(3)", "tail(uniform(), 4)"])
def test_it_begins_at_the_clock_of_so_many_updates(rule: str, every: int) -> None:
    weights = {"w": torch.ones(2)}
    for count in (1, 2, 9):
        begun, trained = (Averager(weights, rule, every=every) for _ in range(2))
        begun.begin(count=count)
        for _ in range((count - 1) * every + 1):
            trained.update()
        assert begun.clock == trained.clock and begun.count == count


def test_an_average_of_more_updates_than_a_minute_can_count_begins_at_once_and_is_saved(
    tmp_path: Path,
) -> None:
    weights = {"w": torch.ones(2)}
    averager, again = Averager(weights, "uniform()"), Averager(weights, "uniform()")
    averager.begin(count=10**8)
    averager.update()
    polyak.save(tmp_path / "it", averager)
    polyak.load(tmp_path / "it", again)
    assert again.clock == (10**8 + 1, 10.0**8 + 1, 1.0, None)


@dataclass(frozen=True)
class TwiceAsFast(Tail):
    """A rule that has a clock of its own: time runs twice as fast."""

    def tick(self, before: Tick, elapsed: float) -> Tick:
        return super().tick(before, 2 * elapsed)


CLOCKS = [
    Uniform(), Bema(), Tail(Uniform(), 0), Tail(Uniform(), 0.5), Tail(Uniform(), 4), Tail(Uniform(), 1e300),
    Tail(Bema(), 3), Tail(Tail(Bema(), 2), 9), TwiceAsFast(Uniform(), 4), Tail(TwiceAsFast(Bema(), 3), 4),
]  # fmt: skip


@pytest.mark.parametrize("rule", CLOCKS, ids=str)
@pytest.mark.parametrize(("first", "elapsed"), [(1.0, 1.0), (1.0, 4.0), (4.0, 4.0), (0.25, 0.5)])
def test_a_clock_after_many_updates_is_that_of_single_steps(
    rule: Rule, first: float, elapsed: float
) -> None:
    tick = START
    for n in range(12):
        assert tick_after(rule, n, first, elapsed) == tick
        tick = rule.tick(tick, elapsed if n else first)


def test_a_clock_of_a_user_is_refused_where_its_steps_would_take_minutes() -> None:
    assert tick_after(Tail(Tail(Bema(), 2), 9), 10**8, 1.0, 4.0).n == 10**8
    averager = Averager({"w": torch.ones(2)}, TwiceAsFast(Uniform(), 4))
    with pytest.raises(
        ValueError, match=r"has its own tick\(\).* got 100000000 updates, wanted at most"
    ):
        averager.begin(count=10**8)
    assert averager.count == 0


def test_several_slots_after_several_updates_are_not_told_by_weights() -> None:
    for rule in (Window(3), Bema(), Tail(Window(2), 1)):
        model, averager = trained(rule, 1)
        with pytest.raises(ValueError, match=r"begin: .* has the slots .*pass count=1"):
            averager.begin(model.state_dict(), 2)


def test_it_mends_a_spoilt_average_and_fills_a_module() -> None:
    model, averager = trained("exponential(0.5)", 3)
    weights = copy.deepcopy(model.state_dict())
    teacher = averager.module()
    with torch.no_grad():
        teacher.get_parameter("scale").add_(1)
    with pytest.raises(RuntimeError, match="was written to"):
        averager.average()
    before = pointers(teacher)
    averager.begin(weights, 3)
    assert_same(dict(teacher.state_dict()), dict(weights))
    assert pointers(teacher) == before


def test_weights_that_thaw_are_averaged_on_by_a_new_averager() -> None:
    """The way on after `requires_grad` has changed."""
    model, averager = trained("exponential(0.5)", 3)
    average, count = averager.average(), averager.count
    model.requires_grad_(True)
    again = Averager(model, "exponential(0.5)")
    again.begin(average, count)
    assert_same(again.average(), average)
    train(model, again, range(3, 5))


def test_without_weights_it_begins_from_the_model_as_it_is() -> None:
    """As classes do that copy the model when they are made: there is an average before any call."""
    model = Everything()
    averager = Averager(model, {"a": Exponential(0.5), "b": Window(2)}, every=4)
    with pytest.raises(RuntimeError, match=r"before the first update.*or begin\(\)"):
        averager.average("a")
    averager.begin()
    state = copy.deepcopy(dict(model.state_dict()))
    for name in ("a", "b"):
        assert_same(averager.average(name), state)
    with averager.applied("a"):
        assert_same(dict(model.state_dict()), state)
    for step in range(4):
        wander(model, step)
        averager.update()
    wanted = torch.lerp(state["scale"], model.get_parameter("scale"), 1 - 0.5**4)
    torch.testing.assert_close(averager.average("a")["scale"], wanted.detach())
    assert averager.count == 2


@pytest.mark.parametrize("rule", each_rule(EXAMPLES), ids=str)
def test_a_host_may_have_a_cadence_of_its_own(rule: polyak.Rule) -> None:
    """At its first step and at each third after it, as a rule's theory says of these times."""
    weights = {"w": torch.zeros(8, dtype=torch.float64)}
    averager = Averager(weights, rule)
    for step in range(22):
        if step % 3 == 0:
            weights["w"].zero_()[step // 3] = 1.0
            averager.update(elapsed=3 if step else 1)
    expected = torch.from_numpy(coefficients(rule, [1.0, *[3.0] * 7]))
    torch.testing.assert_close(averager.average()["w"], expected, rtol=0, atol=1e-12)


def test_copied_buffers_are_those_of_the_last_update() -> None:
    model = nn.BatchNorm1d(3)
    averager = Averager(model, "exponential(0.5)", every=3)
    for _ in range(7):
        model(torch.randn(4, 3))
        averager.update()
    assert averager.average()["num_batches_tracked"].item() == 7


def test_a_state_of_another_rule_is_refused_with_a_way_to_go_on() -> None:
    """As a host resumes that has no option for it: Fabric, ignite."""
    model, averager = trained("exponential(0.9)", 4)
    state = averager.state_dict()
    with pytest.raises(
        ValueError, match=r"(?s)make it with the state's, and call change_rule\(\).*0\.5"
    ):
        Averager(model, "exponential(0.5)").load_state_dict(state)
    again = Averager(model, "exponential(0.9)")
    again.load_state_dict(state)
    again.change_rule("exponential(0.5)")
    assert (str(again.rule), again.count, again.mixed) == ("exponential(0.5)", 4, True)
    assert_same(again.average(), averager.average())


# Weights handed in


@pytest.mark.parametrize("in_place", [True, False])
def test_a_mapping_may_be_refilled_before_every_update(in_place: bool) -> None:
    """As weights that come from elsewhere: a queue, another process, an engine's shards."""
    held = {"w": torch.zeros(4, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}
    averager = Averager(held, Exponential(0.9))
    path = []
    for _ in range(12):
        arrived = {name: torch.randn_like(tensor) for name, tensor in held.items()}
        path.append(arrived)
        for name, tensor in arrived.items():
            if in_place:
                held[name].copy_(tensor)
            else:
                held[name] = tensor.clone()
        averager.update()
    weights = torch.from_numpy(profile(Exponential(0.9), 12))
    for name, average in averager.average().items():
        expected = torch.tensordot(weights, torch.stack([p[name] for p in path]), dims=1)
        torch.testing.assert_close(average, expected)


# change_rule


@pytest.mark.parametrize("second", each_rule(r for r in SINGLE if r.slots == ("average",)), ids=str)
@pytest.mark.parametrize("first", [Exponential(0.5), Power(3.0)], ids=str)
def test_another_rule_goes_on_as_load_does(
    tmp_path: Path, first: polyak.Rule, second: polyak.Rule
) -> None:
    model, averager = trained(first, 5)
    polyak.save(tmp_path / "it", averager)
    loaded = Averager(model, second)
    polyak.load(tmp_path / "it", loaded, change_rule=True)
    averager.change_rule(second)
    assert averager.rule == second and averager.mixed == loaded.mixed == (second != first)
    assert averager.clock == loaded.clock
    for step in range(5, 9):
        wander(model, step)
        averager.update()
        loaded.update()
    assert_same(averager.average(), loaded.average())
    polyak.save(tmp_path / "again", averager)
    polyak.load(tmp_path / "again", Averager(model, second))


def test_a_rule_that_needs_other_slots_is_refused() -> None:
    _, averager = trained(Exponential(0.5), 4)
    for rule in (Bema(), Window(3), "tail(window(2), 1)"):
        with pytest.raises(ValueError, match=r"change_rule: .* needs .*begin\(average\(\)\)"):
            averager.change_rule(rule)
    assert averager.rule == Exponential(0.5) and not averager.mixed
    with pytest.raises(TypeError, match=r"a rule is 0\.5"):
        averager.change_rule(0.5)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        averager.change_rule(Uniform(), "other")


def test_before_the_first_update_any_rule_may_come() -> None:
    model = Everything()
    averager = Averager(model, Exponential(0.5))
    averager.change_rule("window(2)")
    train(model, averager, range(4))
    alone = trained("window(2)", 4)[1]
    assert not averager.mixed and averager.count == alone.count


@dataclass(frozen=True)
class Doubled(Rule):
    """A rule whose coefficients sum to 2."""

    def fractions(self, tick: Tick) -> dict[str, float]:
        return {AVERAGE: 1 / tick.n}

    def readout(self, _: Tick) -> dict[str, float]:
        return {AVERAGE: 2.0}


def test_a_new_rule_of_a_user_is_checked_like_the_first() -> None:
    _, averager = trained(Uniform(), 1)
    averager.change_rule(Doubled())
    with pytest.raises(ValueError, match=r"doubled\(\) .* has the readout .*sum to 1"):
        averager.update()


def test_a_module_keeps_its_slot() -> None:
    model, averager = trained(Exponential(0.5), 3)
    teacher = averager.module()
    averager.change_rule(Uniform())
    train(model, averager, range(3, 6))
    assert_same(dict(teacher.state_dict()), averager.average())


# to


@pytest.mark.parametrize("rule", each_rule(EXAMPLES), ids=str)
def test_wider_slots_hold_the_same_and_go_on_as_wide_ones(rule: polyak.Rule) -> None:
    model, averager = trained(rule, 4)
    before = averager.average()
    averager.to(dtype=torch.float64)
    after = averager.average()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name].to(tensor.dtype), tensor)
    assert after["body.weight"].dtype == torch.float64 and after["phase"].dtype == torch.complex128
    wide = Averager(model, rule, dtype=torch.float64)
    wide.load_state_dict(averager.state_dict())
    for step in range(4, 9):
        wander(model, step)
        averager.update()
        wide.update()
    assert_same(averager.average(), wide.average())


def test_slots_to_come_have_the_dtype_too() -> None:
    model = Everything()
    averager = Averager(model, Window(3))
    for dtype, steps in ((torch.float64, range(2)), (torch.float32, range(2, 4))):
        averager.to(dtype=dtype)
        train(model, averager, steps)
        slots = averager.state_dict()["averages"]["average"]["slots"]
        assert {slot["scale"].dtype for slot in slots.values()} == {dtype}


@pytest.mark.parametrize("rounding", ["nearest", "compensated", "stochastic"])
def test_narrower_slots_round(rounding: Any) -> None:
    model = nn.Linear(3, 3)
    averager = Averager(model, Exponential(0.5), dtype=torch.bfloat16, rounding=rounding)
    averager.update()
    before = averager.average()
    averager.to(dtype=torch.float16)
    assert averager.average()["weight"].dtype == torch.float16
    torch.testing.assert_close(averager.average()["weight"].bfloat16(), before["weight"])
    averager.update()
    if rounding == "stochastic":
        with pytest.raises(ValueError, match=r"stochastic rounding of torch\.float32 slots"):
            averager.to(dtype=torch.float32)


def test_another_place() -> None:
    _, averager = trained("exponential(0.5)", 3)
    average = averager.average()
    averager.to(device="cpu")
    assert_same(averager.average(), average)
    averager.to(device="meta")
    assert {t.device.type for t in averager.state_dict()["copies"].values()} == {"meta"}


def test_a_module_follows_or_refuses() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    averager = Averager(model, "exponential(0.5)")
    train(model, averager, range(3))
    teacher = averager.module()
    with pytest.raises(ValueError, match=r"to: the slot of .* is torch.float64 on cpu, and the"):
        averager.to(dtype=torch.float64)
    assert averager.average()["0.weight"].dtype == torch.float32
    model.double()
    averager.to(dtype=torch.float64)
    train(model, averager, range(3, 5))
    assert teacher.get_parameter("0.weight").dtype == torch.float64
    assert_same(dict(teacher.state_dict()), averager.average())


def test_what_slots_cannot_have() -> None:
    _, averager = trained("exponential(0.5)", 2)
    with pytest.raises(ValueError, match=r"dtype is torch.int8, wanted one of"):
        averager.to(dtype=torch.int8)
    with averager.applied(), pytest.raises(RuntimeError, match="to inside applied"):
        averager.to(dtype=torch.float64)


# States of another dtype

WIDER = [
    (torch.float32, torch.float64, True),
    (torch.bfloat16, torch.float32, True),
    (torch.float16, torch.float64, True),
    (torch.float64, torch.float32, False),
    (torch.float16, torch.bfloat16, False),
    (torch.bfloat16, torch.float16, False),
]


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize(("held", "slots", "fits"), WIDER, ids=str)
def test_a_state_fits_into_slots_that_can_hold_it(
    tmp_path: Path, held: torch.dtype, slots: torch.dtype, fits: bool, by_file: bool
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    saved, wide = (Averager(model, "exponential(0.5)", dtype=dtype) for dtype in (held, slots))
    train(model, saved, range(3))
    polyak.save(tmp_path / "it", saved)

    def load() -> None:
        if by_file:
            polyak.load(tmp_path / "it", wide)
        else:
            wide.load_state_dict(saved.state_dict())

    if not fits:
        with pytest.raises(ValueError, match=r"0\.weight"):
            load()
        return
    load()
    expected = saved.average()
    assert wide.average()["0.weight"].dtype == slots
    for name, tensor in wide.average().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype))
