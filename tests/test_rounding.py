"""Slots that move where rounding to nearest stops them, and the warning where nothing was done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models import assert_same
from polyak import Averager, Exponential, Tail, Uniform
from polyak._engine.rounding import seed, stochastic_round
from quick import first_quick, slow_if


def gap_after(decay: float, updates: int, **options: Any) -> torch.Tensor:
    """How far slots still are from a live value that jumped from 1 to 2, relative to it."""
    weights = {"w": torch.linspace(1.0, 1.9, 2000)}
    averager = Averager(weights, Exponential(decay), **options)
    averager.update()
    weights["w"] *= 2
    for _ in range(updates):
        averager.update()
    average = averager.average()["w"].double()
    return (weights["w"].double() - average) / weights["w"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(value=st.floats(-7e4, 7e4, width=32), exponent=st.integers(-30, 0))
def test_stochastic_rounding_keeps_the_mean(
    dtype: torch.dtype, value: float, exponent: int
) -> None:
    wide = torch.full((20_000,), value * 2.0**exponent).clamp(-6e4, 6e4)
    rounded = stochastic_round(wide, dtype, torch.Generator().manual_seed(0))
    assert len(rounded.unique()) <= 2
    exact = wide[0].item()
    near_error = abs(wide.to(dtype)[0].item() - exact)
    limits = torch.finfo(dtype)
    gap = max(limits.eps * abs(exact), limits.tiny * limits.eps)
    deviation = (gap * near_error / 20_000) ** 0.5  # of the mean of so many draws, at most
    assert abs(rounded.double().mean().item() - exact) <= 6 * deviation
    assert (rounded.double() - exact).abs().max().item() <= gap


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, float("inf"), float("-inf")])
def test_what_is_exact_stays(dtype: torch.dtype, value: float) -> None:
    wide = torch.full((100,), value)
    assert torch.equal(stochastic_round(wide, dtype), wide.to(dtype))


def test_nan_stays_nan() -> None:
    assert stochastic_round(torch.full((100,), float("nan")), torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", first_quick([torch.bfloat16, torch.float16]))
def test_narrow_slots_move_and_are_right_in_the_mean(dtype: torch.dtype) -> None:
    expected = 0.5 * 0.999**3000
    gaps = gap_after(0.999, 3000, dtype=dtype, rounding="stochastic")
    assert gaps.mean().item() == pytest.approx(expected, abs=2e-3)
    assert gap_after(0.999, 3000, dtype=dtype).mean().item() > 0.2  # to nearest it stalls


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        slow_if(({}, 1e-3), True),
        ({"rounding": "compensated"}, 2e-7),
        slow_if(({"dtype": torch.float64}, 2e-7), True),
        slow_if(({"dtype": torch.bfloat16, "rounding": "compensated"}, 3e-2), True),
    ],
)
def test_slots_arrive_where_float32_stalls(options: dict[str, Any], bound: float) -> None:
    gaps = gap_after(0.999, 20_000, **options).abs()
    assert gaps.max() <= bound
    if not options:
        assert gaps.max() > 2e-5  # the stall that the remedies are for


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_a_constant_input_is_a_fixed_point_bit_for_bit(rounding: Any) -> None:
    weights = {"w": torch.randn(1000).bfloat16()}
    averager = Averager(weights, Exponential(0.9), dtype=torch.bfloat16, rounding=rounding)
    for _ in range(50):
        averager.update()
    assert torch.equal(averager.average()["w"], weights["w"])


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_resumed_is_undisturbed_bit_for_bit(rounding: Any) -> None:
    def walk(averager: Averager, weights: dict[str, torch.Tensor], steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            weights["w"] += torch.randn(300, generator=generator).bfloat16()
            averager.update()

    def start() -> tuple[Averager, dict[str, torch.Tensor]]:
        weights = {"w": torch.zeros(300, dtype=torch.bfloat16)}
        options: dict[str, Any] = {"dtype": torch.bfloat16, "rounding": rounding}
        return Averager(weights, Tail(Uniform(), 3), **options), weights

    undisturbed, weights = start()
    walk(undisturbed, weights, range(30))
    first, weights = start()
    walk(first, weights, range(13))
    second, again = start()
    again["w"].copy_(weights["w"])
    second.load_state_dict(first.state_dict())
    walk(second, again, range(13, 30))
    assert_same(second.average(), undisturbed.average())


def test_each_update_each_slot_and_each_part_have_random_numbers_of_their_own() -> None:
    places = [
        (n, slot, part) for n in range(30) for slot in "ab" for part in ("", "Shard(dim=0) 1")
    ]
    assert len({seed(*place) for place in places}) == len(places)
    assert seed(3, "a", "") == seed(3, "a", "")


def test_averaging_leaves_the_random_stream_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    weights = {"w": torch.zeros(3)}
    averager = Averager(weights, Uniform(), dtype=torch.bfloat16, rounding="stochastic")
    averager.update()
    averager.update()
    assert torch.equal(torch.rand(3), expected)


def test_summary_warns_of_weights_that_would_not_move() -> None:
    weights = {"w": torch.linspace(1, 2, 1000)}
    rules = {"fast": Exponential(0.5), "slow": Exponential(1 - 1e-8)}
    averager = Averager(weights, rules)
    assert averager.summary().stalled == {"fast": 0.0, "slow": 0.0}
    averager.update()
    weights["w"] *= 1.01
    summary = averager.summary()
    assert summary.stalled["fast"] == 0.0
    assert summary.stalled["slow"] == 1.0
    assert "warning: rounding stops 100% of the weights of slow" in str(summary)
    wider = Averager(weights, rules, dtype=torch.float64)
    wider.update()
    weights["w"] *= 1.01
    assert wider.summary().stalled["slow"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, 'rounding is \'up\', wanted "nearest", "stochastic" or'),
        ({"rounding": "stochastic"}, "stochastic rounding of torch.float32 slots: wanted bfloat16"),
    ],
)
def test_bad_rounding_says_what_was_wanted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Averager(nn.Linear(2, 2), Uniform(), **options)


def test_a_state_without_compensation_is_refused() -> None:
    weights = {"w": torch.ones(2)}
    plain, compensated = (
        Averager(weights, Uniform()),
        Averager(weights, Uniform(), rounding="compensated"),
    )
    plain.update()
    with pytest.raises(ValueError, match=r"has slots \['average'\], wanted .*average.compensation"):
        compensated.load_state_dict(plain.state_dict())
    compensated.update()
    with pytest.raises(ValueError, match=r"has slots .*compensation.*, wanted \['average'\]"):
        plain.load_state_dict(compensated.state_dict())
