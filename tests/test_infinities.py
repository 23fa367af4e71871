"""A constant input is a fixed point bit for bit, infinities included: masks, and all else that is constant.

A new kind of tensor joins `KINDS` by one line, a new way to average joins `WAYS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from polyak import EMA, Averager, Exponential, Tail, Uniform, Window, _tensors, checkpoints, offline
from polyak.rules import AVERAGE, Rule, Tick
from quick import some_quick
from rule_examples import RULE_EXAMPLES, each_rule

INF = torch.inf
EXAMPLES = [rule for rules in RULE_EXAMPLES.values() for rule in rules]


def causal(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((size, size), -INF).triu(1).to(dtype)


KINDS: dict[str, Tensor] = {
    "a causal mask": causal(7),
    "a large mask": causal(600),
    "transposed": causal(7).t(),
    "with gaps": causal(8)[:, ::2],
    "of both signs": torch.tensor([INF, -INF, 1.0, 0.0, 2.0**-130]),
    "one number": torch.tensor(INF),
    "all infinite": torch.full((5,), -INF),
    "float64": causal(5, torch.float64),
    "bfloat16": causal(5, torch.bfloat16),
    "float16": causal(5, torch.float16),
    "complex": torch.tensor([complex(INF, 1), complex(-INF, INF), complex(2, 0.1)]),
    "finite": torch.tensor([0.125, -(2.0**127), 2.0**-130, 0.0]),
    "zeros of both signs": torch.tensor([0.0, -0.0, 1.0]),
    "empty": torch.empty(0, 3),
}

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float64 slots": {"dtype": torch.float64},
    "bfloat16 slots": {"dtype": torch.bfloat16},
    "stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
    "compensated": {"rounding": "compensated"},
    "every 3": {"every": 3},
}


def held(kind: str, options: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """A model with the tensor as a buffer, and the tensor as an average of it must be."""
    model = nn.Linear(3, 2)
    constant = KINDS[kind].clone()
    model.register_buffer("constant", constant)
    dtype = options.get("dtype")
    if dtype is not None and constant.is_complex():
        dtype = dtype.to_complex() if dtype != torch.bfloat16 else None
    wanted = constant if dtype is None else constant.to(dtype)
    return model, wanted


def same(a: Tensor, b: Tensor) -> bool:
    """Equal values; a lerp drops the sign of a zero, which is no other value."""
    return torch.equal(a.to(b.dtype), b)


@torch.no_grad()
def train(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("way", "kind"),
    some_quick(
        product(WAYS, KINDS),
        lambda each: (
            each[1] != "a large mask" and (each[0] == "plain" or each[1] == "of both signs")
        ),
    ),
)
def test_a_constant_is_a_fixed_point_of_every_rule(kind: str, way: str, tmp_path: Path) -> None:
    model, wanted = held(kind, WAYS[way])
    if wanted.is_complex() and "bfloat16" in str(WAYS[way]):
        return  # there is no complex bfloat16
    rules = {f"r{i}": rule for i, rule in enumerate(EXAMPLES)}
    averager = Averager(model, rules, buffers={"constant": "average"}, **WAYS[way])
    for _ in range(13):
        train(model)
        averager.update()
    path = tmp_path / "average.safetensors"
    polyak.save(path, averager)
    saved = checkpoints.read(path)
    for name, rule in rules.items():
        assert same(averager.average(name)["constant"], wanted), rule
        assert same(averager.weights(name)["constant"], wanted), rule
        assert same(saved.weights(name)["constant"], wanted), rule
        with averager.applied(name):
            assert same(model.get_buffer("constant").to(wanted.dtype), wanted), rule


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_parameter_is_a_fixed_point(kind: str) -> None:
    weights = {"w": KINDS[kind].clone(), "moving": torch.zeros(2)}
    averager = Averager(weights, {"ema": Exponential(0.9), "bema": "bema()", "mean": Uniform()})
    for _ in range(9):
        weights["moving"] += 1
        averager.update()
    for name in averager.rules:
        assert same(averager.average(name)["w"], KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_articles_class_keeps_constants(kind: str) -> None:
    model, wanted = held(kind, {})
    ema = EMA(model, beta=0.9, update_after_step=2, update_every=1)
    for _ in range(9):
        train(model)
        ema.update()
    ema.update_moving_average()
    assert same(ema.ema_model.get_buffer("constant"), wanted)


@pytest.mark.parametrize("rule", each_rule(EXAMPLES), ids=str)
def test_a_constant_too_large_for_its_slot_is_infinite_there(rule: Any) -> None:
    weights = {"w": torch.tensor([1e300, -1e300, 0.1], dtype=torch.float64)}
    averager = Averager(weights, rule, dtype=torch.float32)
    for _ in range(9):
        averager.update()
    assert torch.equal(averager.average()["w"], torch.tensor([INF, -INF, 0.1]))


def test_a_mask_that_is_filled_while_the_average_still_copies() -> None:
    weights = {"w": torch.zeros(3)}
    averager = Averager(weights, Tail(Uniform(), start=4))
    for step in range(9):
        weights["w"].fill_(-INF if step >= 3 else 0.0)
        averager.update()
    assert averager.average()["w"].tolist() == [-INF] * 3


@dataclass(frozen=True)
class CopiesAgain(Rule):
    """Copies at updates 1 and 4."""

    def fractions(self, tick: Tick) -> dict[str, float]:
        return {AVERAGE: 1.0 if tick.n in (1, 4) else 0.5}


def test_a_mask_that_is_filled_before_the_average_copies_again() -> None:
    weights = {"w": torch.zeros(3)}
    averager = Averager(weights, CopiesAgain())
    for step in range(9):
        weights["w"].fill_(-INF if step >= 2 else 0.0)
        averager.update()
    assert averager.average()["w"].tolist() == [-INF] * 3


def test_a_resumed_average_keeps_constants() -> None:
    weights = {"w": torch.tensor([INF, 1.0])}
    first, second = (Averager(weights, Exponential(0.9)) for _ in range(2))
    for _ in range(3):
        first.update()
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.update()
    assert second.average()["w"].tolist() == [INF, 1.0]


def test_a_replaced_mask_of_another_dtype_is_kept() -> None:
    model, _ = held("a causal mask", {})
    averager = Averager(model, Exponential(0.9), buffers="average")
    for step in range(6):
        if step == 3:
            model.double()
        averager.update()
    assert same(averager.average()["constant"], KINDS["a causal mask"])


@pytest.mark.parametrize("deferred", [False, True])
def test_guarded_updates_keep_constants(deferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyak._engine.guard._deferred", lambda _: deferred)
    weights = {"w": torch.tensor([1e300, 1.0], dtype=torch.float64), "x": torch.zeros(1)}
    averager = Averager(weights, Exponential(0.5), dtype=torch.float32, nonfinite="skip")
    for step in range(8):
        weights["x"].fill_(torch.nan if step in (1, 4) else 1.0)
        averager.update()
    assert averager.skipped == 2
    assert averager.average()["w"].tolist() == [INF, 1.0]


def test_what_moves_is_moved_as_before() -> None:
    """Beside an infinity, and where only one of two is infinite, a lerp is a lerp."""
    weights = {"w": torch.tensor([INF, 1.0, 1.0, torch.nan, INF])}
    averager = Averager(weights, Exponential(0.75))
    averager.update()
    weights["w"].copy_(torch.tensor([INF, 2.0, INF, 1.0, -INF]))
    averager.update()
    average = averager.average()["w"]
    assert average[:3].tolist() == [INF, 1.25, INF]
    assert average[3:].isnan().all()


def test_averages_of_files_keep_constants(tmp_path: Path) -> None:
    for step in range(3):
        torch.save({"mask": causal(9), "w": torch.full((2,), float(step))}, tmp_path / f"{step}.pt")
    average = offline.average([tmp_path / f"{step}.pt" for step in range(3)])
    assert same(average["mask"], causal(9))
    assert average["w"].tolist() == [1.0, 1.0]


def test_the_law_fails_where_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: lerp makes NaN of equal infinities."""
    monkeypatch.setattr("polyak._tensors.keep_", lambda _: None)
    for rule in (Exponential(0.9), Window(2)):
        weights = {"w": torch.tensor([INF])}
        averager = Averager(weights, rule)
        for _ in range(3):
            averager.update()
        assert averager.average()["w"].isnan().all()


LOOKS: dict[str, tuple[Any, int]] = {
    "exponential": (Exponential(0.9), 1),
    "window": (Window(3), 0),
    "tail": (Tail(Uniform(), start=5), 1),
    "bema": ("bema()", 1),
}


@pytest.mark.parametrize("rule", LOOKS)
def test_infinities_are_looked_for_once_after_a_copy(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    look = _tensors.infinite

    def counted(tensors: Any) -> list[int]:
        nonlocal looks
        looks += 1
        return look(tensors)

    monkeypatch.setattr("polyak._engine.infinities.infinite", counted)
    averager = Averager({"w": torch.ones(2)}, LOOKS[rule][0])
    for _ in range(12):
        averager.update()
    assert looks == LOOKS[rule][1]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16, "rounding": "stochastic"},
    {"dtype": torch.bfloat16, "rounding": "compensated"},
]


@dataclass(frozen=True)
class Stays(Rule):
    """The first weights, for good."""

    def fractions(self, tick: Tick) -> dict[str, float]:
        return {AVERAGE: 1.0 if tick.n == 1 else 0.0}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_fraction_of_0_leaves_infinities_and_nan_where_they_are(options: dict[str, Any]) -> None:
    first = torch.tensor([INF, -INF, torch.nan, 1.0])
    weights = {"w": first.clone()}
    averager = Averager(weights, Stays(), **options)
    for _ in range(3):
        averager.update()
        weights["w"].fill_(2.0)
    assert torch.equal(averager.average()["w"].float().nan_to_num(7.0), first.nan_to_num(7.0))
