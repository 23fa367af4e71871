"""Blocks of several averagers, in which tensors are replaced or moved, left in any order.

The live weights come back bit for bit with the last block, wherever something is written to the model
before, and whoever leaves is told. No average is wrong without a word. A new way to replace joins `REPLACED` by one line, and a new nest of
blocks joins `NESTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from itertools import permutations
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from models import assert_same, snapshot, wander
from polyak import Averager, Exponential, Uniform, Window
from polyak._engine import open_swaps
from quick import some_quick


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))


def fresh(model: Any) -> Any:
    other = deepcopy(model)
    wander(other, 17)
    return other


def swapped(model: Any) -> None:
    for tensor, other in zip(model.parameters(), fresh(model).parameters(), strict=True):
        torch.utils.swap_tensors(tensor, other)


def moved(model: Any) -> None:
    for tensor in model.parameters():
        tensor.data = torch.ones_like(tensor)


def put(model: Any, *biases: nn.Parameter) -> None:
    for module, bias in zip(model, biases, strict=True):
        module.bias = bias


def put_data(model: Any, *biases: nn.Parameter) -> None:
    for module, data in zip(model, [bias.data for bias in biases], strict=True):
        module.bias.data = data


REPLACED: dict[str, Callable[[Any], object]] = {
    "a parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(2, 3))),
    "a parameter of another shape": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(5))),
    "a table": lambda m: m[0].__dict__.update(_parameters=fresh(m[0])._parameters),
    "__setstate__": lambda m: m.__setstate__(fresh(m).__dict__),
    "__dict__": lambda m: setattr(m, "__dict__", fresh(m).__dict__),
    "by loading": lambda m: m.load_state_dict(fresh(m).state_dict(), assign=True),
    "a module": lambda m: m.__setitem__(0, nn.Linear(3, 2)),
    "every module": lambda m: m.__dict__.update(_modules=fresh(m)._modules),
    "swap_tensors": swapped,
    ".data": moved,
    ".data of another shape": lambda m: setattr(m[0].weight, "data", torch.ones(5)),
    "moved to another dtype": lambda m: m.double(),
    "layers that change places": lambda m: m.__dict__.update(
        _modules=dict(zip("012", (m[1], m[0], m[2]), strict=True))
    ),
    "weights that change places": lambda m: put(m, m[1].bias, m[2].bias, m[0].bias),
    ".data that change places": lambda m: put_data(m, m[1].bias, m[2].bias, m[0].bias),
    ".data of another weight": lambda m: put_data(m, m[1].bias, m[1].bias, m[1].bias),
    ".data of a row of another": lambda m: setattr(m[0].bias, "data", m[1].weight.data[0]),
    "a parameter on a row of another": lambda m: setattr(
        m[1], "bias", nn.Parameter(m[0].weight.data[:, 0])
    ),
    "a parameter on its own memory, transposed": lambda m: setattr(
        m[1], "weight", nn.Parameter(m[1].weight.data.t())
    ),
    "a negative view of itself": lambda m: setattr(
        m[1], "bias", nn.Parameter(torch._neg_view(m[1].bias.data))
    ),
}


class Kind(NamedTuple):
    """A part of a model, and the way to average it."""

    part: Callable[[Any], nn.Module]
    options: dict[str, Any]
    names: Sequence[str] = ()

    def reach(self, part: nn.Module) -> list[Tensor]:
        return [p for name, p in part.named_parameters() if not self.names or name in self.names]


KINDS = {
    "whole": Kind(lambda m: m, {"rule": Uniform()}),
    "other": Kind(lambda m: m, {"rule": Exponential(0.5)}),
    "aside": Kind(lambda m: m, {"rule": Window(2), "buffers": "average"}),
    "part": Kind(lambda m: m, {"rule": Exponential(0.25), "select": "0.weight"}, ["0.weight"]),
    "rest": Kind(lambda m: m[1], {"rule": Exponential(0.75)}),
}

NESTS: list[tuple[str, ...]] = [
    ("whole", "other"),
    ("whole", "aside"),
    ("aside", "whole"),
    ("whole", "whole"),
    ("whole", "part"),
    ("part", "whole"),
    ("whole", "other", "whole"),
    ("whole", "part", "rest"),
    ("aside", "rest", "aside"),
]
"""The averagers whose blocks are entered, one after the other."""


QUICK = [(("whole", "other"),), (("aside", "whole"),), (("part", "whole"),)]


class Scene:
    """Blocks that are open on a model."""

    def __init__(self, nest: Sequence[str]) -> None:
        self.model = network()
        self.kinds = [KINDS[name] for name in nest]
        self.parts = [kind.part(self.model) for kind in self.kinds]
        made = {
            name: Averager(KINDS[name].part(self.model), **KINDS[name].options) for name in nest
        }
        self.made, self.averagers = made.values(), [made[name] for name in nest]
        for step in range(3):
            wander(self.model, step)
            for averager in made.values():
                averager.update()
        wander(self.model, 9)
        self.live = snapshot(self.model)
        self.averages = [averager.average() for averager in self.made]
        self.blocks = [averager.applied() for averager in self.averagers]
        for block in self.blocks:
            block.__enter__()
        self.open = list(range(len(nest)))
        self.told = 0

    def swapped(self) -> list[Tensor]:
        return [t for i in self.open for t in self.kinds[i].reach(self.parts[i])]

    def step(self) -> None:
        swapped = self.swapped()
        for parameter in swapped:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(list({id(t): t for t in swapped}.values()), lr=0.1).step()

    @torch.no_grad()
    def write(self, *, seen: bool) -> None:
        for tensor in self.swapped():
            (tensor if seen else tensor.data).mul_(1.5)

    def leave(self, i: int) -> None:
        self.open.remove(i)
        try:
            self.blocks[i].__exit__(None, None, None)
        except RuntimeError as error:
            assert "inside" in str(error)
            self.told += 1

    def check(self, *, seen: bool, agreed: bool) -> None:
        assert self.told
        assert open_swaps.OPEN == []
        if not agreed:
            return
        live = self.live
        now = {name: t.to(live[name].dtype) for name, t in snapshot(self.model).items()}
        assert_same(now, live)
        for averager, average in zip(self.made, self.averages, strict=True):
            if seen and not averager._averages["average"].damaged:
                assert_same(averager.average(), average)


def run(way: str, nest: Sequence[str], order: Sequence[int], moment: int, *, seen: bool) -> None:
    """Leaves blocks in an order, and writes to the swapped weights before one of them is left."""
    scene = Scene(nest)
    REPLACED[way](scene.model)
    for count, i in enumerate(order):
        with pytest.raises(RuntimeError, match=r"a step of SGD inside applied"):
            scene.step()
        with pytest.raises(RuntimeError, match=r"^update"):
            scene.averagers[i].update()
        if count == moment:
            scene.write(seen=seen)
        scene.leave(i)
    # Else two averagers have a layer, each by another name.
    agreed = way != "layers that change places" or "rest" not in nest
    scene.check(seen=seen, agreed=agreed)


@pytest.mark.parametrize("nest", some_quick([(nest,) for nest in NESTS], QUICK), ids="+".join)
@pytest.mark.parametrize("way", REPLACED)
def test_the_live_weights_come_back_with_the_last_block(way: str, nest: tuple[str, ...]) -> None:
    """Some of the writes go through `.data`, which no version counter sees."""
    for number, order in enumerate(permutations(range(len(nest)))):
        for moment in range(len(nest)):
            run(way, nest, order, moment, seen=(number + moment) % 2 == 0)


def test_two_weights_that_become_one_tensor_cannot_both_come_back_and_leaving_says_so() -> None:
    model = network()
    averager = Averager(model, Uniform())
    averager.update()
    live = snapshot(model)
    with (
        pytest.raises(RuntimeError, match=r"1.bias could not be given back \(0.bias is the same"),
        averager.applied(),
    ):
        model[1].bias = model[0].bias
    del live["1.bias"]
    assert_same({name: tensor for name, tensor in snapshot(model).items() if name in live}, live)


MOVED: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda _: None,
    "of another dtype": lambda layer: layer.bfloat16(),
    "in other memory": moved,
    "of another shape": lambda layer: setattr(layer.weight, "data", torch.ones(5)),
}
"""What is done to a tied weight, by `.data`, before some of its names lose it."""


def put_both(model: Any, weight: nn.Parameter) -> None:
    for module in model:
        module.weight = weight


LOST: dict[str, Callable[[Any], object]] = {
    "no name": lambda _: None,
    "the first name": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(2, 2))),
    "the second name": lambda m: m[1].__dict__.update(deepcopy(m[1]).__dict__),
    "both names": lambda m: m.load_state_dict(fresh(m).state_dict(), assign=True),
    "both names, which stay tied": lambda m: put_both(m, m.other),
    "the first name, to a row of it": lambda m: setattr(
        m[0], "weight", nn.Parameter(m[1].weight.data[:1])
    ),
}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("how", MOVED)
@pytest.mark.parametrize(
    "nest",
    [
        ["whole"],
        *[
            pytest.param([*nest], marks=pytest.mark.slow)
            for nest in permutations(["whole", "aside"])
        ],
    ],
    ids="+".join,
)
def test_a_tied_weight_comes_back_under_all_its_names(
    nest: Sequence[str], how: str, lost: str
) -> None:
    for order in permutations(range(len(nest))):
        model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight = model[0].weight
        averagers = [Averager(model, **KINDS[name].options) for name in nest]
        for step in range(3):
            wander(model, step)
            for averager in averagers if step < 2 else ():
                averager.update()
        live = snapshot(model)
        blocks = [averager.applied() for averager in averagers]
        for block in blocks:
            block.__enter__()
        MOVED[how](model[0])
        object.__setattr__(model, "other", nn.Parameter(torch.ones(2, 2)))
        LOST[lost](model)
        for i in order:
            with suppress(RuntimeError):  # each says what it has seen
                blocks[i].__exit__(None, None, None)
        now = snapshot(model)
        assert_same(now, {name: t.to(now[name].dtype) for name, t in live.items()})
