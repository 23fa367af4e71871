"""Steps that must not count: skipped by a scaler, or with weights that are not finite.

On a device the verdict arrives after the update, which is masked; the same is done here on the CPU by
treating its flags as unread. Both ways must give the same averages.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models import Everything, assert_same, snapshot, wander
from polyak import Averager, Exponential, Tail, Uniform, Window
from polyak._engine.guard import Nonfinite

BAD = (0, 3, 4, 9)
RULES = {"ema": Exponential(0.5), "window": Window(3), "tail": Tail(Uniform(), 4)}


@pytest.fixture(params=[False, True], ids=["known", "deferred"])
def deferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr("polyak._engine.guard._deferred", lambda _: True)
    return bool(request.param)


def poisoned(model: nn.Module, value: float) -> dict[str, torch.Tensor]:
    """Puts NaN or inf into one weight; the weights before."""
    before = snapshot(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1] = value
    return before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16, "rounding": "stochastic"}, {"rounding": "compensated"}],
    ids=str,
)
@pytest.mark.usefixtures("deferred")
def test_a_poisoned_update_is_left_out_and_its_time_counts(
    value: float, options: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    guarded = Averager(model, RULES, nonfinite="skip", **options)
    expected = Averager(model, RULES, **options)
    waited = 0.0
    for step in range(14):
        wander(model, step)
        waited += 1.0
        if step in BAD:
            before = poisoned(model, value)
            guarded.update()
            model.load_state_dict(before)
        else:
            guarded.update()
            expected.update(waited)
            waited = 0.0
    assert guarded.skipped == len(BAD)
    assert guarded.count == 10
    if options.get("rounding") != "stochastic":  # whose masked updates draw numbers too
        for name in RULES:
            assert_same(guarded.average(name), expected.average(name))
    for name in RULES:
        assert all(tensor.isfinite().all() for tensor in guarded.average(name).values())


def test_an_error_names_the_weights_and_keeps_the_average(deferred: bool) -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, Exponential(0.5), nonfinite="error")
    averager.update()
    before = averager.average()
    live = poisoned(model, float("nan"))
    if deferred:
        averager.update()
    with pytest.raises(FloatingPointError, match=r'weight is not finite.*nonfinite="skip"'):
        averager.update()
    model.load_state_dict(live)
    assert_same(averager.average(), before)
    assert averager.count == 1
    averager.update()
    assert averager.count == 2


def test_without_a_guard_nan_is_averaged() -> None:
    weights = {"w": torch.tensor([1.0, float("nan")])}
    averager = Averager(weights, Exponential(0.5))
    averager.update()
    assert averager.average()["w"].isnan().tolist() == [False, True]


@pytest.mark.parametrize("nonfinite", ["skip", "error"])
@pytest.mark.usefixtures("deferred")
def test_finite_weights_of_every_kind_pass(nonfinite: Nonfinite) -> None:
    model = Everything()
    guarded, plain = Averager(model, RULES, nonfinite=nonfinite), Averager(model, RULES)
    for step in range(5):
        wander(model, step)
        guarded.update()
        plain.update()
    for name in RULES:
        assert_same(guarded.average(name), plain.average(name))


@pytest.mark.parametrize("poisoned", ["half", "whole", "double"])
def test_each_group_of_weights_is_looked_at(poisoned: str) -> None:
    """Weights of one dtype are one group, and the first that is not finite may be in any."""
    dtypes = {"half": torch.bfloat16, "whole": torch.float32, "double": torch.float64}
    weights = {name: torch.ones(3, dtype=dtype) for name, dtype in dtypes.items()}
    averager = Averager(weights, Uniform(), nonfinite="skip")
    averager.update()
    weights[poisoned][1] = torch.nan
    averager.update()
    assert (averager.count, averager.skipped) == (1, 1)


def test_empty_and_huge_weights_are_finite() -> None:
    weights = {
        "empty": torch.zeros(0),
        "huge": torch.full((3,), 6e4, dtype=torch.float16),
        "phase": torch.full((2,), 3e38 + 3e38j, dtype=torch.complex64),
        "double": torch.full((2,), 1e200, dtype=torch.float64),
        "byte": torch.ones(2).to(torch.float8_e4m3fn),
    }
    averager = Averager(weights, Uniform(), nonfinite="error")
    averager.update()
    assert averager.count == 1


# Scalers


def scaled_run(
    fused: bool, every: int, steps: int = 12, bad: tuple[int, ...] = BAD
) -> tuple[Averager, list[torch.Tensor]]:
    """Training under a scaler with overflows; the averager and the weights of the real steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    averager = Averager(model, Uniform(), every=every)
    averager.attach(optimizer, scaler)
    path = []
    for step in range(steps):
        loss = model(torch.randn(4, 3)).square().mean()
        scaler.scale(loss * (float("inf") if step in bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step not in bad:
            path.append(model.weight.detach().clone())
    return averager, path


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.usefixtures("deferred")
def test_steps_that_the_scaler_skipped_do_not_count(fused: bool, every: int) -> None:
    averager, path = scaled_run(fused, every)
    assert averager.count == -(-8 // every)
    expected = torch.stack(path[::every]).mean(0)
    torch.testing.assert_close(averager.average()["weight"], expected)


def test_a_fused_optimizer_under_an_unknown_scaler_says_so() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu")
    Averager(model, Exponential(0.5)).attach(optimizer)
    scaler.scale(model(torch.randn(4, 3)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"pass the scaler, attach\(optimizer, scaler\)"):
        scaler.step(optimizer)


# Optimizers


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, micro: int = 1) -> None:
    for _ in range(micro):
        model(torch.randn(4, 3)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_attach_counts_optimizer_steps_and_detaches() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, Exponential(0.5))
    attached = averager.attach(optimizer)
    for _ in range(3):
        train(model, optimizer, micro=4)
    assert averager.count == 3
    attached.remove()
    train(model, optimizer)
    assert averager.count == 3


def test_of_several_optimizers_each_must_have_stepped() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.Adam(model[1].parameters(), lr=0.1)
    averager = Averager(model, Exponential(0.5))
    averager.attach([first, second])
    for _ in range(3):
        train(model, first, second)
    assert averager.count == 3
    train(model, first)
    train(model, first)
    assert averager.count == 3
    train(model, second)
    assert averager.count == 4


def test_no_step_counts_twice() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, Exponential(0.5))
    for wrong in ([], [optimizer, optimizer]):
        with pytest.raises(ValueError, match=r"attach: [02] optimizers, wanted one or more, each"):
            averager.attach(wrong)
    attached = averager.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"attached already.*call remove\(\)"):
        averager.attach(optimizer)
    attached.remove()
    averager.attach(optimizer)
    train(model, optimizer)
    assert averager.count == 1


def test_a_step_inside_applied_is_an_error() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, Exponential(0.5))
    averager.attach(optimizer)
    train(model, optimizer)
    with pytest.raises(RuntimeError, match="a step of SGD inside applied"), averager.applied():
        train(model, optimizer)


def test_an_update_beside_a_compiled_step_recompiles_nothing() -> None:
    compiles = 0

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        nonlocal compiles
        compiles += 1
        return graph.forward

    torch.compiler.reset()
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, {"ema": "exponential(ratio(0.999))", "window": Window(3)})

    @torch.compile(backend=backend)
    def step(inputs: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(inputs).square().mean()
        return loss

    for _ in range(10):
        step(torch.randn(4, 3)).backward()
        optimizer.step()
        optimizer.zero_grad()
        averager.update()
        with averager.applied("ema"), torch.no_grad():
            pass
    assert compiles == 1
    assert averager.count == 10


def test_bad_options_say_what_was_wanted() -> None:
    options: dict[str, Any] = {"nonfinite": "ignore"}
    with pytest.raises(ValueError, match='nonfinite is \'ignore\', wanted "allow", "skip" or'):
        Averager(nn.Linear(1, 1), Uniform(), **options)
