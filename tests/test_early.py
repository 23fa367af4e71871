"""With a cadence, the first call copies: there is an average before the first update, which replaces it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import polyak
from models import Everything, assert_same, wander
from polyak import Averager, Exponential, Window, checkpoints
from rule_examples import RULE_EXAMPLES

EXAMPLES = [rule for rules in RULE_EXAMPLES.values() for rule in rules]


def begun(rule: Any, calls: int = 1, **options: Any) -> tuple[nn.Module, Averager]:
    model = Everything()
    averager = Averager(model, rule, every=5, **options)
    for step in range(calls):
        averager.update()
        wander(model, step)
    return model, averager


@pytest.mark.parametrize("rule", EXAMPLES, ids=str)
@pytest.mark.parametrize("calls", [1, 2, 4])
def test_the_weights_of_the_first_call_are_the_average_until_an_update(
    rule: polyak.Rule, calls: int
) -> None:
    torch.manual_seed(0)
    model = Everything()
    first = copy.deepcopy(model.state_dict())
    averager = Averager(model, rule, every=5)
    for step in range(calls):
        averager.update()
        wander(model, step)
    average = averager.average()
    assert averager.count == 0
    live = model.state_dict()
    if "bema" not in str(rule):  # which reads the live weights too
        assert_same({**average, "frozen": first["frozen"]}, first)
    with averager.applied():
        assert_same({n: t.clone() for n, t in model.state_dict().items()}, average)
    assert_same(dict(model.state_dict()), dict(live))


@pytest.mark.parametrize("rule", EXAMPLES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"rounding": "compensated"}, {"nonfinite": "skip"}, {"nonfinite": "error"}]
)
def test_after_the_first_update_it_is_as_if_it_had_not_been(
    rule: polyak.Rule, options: dict[str, Any]
) -> None:
    """Bit for bit the averager whose host passes the time of each update."""
    weights = {"w": torch.zeros(3)}
    averager = Averager(weights, rule, every=5, **options)
    plain = Averager(weights, rule, **options)
    for step in range(1, 18):
        weights["w"].copy_(torch.randn(3))
        averager.update()
        if step % 5 == 0:
            plain.update(elapsed=5)
            assert averager.clock == plain.clock
            assert_same(averager.average(), plain.average())


USES: dict[str, Callable[[Averager, Path], object]] = {
    "average": lambda a, _: a.average(),
    "copy_to": lambda a, _: a.copy_to(Everything()),
    "module": lambda a, _: a.module(),
    "export": lambda a, path: checkpoints.export(path / "it.safetensors", a),
    "summary": lambda a, _: a.summary(),
}


@pytest.mark.parametrize("use", USES)
def test_it_can_be_used_as_any_average(use: str, tmp_path: Path) -> None:
    _, averager = begun("exponential(0.5)", 3)
    USES[use](averager, tmp_path)


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize("rule", [Exponential(0.5), Window(3), "bema()"], ids=str)
def test_it_is_saved_and_goes_on(tmp_path: Path, rule: Any, by_file: bool) -> None:
    model, averager = begun(rule, 3)
    again = Averager(model, rule, every=5)
    if by_file:
        polyak.save(tmp_path / "it", averager)
        polyak.load(tmp_path / "it", again)
    else:
        again.load_state_dict(averager.state_dict())
    assert again.count == 0
    assert_same(again.average(), averager.average())
    for step in range(9):
        wander(model, step)
        averager.update()
        again.update()
        assert (again.count, again.clock) == (averager.count, averager.clock)
        assert_same(again.average(), averager.average())


def test_a_module_has_it_and_follows() -> None:
    model, averager = begun("exponential(0.5)")
    teacher = averager.module()
    for step in range(9):
        wander(model, step)
        averager.update()
        assert_same(dict(teacher.state_dict()), averager.average())


def test_weights_that_are_not_finite_are_not_copied_early() -> None:
    weights = {"w": torch.tensor([float("nan")])}
    averager = Averager(weights, "uniform()", every=3, nonfinite="skip")
    averager.update()
    with pytest.raises(RuntimeError, match="before the first update"):
        averager.average()
    assert averager.skipped == 0
    weights["w"].fill_(1.0)
    averager.update()
    averager.update()
    assert averager.count == 1 and averager.average()["w"].item() == 1.0


def test_another_rule_may_still_come() -> None:
    model, averager = begun("exponential(0.5)", 3)
    averager.change_rule(Window(2))
    assert not averager.mixed
    for step in range(9):
        wander(model, step)
        averager.update()
    assert averager.count == 2
