"""Graphs across the border of a block: each gives the right gradient, or autograd refuses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from models import snapshot, wander
from polyak import Averager, Exponential, Window
from polyak.rules import Rule

REFUSED = "modified by an inplace operation"
INPUTS = torch.linspace(-1, 1, 12).reshape(3, 4)


def through_a_slot(model: Any, inputs: Tensor) -> Tensor:
    out: Tensor = functional_call(model, model.slots, (inputs,))
    return out.square().sum()


# Ways to record a graph: from a model and inputs that need a gradient to a loss.
GRAPHS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a forward pass": lambda model, x: model(x).square().sum(),
    "a view of a weight": lambda model, x: (x @ model[0].weight.t()).square().sum(),
    "a detached weight": lambda model, x: (x @ model[0].weight.detach().t()).square().sum(),
    "a tied weight": lambda model, x: (x @ model[3].weight.t()).square().sum(),
    "another object of a weight": lambda model, x: (x @ model[4].weight.t()).square().sum(),
    "running statistics": lambda model, x: model[1](x).square().sum(),
    "compiled": lambda model, x: torch.compile(model[0], backend="aot_eager")(x).square().sum(),
    "slots": through_a_slot,
}
RULES = [Exponential(0.5), Window(2)]


def averaged(rule: Rule, **options: Any) -> tuple[Any, Averager]:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), *(nn.Linear(4, 4, bias=False) for _ in range(3))]
    model: Any = nn.Sequential(*layers).eval()
    model[3].weight = model[0].weight
    model[4].weight = nn.Parameter(model[0].weight)
    averager = Averager(model, rule, **options)
    for step in range(3):
        wander(model, step)
        averager.update()
    wander(model, 9)
    model[1].running_var.abs_()
    return model, averager


def record(name: str, model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A loss, its inputs, and the gradient that it gives if it is walked at once."""
    inputs = INPUTS.clone().requires_grad_()
    loss = GRAPHS[name](model, inputs)
    (gradient,) = torch.autograd.grad(loss, inputs, retain_graph=True)
    return loss, inputs, gradient


def keep_slots(model: Any, averager: Averager, name: str) -> None:
    if name == "slots":
        state = averager.state_dict()["averages"]["average"]["slots"]["average"]
        model.__dict__["slots"] = state


@pytest.mark.parametrize(
    ("name", "rule"),
    [(n, r) for n in GRAPHS for r in RULES if n != "slots" or r == RULES[0]],  # one slot
    ids=str,
)
def test_a_graph_from_before_is_refused_inside_and_valid_afterwards(name: str, rule: Rule) -> None:
    model, averager = averaged(rule)
    keep_slots(model, averager, name)
    loss, inputs, expected = record(name, model)
    with averager.applied():
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(loss, inputs, retain_graph=True)
        with torch.no_grad():
            model(INPUTS)
    assert torch.equal(torch.autograd.grad(loss, inputs)[0], expected)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "slots"])
def test_a_graph_from_inside_is_refused_afterwards(name: str, rule: Rule) -> None:
    """Right after the block, after training, and in another block."""
    model, averager = averaged(rule)
    with averager.applied():
        loss, inputs, _ = record(name, model)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(loss, inputs, retain_graph=True)
    wander(model, 3)
    averager.update()
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(loss, inputs, retain_graph=True)
    with averager.applied(), pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(loss, inputs, retain_graph=True)


def test_no_number_of_blocks_and_writes_makes_a_graph_from_a_block_pass() -> None:
    """Buffers are written to inside, so their version counts on; the next block begins above it."""
    model, averager = averaged(Window(2), buffers="average")
    with averager.applied():
        loss, inputs, _ = record("running statistics", model)
    for times in range(6):
        with averager.applied():
            for _ in range(times):
                model.train()(INPUTS)
            model.eval()
            with pytest.raises(RuntimeError, match=REFUSED):
                torch.autograd.grad(loss, inputs, retain_graph=True)
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(loss, inputs, retain_graph=True)


def test_a_graph_of_an_outer_block_is_valid_after_an_inner_one() -> None:
    model, first = averaged(Exponential(0.5))
    second = Averager(model, Exponential(0.9))
    second.update()
    with first.applied():
        loss, inputs, expected = record("a forward pass", model)
        with second.applied(), pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(loss, inputs, retain_graph=True)
        assert torch.equal(torch.autograd.grad(loss, inputs, retain_graph=True)[0], expected)


def test_a_graph_is_refused_where_memory_was_replaced_inside() -> None:
    """It has saved a view of the old memory, which holds the average."""
    model, averager = averaged(Exponential(0.5))
    loss, inputs, _ = record("a forward pass", model)
    with pytest.raises(RuntimeError, match=r"0.weight was moved"), averager.applied():
        model[0].weight.data = model[0].weight.data.clone()
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(loss, inputs)


def test_a_graph_of_another_part_of_the_same_memory_is_refused_if_that_was_written_to() -> None:
    """Views of one storage share a version, so a write to one is one to all."""
    flat = torch.arange(8.0)
    weights = {"w": flat[:4]}
    averager = Averager(weights, Exponential(0.5))
    averager.update()
    inputs = torch.ones(4, requires_grad=True)
    loss = (inputs * flat[4:]).sum()
    with pytest.raises(RuntimeError, match="w was written to"), averager.applied():
        flat[4:].zero_()
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(loss, inputs)


def test_training_inside_a_graph_accumulates_as_without_the_block() -> None:
    """A backward pass after the block, of a graph from before it: the gradients are the same."""

    def gradients(evaluate: bool) -> dict[str, Tensor]:
        model, averager = averaged(Exponential(0.5))
        loss = model(INPUTS).square().sum()
        if evaluate:
            with averager.applied(), torch.no_grad():
                model(INPUTS)
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    got, wanted = gradients(evaluate=True), gradients(evaluate=False)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert got.keys() == wanted.keys()


def test_versions_are_those_of_before() -> None:
    model, averager = averaged(Exponential(0.5))
    before = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
    live = snapshot(model)
    with averager.applied():
        inside = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
    assert [tensor._version for tensor in (*model.parameters(), *model.buffers())] == before
    assert not set(inside) & set(before)
    assert all(torch.equal(tensor, live[name]) for name, tensor in snapshot(model).items())


def test_versions_of_blocks_are_never_those_that_training_counts_to() -> None:
    """A block that was written to leaves another version, from which training counts on."""
    flat = torch.arange(8.0)
    weights = {"v": flat[:4], "w": flat[4:]}
    averager = Averager(weights, Window(2))
    averager.update()
    averager.update()
    inputs = torch.ones(4, requires_grad=True)
    losses = []
    for _ in range(4):
        with pytest.raises(RuntimeError, match="v was written to"), averager.applied():
            weights["v"].add_(1.0)
        for _ in range(3):
            weights["v"].add_(1.0)
            with averager.applied():
                losses.append((inputs * weights["v"]).sum())
            for loss in losses:
                with pytest.raises(RuntimeError, match=REFUSED):
                    torch.autograd.grad(loss, inputs, retain_graph=True)
