"""Tensor classes: what is stored as it lies is averaged; a class with arithmetic of its own is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import polyak
from polyak import Averager, checkpoints


class Named(Tensor):
    """A class that only has another name."""


class Watched(Tensor):
    """A class that sees every function of torch, and lets it pass."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Quantized(Tensor):
    """int8 and a scale that pass for float32, as torchao's classes do."""

    _held: Tensor
    _scale: float

    @staticmethod
    def __new__(cls, held: Tensor, scale: float) -> Quantized:
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.float32)
        made._held, made._scale = held, scale
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._held, args[0]._scale)
        wide = [a._held.float() * a._scale if isinstance(a, cls) else a for a in args]
        return func(*wide, **(kwargs or {}))


PLAIN: dict[str, Callable[[], Tensor]] = {
    "a tensor": lambda: torch.arange(3.0),
    "another name": lambda: torch.arange(3.0).as_subclass(Named),
    "watched": lambda: torch.arange(3.0).as_subclass(Watched),
    "a buffer": lambda: nn.Buffer(torch.arange(3.0)),
}
WRAPPERS: dict[str, Callable[[], Tensor]] = {
    "two tensors": lambda: TwoTensor(torch.arange(3.0), torch.ones(3)),
    "quantized": lambda: Quantized(torch.arange(3, dtype=torch.int8), 0.1),
}


class Model(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.base = nn.Parameter(weight, requires_grad=False)
        self.head = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("kind", PLAIN)
def test_what_lies_in_its_own_memory_is_averaged_and_stored(tmp_path: Path, kind: str) -> None:
    model = Model(PLAIN[kind]())
    averager = Averager(model, "uniform()", select="*")
    for step in (1, 2, 3):
        with torch.no_grad():
            model.base.fill_(step)
        averager.update()
    polyak.save(tmp_path / "it", averager)
    checkpoints.export(tmp_path / "it.safetensors", averager)
    fresh = Averager(Model(torch.zeros(3)), "uniform()", select="*")
    polyak.load(tmp_path / "it", fresh)
    for held in (fresh.average(), load_file(tmp_path / "it.safetensors")):
        assert torch.equal(held["base"], torch.full((3,), 2.0)) and type(held["base"]) is Tensor


MAKERS: dict[str, Callable[[Model], object]] = {
    "Averager": lambda model: Averager(model, "uniform()", select="*"),
    "Averager of a mapping": lambda model: Averager({"base": model.base}, "uniform()"),
    "Averager that copies it": lambda model: Averager(
        {"base": model.base, "w": torch.ones(1)}, "uniform()", buffers={"base": "copy"}
    ),
    "EMA": polyak.EMA,
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_computes_for_itself_is_refused_by_name(kind: str, maker: str) -> None:
    model = Model(WRAPPERS[kind]())
    with pytest.raises(ValueError, match=rf"base is a .*{type(model.base).__name__}.*select"):
        MAKERS[maker](model)


@pytest.mark.parametrize("select", ["head", "trainable"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_is_left_out_may_be_of_any_class(tmp_path: Path, kind: str, select: str) -> None:
    """As adapters over quantized weights are; only a file of all weights is refused, and not begun."""
    averager = Averager(Model(WRAPPERS[kind]()), "uniform()", select=select)
    averager.update()
    assert list(averager.average()) == ["head"]
    polyak.save(tmp_path / "it", averager)
    with pytest.raises(ValueError, match=r"base is a .*__torch_dispatch__"):
        checkpoints.export(tmp_path / "it.safetensors", averager)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_of_several_each_is_a_tensor_of_its_own(kind: str) -> None:
    """They have no memory by which they could be taken for tied."""
    model = {name: WRAPPERS[kind]() for name in "abc"} | {"w": torch.ones(2)}
    averager = Averager(model, "uniform()", select="w")
    assert len(averager.tracked) == 4


@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_comes_later_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """As when a model is quantized while it is averaged: nothing moves, and nothing is written."""
    model = Model(torch.zeros(3))
    averager = Averager(model, "exponential(0.5)", select="*")
    averager.update()
    plain, model.base = model.base, nn.Parameter(WRAPPERS[kind](), requires_grad=False)
    calls: list[Callable[[], object]] = [
        averager.update,
        averager.average,
        lambda: polyak.save(tmp_path / "it", averager),
        lambda: checkpoints.export(tmp_path / "it.safetensors", averager),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"base is a .*__torch_dispatch__"):
            call()
    assert list(tmp_path.iterdir()) == [] and averager.count == 1
    model.base = plain
    assert torch.equal(averager.average()["base"], torch.zeros(3))
