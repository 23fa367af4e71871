"""What a block may do to the weights: a table of ways, and what becomes of weights and average."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import polyak
from models import assert_same, snapshot, wander
from polyak import Averager, Exponential, Window
from polyak.rules import Rule

RULES = [Exponential(0.5), Window(2)]


class Net(nn.Module):
    """Two layers; another is tied to the second, and yet another is one tensor in two objects."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.last = nn.Linear(3, 2)
        self.tied = nn.Linear(3, 2, bias=False)
        self.tied.weight = self.last.weight
        self.twin = nn.Linear(3, 2, bias=False)
        self.twin.weight = nn.Parameter(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) + self.last(x) + self.tied(x) + self.twin(x)
        return out


def averaged(rule: Rule) -> tuple[Net, Averager]:
    torch.manual_seed(0)
    model = Net()
    averager = Averager(model, rule)
    for step in range(3):
        wander(model, step)
        averager.update()
    wander(model, 9)
    return model, averager


class Step(torch.optim.SGD):
    """An optimizer with a `step` of its own, which calls its base class's."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Wrapper:
    """An optimizer in another object, as accelerate has it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


OPTIMIZERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "Adagrad, fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "a step that calls another": lambda p: Step(p, lr=0.1),
    "wrapped": lambda p: Wrapper(torch.optim.AdamW(p, fused=True)),
    "some of the weights": lambda p: torch.optim.SGD(p[-2:], lr=0.1),
    "views of them": lambda p: torch.optim.SGD([with_gradient(p[0].detach().view(-1))], lr=0.1),
}


def with_gradient(tensor: Tensor) -> Tensor:
    tensor.grad = torch.ones_like(tensor)
    return tensor


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_inside_is_refused_and_nothing_is_lost(name: str, rule: Rule) -> None:
    model, averager = averaged(rule)
    model(torch.ones(1, 3)).sum().backward()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    live, average, hooks = snapshot(model), averager.average(), len(_global_optimizer_pre_hooks)
    for _ in range(2):
        with (
            pytest.raises(
                RuntimeError, match=r"a step of \w+ inside applied\('average'\) of thread"
            ),
            averager.applied(),
        ):
            optimizer.step()
    assert_same(snapshot(model), live)
    assert_same(averager.average(), average)
    assert len(_global_optimizer_pre_hooks) == hooks
    optimizer.step()
    now = snapshot(model)
    assert any(not torch.equal(now[key], live[key]) for key in live)


def test_a_step_of_other_weights_is_allowed_inside() -> None:
    model, averager = averaged(Exponential(0.5))
    probe = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    before = snapshot(probe)
    with averager.applied():
        probe(model(torch.ones(1, 3)).detach()).sum().backward()
        optimizer.step()
    assert not torch.equal(probe.weight, before["weight"])


class Way(NamedTuple):
    """Something that a block does; what is said of it; whether the average in a slot survives it."""

    do: Callable[[Net], object]
    said: str
    survives: bool = False


def replace_all(model: Net) -> None:
    model.load_state_dict({n: torch.zeros_like(t) for n, t in snapshot(model).items()}, assign=True)


def set_data(model: Net, data: Tensor) -> None:
    model.first.weight.data = data


def free(model: Net) -> None:
    model.first.weight.untyped_storage().resize_(0)


def expose(write: Callable[[Tensor], object]) -> Callable[[Net], object]:
    def do(model: Net) -> None:
        with torch.no_grad():
            write(model.first.weight)

    return do


def narrow_and_replace(model: Net) -> None:
    model.first.half()
    model.first = copy.deepcopy(model.first).float()


WAYS = {
    "written in place": Way(expose(lambda w: w.add_(1.0)), "first.weight was written to"),
    "a row of it": Way(expose(lambda w: w[0].zero_()), "first.weight was written to"),
    "written through another object": Way(
        lambda m: nn.init.ones_(m.twin.weight), "last.weight was written to"
    ),
    "filled by name": Way(expose(lambda w: nn.init.ones_(w)), "first.weight was written to"),
    "other data": Way(lambda m: set_data(m, torch.ones(2, 3)), "first.weight was moved"),
    "another shape": Way(lambda m: set_data(m, torch.ones(5)), "first.weight was moved"),
    "a shape that broadcasts": Way(lambda m: set_data(m, torch.ones(3)), "first.weight was moved"),
    "no elements": Way(lambda m: set_data(m, torch.ones(0)), "first.weight was moved"),
    "another dtype": Way(lambda m: set_data(m, torch.ones(2, 3).double()), "weight was moved"),
    "transposed": Way(lambda m: set_data(m, m.first.weight.data.view(3, 2)), "weight was moved"),
    "through another dtype": Way(lambda m: m.half().float(), "first.weight was moved"),
    "narrowed, then replaced by a wide copy": Way(narrow_and_replace, "first.weight was replaced"),
    "freed memory": Way(free, "first.weight was moved"),
    "replaced by name": Way(
        lambda m: setattr(m.first, "weight", nn.Parameter(torch.zeros(2, 3))),
        "first.weight was replaced",
        survives=True,
    ),
    "replaced by a shape": Way(
        lambda m: setattr(m.first, "weight", nn.Parameter(torch.zeros(5))),
        "first.weight was replaced",
        survives=True,
    ),
    "loaded by assignment": Way(replace_all, "first.weight was replaced", survives=True),
    "another table": Way(
        lambda m: m.first.__dict__.update(_parameters=dict(nn.Linear(3, 2)._parameters)),
        "first.weight was replaced",
        survives=True,
    ),
    "a module replaced": Way(
        lambda m: setattr(m, "first", nn.Linear(3, 2)), "first.weight was replaced", survives=True
    ),
    "a table of modules replaced": Way(
        lambda m: m.__dict__.update(_modules={**m._modules, "first": nn.Linear(3, 2)}),
        "first.weight was replaced",
        survives=True,
    ),
    "a module of tied weights replaced": Way(
        lambda m: setattr(m, "tied", nn.Linear(3, 2, bias=False)),
        "last.weight was replaced",
        survives=True,
    ),
    "a module removed": Way(
        lambda m: delattr(m, "first"), "first.weight was removed", survives=True
    ),
    "a negative view": Way(
        lambda m: set_data(m, torch._neg_view(m.first.weight.data)), "could not be exchanged"
    ),
    "replaced under another name": Way(
        lambda m: setattr(m.tied, "weight", nn.Parameter(torch.zeros(2, 3))),
        "last.weight was replaced",
        survives=True,
    ),
    "removed": Way(lambda m: delattr(m.first, "weight"), "first.weight was removed", survives=True),
}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_live_weights_come_back_whatever_a_block_does(way: str, rule: Rule) -> None:
    model, averager = averaged(rule)
    live, average = snapshot(model), averager.average()
    kept_aside = isinstance(rule, Window)
    block = averager.applied()
    block.__enter__()
    WAYS[way].do(model)
    with pytest.raises(RuntimeError, match=WAYS[way].said):
        block.__exit__(None, None, None)
    now = snapshot(model)
    if way == "another dtype":
        now["first.weight"] = now["first.weight"].to(torch.float32)
    if "removed" in way:
        live = {name: live[name] for name in live.keys() & now.keys()}
    assert_same({name: now[name] for name in live}, live)
    if "removed" in way:
        return
    model.tied.weight = model.last.weight  # where the block has untied them
    model.twin.weight = nn.Parameter(model.last.weight)
    set_data(model, model.first.weight.data.resolve_neg().to(torch.float32))
    if WAYS[way].survives or kept_aside:
        assert_same(averager.average(), average)
    else:
        with pytest.raises(RuntimeError, match="load a saved state first"):
            averager.average()


ASKED: dict[str, Callable[[Averager, Path], object]] = {
    "tracked": lambda averager, _: averager.tracked,
    "sharded": lambda averager, _: averager.sharded,
    "summary": lambda averager, _: averager.summary(),
    "average": lambda averager, _: averager.average(),
    "update": lambda averager, _: averager.update(),
    "another block": lambda averager, _: averager.applied().__enter__(),
    "state_dict": lambda averager, _: averager.state_dict(),
    "check_replicas": lambda averager, _: averager.check_replicas(),
    "copy": lambda averager, _: copy.deepcopy(averager),
    "load": lambda averager, path: polyak.load(path, averager),
    "save": lambda averager, path: polyak.save(path.with_suffix(".other"), averager),
}
"""Calls inside a block that may look for the model's tensors."""


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way].survives])
def test_a_call_inside_hides_nothing_that_the_block_has_replaced(
    way: str, asked: str, tmp_path: Path
) -> None:
    model, averager = averaged(Exponential(0.5))
    polyak.save(tmp_path / "saved", averager)
    live, block = snapshot(model), averager.applied()
    block.__enter__()
    WAYS[way].do(model)
    with suppress(RuntimeError):
        ASKED[asked](averager, tmp_path / "saved")
    with pytest.raises(RuntimeError, match=WAYS[way].said):
        while averager._swapper.swap is not None:
            block.__exit__(None, None, None)
    now = snapshot(model)
    assert_same({n: now[n] for n in live.keys() & now}, {n: live[n] for n in live.keys() & now})


def test_a_slot_that_is_written_to_inside_is_told() -> None:
    """It holds the live weight there. Who kept the averager's own tensors can reach it."""
    model, averager = averaged(Exponential(0.5))
    slots = averager.state_dict()["averages"]["average"]["slots"]["average"]
    with (
        pytest.raises(RuntimeError, match=r"the slot of first.weight was written to"),
        averager.applied(),
    ):
        slots["first.weight"].zero_()
    with pytest.raises(RuntimeError, match="load a saved state first"):
        averager.average()
    assert not model.first.weight.any()


def test_weights_asked_for_before_a_block_are_refused_in_it() -> None:
    """Their slots hold the live weights there."""
    _, averager = averaged(Exponential(0.5))
    weights, average = averager.weights(), averager.average()
    with averager.applied():
        with pytest.raises(
            RuntimeError, match=r"first.weight: inside applied\(\) this average is in the model"
        ):
            weights["first.weight"]
        with pytest.raises(RuntimeError, match=r"inside applied\(\) this average is in the model"):
            weights.whole()
    assert_same(weights.whole(), average)


def test_a_rule_that_reads_live_weights_is_refused_where_they_are_lent() -> None:
    model, averager = averaged(Exponential(0.5))
    bema = Averager(model, "bema()")
    bema.update()
    average = bema.average()
    with averager.applied():
        for call in (bema.average, bema.applied().__enter__):
            with pytest.raises(
                RuntimeError, match=r"reads the live weights: first.weight has an average"
            ):
                call()
    assert_same(bema.average(), average)
