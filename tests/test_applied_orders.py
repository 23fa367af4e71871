"""Blocks of several averagers of one model, entered and left in any order.

The model always carries the average of the block that was entered last among those that are open,
tensor by tensor, and the live weights come back with the last. A graph either gives the gradient at
the weights with which it was recorded, or autograd refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import Everything, assert_same, everything, snapshot, wander
from polyak import Averager, Exponential, Uniform, Window
from polyak._engine import open_swaps
from quick import some_quick

Tensors = Mapping[str, Tensor]


class Kind(NamedTuple):
    """A way to average a model or a part of it, and the tensors that it reaches, by its names."""

    make: Callable[[Everything], Averager]
    reach: Callable[[Everything], Tensors]


def all_of(model: nn.Module) -> Tensors:
    return dict(model.state_dict(keep_vars=True))


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def rows_of(model: Everything) -> dict[str, Tensor]:
    return {"top": model.body.weight.detach()[:2], "bias": model.body.bias}


KINDS = {
    "whole": Kind(lambda m: Averager(m, Exponential(0.5)), all_of),
    "again": Kind(lambda m: Averager(m, Uniform()), all_of),
    "part": Kind(lambda m: Averager(m.body, Exponential(0.9)), lambda m: all_of(m.body)),
    "selected": Kind(
        lambda m: Averager(m, Exponential(0.7), select=["body.*", "strided"]),
        lambda m: {n: t for n, t in all_of(m).items() if n.startswith(("body.", "strided"))},
    ),
    "wide slots": Kind(lambda m: Averager(m, Exponential(0.5), dtype=torch.float64), all_of),
    "several slots": Kind(lambda m: Averager(m, Window(2)), all_of),
    "buffers": Kind(lambda m: Averager(m, Exponential(0.5), buffers="average"), all_of),
    "by name": Kind(lambda m: Averager(parameters_of(m), Exponential(0.5)), parameters_of),
    "views": Kind(lambda m: Averager(rows_of(m), Exponential(0.5)), rows_of),
}


@dataclass
class Block:
    """An open block."""

    kind: str
    manager: AbstractContextManager[None]


@dataclass
class Graph:
    """A graph through `body`, with the gradient that it must give."""

    loss: Tensor
    inputs: Tensor
    gradient: Tensor
    open: list[Block]

    @classmethod
    def record(cls, model: Everything, blocks: list[Block]) -> Graph:
        inputs = torch.randn(2, 4, requires_grad=True)
        loss = model.body(inputs).square().sum()
        weight, bias = model.body.weight.detach(), model.body.bias.detach()
        gradient = 2 * (inputs.detach() @ weight.T + bias) @ weight
        return cls(loss, inputs, gradient, list(blocks))

    def require_right(self, blocks: list[Block]) -> None:
        try:
            (got,) = torch.autograd.grad(self.loss, self.inputs, retain_graph=True)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            assert self.open or blocks, "the live weights are back, and so is the graph"
        else:
            torch.testing.assert_close(got, self.gradient)


@dataclass
class Scene:
    """A model after some training, with an averager of each kind that is used."""

    kinds: list[str]
    blocks: list[Block] = field(default_factory=list)
    graphs: list[Graph] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = everything()
        self.averagers = {kind: KINDS[kind].make(self.model) for kind in self.kinds}
        for step in range(3):
            self.train(step)
        wander(self.model, 99)
        self.live = deepcopy(self.model)
        self.averages = {kind: each.average() for kind, each in self.averagers.items()}

    def train(self, seed: int) -> None:
        wander(self.model, seed)
        for averager in self.averagers.values():
            averager.update()

    def enter(self, kind: str) -> None:
        manager = self.averagers[kind].applied()
        manager.__enter__()
        self.blocks.append(Block(kind, manager))

    def leave(self, i: int) -> None:
        self.blocks.pop(i % len(self.blocks)).manager.__exit__(None, None, None)

    def expected(self) -> dict[str, Tensor]:
        """What the model holds: the averages of all open blocks, one over the other."""
        twin = deepcopy(self.live)
        newest_first = dict.fromkeys(block.kind for block in reversed(self.blocks))
        with torch.no_grad():
            for kind in reversed(newest_first):
                for name, tensor in KINDS[kind].reach(twin).items():
                    tensor.copy_(self.averages[kind][name])
        return snapshot(twin)

    def check(self) -> None:
        assert_same(snapshot(self.model), self.expected())
        for graph in self.graphs:
            graph.require_right(self.blocks)
        self.graphs.append(Graph.record(self.model, self.blocks))


PROGRAMS = st.lists(
    st.one_of(st.sampled_from(sorted(KINDS)), st.integers(0, 5)), min_size=2, max_size=9
)


@settings(max_examples=60)
@given(PROGRAMS)
def test_blocks_end_in_any_order(program: list[str | int]) -> None:
    scene = Scene(sorted({step for step in program if isinstance(step, str)}))
    scene.check()
    try:
        for step in program:
            if isinstance(step, str):
                scene.enter(step)
            elif scene.blocks:
                scene.leave(step)
            scene.check()
    finally:
        while scene.blocks:
            scene.leave(0)
    scene.check()
    for kind, averager in scene.averagers.items():
        assert_same(averager.average(), scene.averages[kind])
    assert open_swaps.OPEN == []
    scene.train(5)


@pytest.mark.parametrize(
    ("first", "second"),
    some_quick(product(sorted(KINDS), repeat=2), lambda pair: pair[0] <= pair[1]),
)
def test_two_callbacks_leave_in_the_order_of_entering(first: str, second: str) -> None:
    scene = Scene(sorted({first, second}))
    scene.enter(first)
    scene.enter(second)
    scene.check()
    scene.leave(0)
    scene.check()
    scene.leave(0)
    scene.check()
    assert_same(snapshot(scene.model), snapshot(scene.live))


REPLACED: dict[str, Callable[[nn.Linear], object]] = {
    "a parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.ones(2, 3))),
    "a table": lambda m: m.__setstate__(deepcopy(m.__dict__)),
    "by loading": lambda m: m.load_state_dict(nn.Linear(3, 2).state_dict(), assign=True),
}


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}], ids=["slots", "aside"])
@pytest.mark.parametrize("way", REPLACED)
def test_what_took_the_place_of_a_lent_weight_is_lent_too(
    way: str, options: dict[str, Any]
) -> None:
    """It gets the live weight when the block ends: no other block, update or step takes it before."""
    model = nn.Linear(3, 2)
    first, second = Averager(model, Uniform(), **options), Averager(model, Uniform())
    for averager in (first, second, second):
        wander(model, 1)
        averager.update()
    live = snapshot(model)
    block = first.applied()
    block.__enter__()
    REPLACED[way](model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match=r"weight was replaced or moved inside a block"):
        second.applied().__enter__()
    with pytest.raises(RuntimeError, match=r"has an average"):
        second.update()
    with pytest.raises(RuntimeError, match=r"a step of SGD inside applied"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"was replaced"):
        block.__exit__(None, None, None)
    assert_same(snapshot(model), live)
    optimizer.step()


@pytest.mark.parametrize("way", REPLACED)
def test_a_step_is_refused_in_blocks_that_had_to_end_early(way: str) -> None:
    """A swap that moves beneath another, after its weights were replaced, gives them back at once."""
    model = nn.Linear(3, 2)
    whole, part = Averager(model, Uniform()), Averager(model, Uniform(), select="weight")
    for averager in (whole, part, part):
        wander(model, 1)
        averager.update()
    live = snapshot(model)
    outer, between, again = whole.applied(), part.applied(), whole.applied()
    for block in (outer, between, again):
        block.__enter__()
    REPLACED[way](model)
    again.__exit__(None, None, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for block in (between, outer):
        with pytest.raises(RuntimeError, match=r"a step of SGD inside applied"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"was replaced"):
            block.__exit__(None, None, None)
    assert_same(snapshot(model), live)
    optimizer.step()


def test_a_write_in_one_block_is_told_once() -> None:
    """A swap that is taken back for another's sake, and swapped again, says nothing of it to the other."""
    flat = torch.arange(8.0)
    weights = {"v": flat[:4], "w": flat[4:]}
    whole, part = Averager(weights, Uniform()), Averager(weights, Uniform(), select="w")
    whole.update()
    part.update()
    outer = part.applied()
    outer.__enter__()
    weights["w"].add_(1.0)
    with whole.applied():
        again = part.applied()
        again.__enter__()
        again.__exit__(None, None, None)
        with pytest.raises(RuntimeError, match="w was written to"):
            outer.__exit__(None, None, None)
    whole.average()
    with pytest.raises(RuntimeError, match="load a saved state first"):
        part.average()
    assert torch.equal(flat, torch.arange(8.0))


def test_a_block_beneath_others_that_has_moved_weights_comes_on_top_again() -> None:
    model = nn.Linear(3, 2)
    whole, part = Averager(model, Uniform()), Averager(model, Uniform(), select="weight")
    for averager in (whole, part, part):
        wander(model, 1)
        averager.update()
    live, averages = snapshot(model), whole.average()
    outer, inner = whole.applied(), part.applied()
    outer.__enter__()
    inner.__enter__()
    model.bias.data = model.bias.data.clone()
    again = whole.applied()
    again.__enter__()
    assert torch.equal(model.bias, averages["bias"])
    again.__exit__(None, None, None)
    with torch.no_grad():
        model.bias.add_(1.0)
    inner.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="bias was"):
        outer.__exit__(None, None, None)
    assert_same(snapshot(model), live)
