"""Holders of an averager are copied and pickled; hosts with hooks and no block enter and leave."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from models import Everything, assert_same, everything, snapshot, wander
from polyak import Averager, Exponential, Window
from rule_examples import RULE_EXAMPLES, each_rule

EXAMPLES = [rule for rules in RULE_EXAMPLES.values() for rule in rules]


def pickled(holder: Any) -> Any:
    return pickle.loads(pickle.dumps(holder))


COPIERS: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": pickled}


class Holder:
    """As trainers and callbacks are: a model and an averager of it."""

    def __init__(self, rule: Any = "exponential(0.5)", **options: Any) -> None:
        self.model = everything()
        self.averager = Averager(self.model, rule, **options)

    def train(self, steps: range) -> None:
        for step in steps:
            wander(self.model, step)
            self.averager.update()


class Whole(nn.Module):
    """As LightningModules are: a module that has the network, and an averager of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = everything()
        self.averager = Averager(self.net, "exponential(0.5)")

    @property
    def model(self) -> nn.Module:
        return self.net

    train_steps = Holder.train


class Own(nn.Module):
    """A model that has an averager of itself: it leaves it out of copies, in two lines."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.averager = Averager(self, "exponential(0.5)")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "averager": None}


class Careless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.averager = Averager(self, "exponential(0.5)")


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "every": {"every": 3},
    "wide": {"dtype": torch.float64},
    "narrow": {"dtype": torch.bfloat16, "rounding": "compensated"},
    "selected": {"select": ["body.*", "norm*"], "buffers": {"spectral_u": "average"}},
    "guarded": {"nonfinite": "skip"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
def test_a_holder_is_copied_with_its_averager(
    copier: Callable[[Any], Any], options: dict[str, Any]
) -> None:
    holder = Holder(**options)
    holder.train(range(5))
    again = copier(holder)
    assert again.averager.model is again.model is not holder.model
    before = holder.averager.average()
    for each in (holder, again):
        each.train(range(5, 12))
    assert again.averager.count == holder.averager.count
    assert_same(again.averager.average(), holder.averager.average())
    holder.train(range(12, 15))
    assert not torch.equal(
        again.averager.average()["body.weight"], holder.averager.average()["body.weight"]
    )
    assert before.keys() == again.averager.average().keys()


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def to_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


@pytest.mark.parametrize("now", DTYPES, ids=str)
@pytest.mark.parametrize("then", DTYPES, ids=str)
@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
def test_a_copy_has_the_same_state_whatever_dtype_the_model_has_by_then(
    copier: Callable[[Any], Any], then: torch.dtype, now: torch.dtype
) -> None:
    holder = Holder({"a": "bema()", "b": "exponential(0.5)"}, buffers="copy")
    to_dtype(holder.model, then)
    holder.averager = Averager(holder.model, holder.averager.rules, buffers="copy")
    holder.train(range(3))
    to_dtype(holder.model, now)
    again = copier(holder)
    assert_same(flat(again.averager.state_dict()), flat(holder.averager.state_dict()))
    for each in (holder, again):
        each.train(range(3, 5))
    assert_same(flat(again.averager.state_dict()), flat(holder.averager.state_dict()))


def flat(data: Any, path: str = "") -> dict[str, Tensor]:
    """path -> tensor in a state; numbers and texts are tensors of their own."""
    if isinstance(data, dict):
        return {k: v for key, each in data.items() for k, v in flat(each, f"{path}/{key}").items()}
    return {path: data if isinstance(data, Tensor) else torch.tensor(list(str(data).encode()))}


@pytest.mark.parametrize("rule", each_rule(EXAMPLES), ids=str)
def test_every_rule_is_copied(rule: polyak.Rule) -> None:
    holder = Holder({"a": rule, "b": Window(2)})
    holder.train(range(6))
    again = pickled(holder)
    for each in (holder, again):
        each.train(range(6, 9))
    assert again.averager.rules == holder.averager.rules
    assert_same(again.averager.average("a"), holder.averager.average("a"))


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
def test_a_module_is_copied_with_an_averager_of_its_part(copier: Callable[[Any], Any]) -> None:
    whole = Whole()
    Whole.train_steps(whole, range(3))  # type: ignore[arg-type]
    again = copier(whole)
    assert again.averager.model is again.net
    assert_same(again.averager.average(), whole.averager.average())


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
def test_before_the_first_update_it_is_copied_too(copier: Callable[[Any], Any]) -> None:
    again = copier(Holder())
    assert again.averager.count == 0
    again.train(range(2))
    assert again.averager.count == 2


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
def test_a_model_with_an_averager_of_itself_leaves_it_out(copier: Callable[[Any], Any]) -> None:
    model = Own()
    model.averager.update()
    again = copier(model)
    assert again.averager is None and torch.equal(again.weight, model.weight)


def test_one_that_does_not_says_what_to_write() -> None:
    model = Careless()
    model.averager.update()
    with pytest.raises(TypeError, match=r"Careless has an Averager of itself.*__getstate__"):
        copy.deepcopy(model)


@pytest.mark.parametrize("kind", [Whole, Own, Careless])
def test_the_module_of_an_average_has_no_averager(kind: Any) -> None:
    holder = kind()
    averager = Averager(holder, "uniform()")
    averager.update()
    holder.averager = averager
    for share in (False, True):
        assert averager.module(copy=share).averager is None


def test_what_froze_later_is_averaged_on_in_the_copy() -> None:
    holder = Holder()
    holder.train(range(2))
    holder.model.body.requires_grad_(False)
    again = copy.deepcopy(holder)
    policies = {item.name: item.policy for item in again.averager.tracked}
    assert policies == {item.name: item.policy for item in holder.averager.tracked}


def test_a_shallow_copy_is_a_second_averager_of_the_model() -> None:
    holder = Holder()
    holder.train(range(2))
    second = copy.copy(holder.averager)
    assert second.model is holder.model
    average = second.average()
    assert_same(average, holder.averager.average())
    holder.train(range(2, 4))
    assert second.count == 2 and torch.equal(second.average()["scale"], average["scale"])


class Counting(Averager):
    """A subclass with attributes, of which one is there before the averager is."""

    def __init__(self, model: nn.Module) -> None:
        self.name = "mine"
        super().__init__(model, "uniform()")
        self.calls: list[float] = []

    def update(self, elapsed: float | None = None) -> None:
        super().update(elapsed)
        self.calls.append(1.0 if elapsed is None else elapsed)


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
def test_a_copy_of_a_subclass_is_one_with_its_attributes(copier: Callable[[Any], Any]) -> None:
    averager = Counting(nn.Linear(2, 1))
    averager.update(2.0)
    other = copier(averager)
    other.update()
    assert isinstance(other, Counting) and other.name == "mine"
    assert (averager.calls, averager.count) == ([2.0], 1)
    assert (other.calls, other.count, other.clock.t) == ([2.0, 1.0], 2, 3.0)


def test_inside_a_block_it_is_refused() -> None:
    holder = Holder()
    holder.train(range(2))
    with holder.averager.applied(), pytest.raises(RuntimeError, match=r"copy: .*, in a block"):
        copy.deepcopy(holder)


# enter and leave


@pytest.fixture
def training() -> tuple[Everything, Averager]:
    model = Everything()
    averager = Averager(model, {"fast": Exponential(0.5), "slow": Exponential(0.9)})
    for step in range(4):
        wander(model, step)
        averager.update()
    return model, averager


def carried(model: nn.Module, average: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[n], t) for n, t in average.items())


def test_a_block_stays_open_though_no_one_keeps_it(training: tuple[Everything, Averager]) -> None:
    model, averager = training
    live, average = snapshot(model), averager.average("slow")
    averager.applied("slow").enter()
    gc.collect()
    assert carried(model, average)
    with pytest.raises(RuntimeError, match=r"update inside applied\('slow'\)"):
        averager.update()
    averager.applied("slow").leave()
    assert_same(snapshot(model), live)
    averager.update()


def test_a_with_block_that_is_dropped_still_ends(training: tuple[Everything, Averager]) -> None:
    model, averager = training
    live = snapshot(model)
    averager.applied("slow").__enter__()
    gc.collect()
    assert_same(snapshot(model), live)


def test_leave_ends_the_last_of_its_average(training: tuple[Everything, Averager]) -> None:
    model, averager = training
    live, average = snapshot(model), averager.average("fast")
    handle = averager.applied("fast")
    handle.enter()
    averager.applied("fast").enter()
    handle.leave()
    assert carried(model, average)
    averager.applied("slow").leave()  # of which none is open
    assert carried(model, average)
    handle.leave()
    assert_same(snapshot(model), live)
    handle.leave()  # so that every hook that could be the last may call it
    assert_same(snapshot(model), live)


def test_enter_and_a_with_block_nest(training: tuple[Everything, Averager]) -> None:
    model, averager = training
    live, average = snapshot(model), averager.average("fast")
    averager.applied("fast").enter()
    with averager.applied("fast"):
        averager.applied("fast").leave()
        assert carried(model, average)
    assert_same(snapshot(model), live)


def test_enter_raises_what_a_block_raises(training: tuple[Everything, Averager]) -> None:
    model, averager = training
    averager.applied("fast").enter()
    with pytest.raises(RuntimeError, match=r"applied\('slow'\) inside applied\('fast'\)"):
        averager.applied("slow").enter()
    averager.applied("slow").leave()
    averager.applied("fast").leave()
    for call in ("enter", "leave"):
        with pytest.raises(KeyError, match="'other' is unknown"):
            getattr(averager.applied("other"), call)()
    with pytest.raises(RuntimeError, match="before the first update"):
        Averager(model, "uniform()").applied().enter()


def test_leave_tells_of_writes(training: tuple[Everything, Averager]) -> None:
    model, averager = training
    live = snapshot(model)
    averager.applied("fast").enter()
    with torch.no_grad():
        model.body.bias.add_(1)
    with pytest.raises(RuntimeError, match=r"body.bias was written to"):
        averager.applied("fast").leave()
    averager.applied("slow").enter()
    with torch.no_grad():
        model.body.bias.add_(1)
    error = ValueError("the host's own")
    averager.applied("slow").leave(error)
    assert "body.bias was written to" in error.__notes__[0]
    assert torch.equal(model.body.weight, live["body.weight"])
