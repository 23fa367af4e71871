"""Frozen parameters: by default they are neither averaged nor held nor saved, and every average has them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import polyak
from models import Everything, assert_same, snapshot
from polyak import Averager, checkpoints
from rule_examples import RULE_EXAMPLES, each_rule


class Adapted(nn.Module):
    """A base that does not train, and an adapter that does, as LoRA makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(64)
        self.base.requires_grad_(False)
        self.norm.requires_grad_(False)
        self.down = nn.Linear(64, 1, bias=False)
        self.up = nn.Linear(1, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.base(x)) + self.up(self.down(x))
        return y


TRAINS = ["norm.running_mean", "norm.running_var", "down.weight", "up.weight"]


@torch.no_grad()
def train(model: nn.Module, averager: Averager, steps: int = 5) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(8, 64))
        averager.update()


def averaged(rule: Any = "exponential(0.5)", **options: Any) -> tuple[Adapted, Averager]:
    torch.manual_seed(0)
    model = Adapted()
    averager = Averager(model, rule, **options)
    train(model, averager)
    return model, averager


@pytest.mark.parametrize(
    "rule", each_rule([r for rules in RULE_EXAMPLES.values() for r in rules]), ids=str
)
def test_only_what_trains_is_averaged_held_and_saved(tmp_path: Path, rule: polyak.Rule) -> None:
    model, averager = averaged(rule)
    for slot in averager.state_dict()["averages"]["average"]["slots"].values():
        assert list(slot) == TRAINS
    slots = len(averager.state_dict()["averages"]["average"]["slots"])
    held = sum(model.state_dict()[name].nbytes for name in TRAINS)
    copied = 8  # num_batches_tracked
    assert averager.summary().memory == slots * held + copied
    polyak.save(tmp_path / "it", averager)
    stored = load_file(tmp_path / "it")
    assert not any(key.endswith(("base.weight", "norm.weight")) for key in stored)


def test_the_summary_says_so() -> None:
    _, averager = averaged()
    rows = {row.name: row for row in averager.summary().rows}
    frozen = {name for name, row in rows.items() if row.policy == "frozen"}
    assert frozen == {"base.weight", "base.bias", "norm.weight", "norm.bias"}
    row = rows["base.weight"]
    assert (row.slot_dtype, row.reason) == (None, "requires_grad=False: read from the model")


def test_an_average_is_complete() -> None:
    model, averager = averaged()
    average = averager.average()
    Adapted().load_state_dict(average)
    with averager.applied():
        assert_same({n: t.clone() for n, t in model.state_dict().items()}, average)
    assert_same(dict(averager.weights()), average)
    assert averager.weights().specs.keys() == average.keys()
    with torch.no_grad():
        average["base.weight"].zero_()
    assert model.base.weight.any()


TARGETS: dict[str, Callable[[Adapted], Any]] = {
    "the model": lambda model: model,
    "a new one, all trainable": lambda _: Adapted().requires_grad_(True),
    "a new one, all frozen": lambda _: Adapted().requires_grad_(False),
    "a state": lambda _: Adapted().state_dict(),
}


@pytest.mark.parametrize("target", TARGETS)
def test_copy_to_writes_all(target: str) -> None:
    model, averager = averaged()
    other, average = TARGETS[target](model), averager.average()
    version = model.base.weight._version
    averager.copy_to(other)
    assert_same(dict(other if isinstance(other, dict) else other.state_dict()), average)
    assert model.base.weight._version == version


def test_an_export_is_the_average(tmp_path: Path) -> None:
    _, averager = averaged()
    checkpoints.export(tmp_path / "it.safetensors", averager)
    assert_same(load_file(tmp_path / "it.safetensors"), averager.average())


def test_it_goes_on_from_a_file_bit_for_bit(tmp_path: Path) -> None:
    model, averager = averaged()
    polyak.save(tmp_path / "it", averager)
    again = copy.deepcopy(model)
    resumed = Averager(again, "exponential(0.5)")
    polyak.load(tmp_path / "it", resumed)
    for each, of in ((averager, model), (resumed, again)):
        torch.manual_seed(1)
        train(of, each)
    assert_same(resumed.average(), averager.average())


CALLS: dict[str, Callable[[Averager], object]] = {
    "state_dict": Averager.state_dict,
    "average": Averager.average,
    "summary": Averager.summary,
    "applied": lambda averager: averager.applied().__enter__(),
    "tracked": lambda averager: averager.tracked,
}


@pytest.mark.parametrize("call", CALLS)
def test_what_trains_later_is_named(call: str) -> None:
    model, averager = averaged()
    with averager.applied():  # which notes what the next block needs
        pass
    model.base.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"trains now and was frozen: base.weight, base.bias"):
        CALLS[call](averager)
    model.base.requires_grad_(False)
    CALLS["average"](averager)


def test_what_freezes_later_is_averaged_on() -> None:
    model, averager = averaged()
    model.requires_grad_(False)
    averager.update()
    assert list(averager.state_dict()["averages"]["average"]["slots"]["average"]) == TRAINS


def test_all_are_averaged_where_none_trains() -> None:
    averager = Averager(Adapted().requires_grad_(False), "uniform()")
    assert {item.policy for item in averager.tracked} == {"average", "copy"}


def test_patterns_and_functions_decide_before() -> None:
    for select in ("*", ["base.*", "up.*"], lambda _: True):
        averager = Averager(Adapted(), "uniform()", select=select)
        assert next(i for i in averager.tracked if i.name == "base.weight").policy == "average"
    averager = Averager(Adapted(), "uniform()", buffers={"base.*": "average"})
    assert next(i for i in averager.tracked if i.name == "base.weight").policy == "average"


def test_a_mapping_of_parameters_has_frozen_ones_too() -> None:
    model = Adapted()
    averager = Averager(dict(model.named_parameters()), "uniform()")
    averager.update()
    policies = {item.name: item.policy for item in averager.tracked}
    assert (policies["base.weight"], policies["up.weight"]) == ("frozen", "average")
    assert averager.average().keys() == dict(model.named_parameters()).keys()


def test_a_tensor_trains_if_one_of_its_names_does() -> None:
    model = Everything()
    model.head.weight = nn.Parameter(model.embedding.weight.detach(), requires_grad=False)
    averager = Averager(model, "uniform()")
    tied = next(item for item in averager.tracked if "head.weight" in item.names)
    assert tied.policy == "average"


def test_frozen_tensors_are_read_from_the_model_as_it_is() -> None:
    model, averager = averaged()
    with torch.no_grad():
        model.base.bias.fill_(7)
    before = snapshot(model)
    assert torch.equal(averager.average()["base.bias"], torch.full((64,), 7.0))
    assert torch.equal(before["base.bias"], model.base.bias)


def test_a_file_says_that_frozen_parameters_are_not_in_it(tmp_path: Path) -> None:
    """The average of a model can be exported whole; that of a file lacks them, and says so."""
    _, averager = averaged()
    path = tmp_path / "average.safetensors"
    polyak.save(path, averager)
    found = checkpoints.read(path)
    assert list(found.left.values()) == [4]
    assert next(iter(found.left)).startswith("frozen parameters")
    whole = Averager(Everything(), "uniform()", select="*")
    whole.update()
    polyak.save(path, whole, overwrite=True)
    assert not checkpoints.read(path).left
