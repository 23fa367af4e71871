"""Inventories: every change that a walk depends on is noticed; training alone changes nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from polyak import Averager
from polyak._engine.inventory import Inventory
from polyak._engine.policies import Choose
from polyak._engine.tracking import track


def make() -> Any:
    """A model with a module of each kind: weights, statistics, counters, children."""
    model = nn.Sequential(OrderedDict(first=nn.Linear(3, 3), norm=nn.BatchNorm1d(3)))
    model.inner = nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64), nn.Identity())
    model.register_buffer("mask", torch.ones(3, 3))
    return model


def rename(table: dict[str, Any], before: str, after: str) -> None:
    """Gives an entry another name, at its own place."""
    entries = [(after if name == before else name, each) for name, each in table.items()]
    table.clear()
    table.update(entries)


CHANGES: dict[str, Callable[[Any], object]] = {
    "parameter replaced": lambda m: setattr(m.first, "weight", nn.Parameter(torch.ones(3, 3))),
    "parameter removed": lambda m: setattr(m.first, "bias", None),
    "parameter added": lambda m: m.inner[1].register_parameter("new", nn.Parameter(torch.ones(1))),
    "parameter renamed": lambda m: rename(m.first._parameters, "bias", "offset"),
    "buffer replaced": lambda m: setattr(m, "mask", torch.ones(3, 3)),
    "buffer added": lambda m: m.inner[1].register_buffer("new", torch.ones(1)),
    "buffer no longer saved": lambda m: m._non_persistent_buffers_set.add("mask"),
    "module replaced": lambda m: setattr(m, "first", nn.Linear(3, 3)),
    "module added": lambda m: m.add_module("last", nn.Linear(3, 3)),
    "module removed": lambda m: delattr(m, "inner"),
    "module renamed": lambda m: rename(m._modules, "first", "begin"),
    "table of parameters replaced": lambda m: setattr(m.first, "_parameters", dict(m.first._parameters)),
    "table of buffers replaced": lambda m: setattr(m.norm, "_buffers", dict(m.norm._buffers)),
    "table of modules replaced": lambda m: setattr(m.inner, "_modules", dict(m.inner._modules)),
    "tied": lambda m: setattr(m.inner, "tie", m.first.weight),
    "other memory": lambda m: setattr(m.first.weight, "data", torch.ones(3, 3)),
    "other shape": lambda m: setattr(m.first.bias, "data", m.first.bias.data[:2]),
    "other strides": lambda m: setattr(m.first.weight, "data", m.first.weight.data.t()),
    "other dtype, same memory": lambda m: setattr(m, "mask", m.mask.view(torch.int32)),
    "dtype of a buffer in place": lambda m: setattr(m.mask, "data", m.mask.data.view(torch.int32)),
    "conjugate view": lambda m: setattr(m.inner[0].weight, "data", m.inner[0].weight.data.conj()),
    "negative view": lambda m: setattr(m.mask, "data", torch._neg_view(m.mask.data)),
}  # fmt: skip

NO_CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": id,
    "values": lambda m: m.first.weight.data.zero_(),
    "a state loaded": lambda m: m.load_state_dict(make().state_dict()),
    "modes and gradients": lambda m: m.eval().requires_grad_(False),
    "a forward pass": lambda m: m.norm(m.first(torch.ones(2, 3))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    model = make()
    inventory = Inventory(list(model.modules()))
    assert inventory.holds()
    CHANGES[change](model)
    assert not inventory.holds()


@pytest.mark.parametrize("change", NO_CHANGES)
def test_training_changes_nothing(change: str) -> None:
    model = make()
    inventory = Inventory(list(model.modules()))
    NO_CHANGES[change](model)
    assert inventory.holds()


class Wrapped(torch.Tensor):
    """A subclass, which may keep its memory elsewhere."""


def test_a_mapping_and_a_model_of_a_tensor_subclass_are_always_looked_at() -> None:
    model = make()
    model.mask = torch.ones(3, 3).as_subclass(Wrapped)
    assert not Inventory(list(model.modules())).holds()
    found = track({"w": torch.ones(1)}, Choose())
    assert not Inventory(found.modules).holds()


def test_an_averager_groups_anew_only_after_a_change() -> None:
    model = make()
    averager = Averager(model, "exponential(0.5)")
    averager.update()
    averager.average()
    before = averager._live.trained()
    averager.average()
    averager.state_dict()
    assert averager._live.trained() is before
    model.first.weight = nn.Parameter(torch.ones(3, 3))
    averager.state_dict()
    assert averager._live.trained() is not before
