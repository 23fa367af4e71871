"""Equivalents, run: the other library's average is `profile @ trajectory`.

Run against torch, ema-pytorch, torch-ema and diffusers as installed. timm, lightning and edm2 are
not installed here: their calls are compared as text only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from polyak.decays import Constant, Cosine, InversePower, Polynomial, Ratio
from polyak.rules import ArticleEMA, Bema, Exponential, Power, Rule, Tail, Uniform, Window
from polyak.theory import CONVENTIONS, equivalents, profile
from rule_examples import RULE_EXAMPLES, each_rule

STEPS = 60
RUN = ["ema_pytorch", "torch_ema", "torch", "diffusers"]
RULES: list[Rule] = [
    Exponential(0.9),
    Exponential(0.0),
    Exponential(Constant(0.7)),
    Exponential(InversePower()),
    Exponential(InversePower(5.0, 0.75, 0.2, 0.9)),
    Exponential(Ratio(0.8)),
    Exponential(Polynomial(3.0)),
    Uniform(),
    Tail(Uniform(), 10),
    Tail(Exponential(0.9), 7.5),
    Tail(Exponential(Ratio(0.7)), 4),
    Tail(Exponential(InversePower(power=0.9)), 3),
    ArticleEMA(0.95, 20, 2.0, 0.75, 0.1, first_copy=False),
    *(rule for examples in RULE_EXAMPLES.values() for rule in examples),
]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """ema-pytorch computes its decay in the default dtype: float32 would round it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def build(call: str, model: torch.nn.Module) -> Any:
    """Evaluates a call, after importing the module that it names."""
    module = call.partition("(")[0].rpartition(".")[0]
    importlib.import_module(module)
    package = module.partition(".")[0]
    return eval(call, {package: importlib.import_module(package), "model": model})


def updater(average: Any, model: torch.nn.Module) -> Callable[[], None]:
    match type(average).__name__:
        case "AveragedModel":
            return lambda: average.update_parameters(model)
        case "EMAModel":
            return lambda: average.step(model.parameters())
        case _:
            return lambda: average.update()


def weights_of(average: Any) -> list[torch.Tensor]:
    match type(average).__name__:
        case "AveragedModel":
            return list(average.module.parameters())
        case "EMA":
            return list(average.ema_model.parameters())
        case _:
            return list(average.shadow_params)


def flat(tensors: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    return torch.cat([each.detach().reshape(-1) for each in tensors]).numpy().copy()


def load(model: torch.nn.Module, row: np.ndarray[Any, Any]) -> None:
    torch.nn.utils.vector_to_parameters(torch.from_numpy(row.copy()), model.parameters())


def cases() -> list[Any]:
    return [
        pytest.param(rule, name, call, id=f"{name.partition('.')[0]}-{rule}")
        for rule in dict.fromkeys(RULES)
        for name, call in equivalents(rule).items()
        if name.partition(".")[0] in RUN
    ]


@pytest.mark.parametrize(("rule", "name", "call"), cases())
def test_the_call_gives_the_average(rule: Rule, name: str, call: str) -> None:
    model = torch.nn.Linear(2, 1)
    live = np.random.default_rng(0).normal(size=(STEPS, 3)).cumsum(axis=0)
    at_construction = "construct it" in CONVENTIONS.get(name, "")
    if at_construction:  # the construction is the first update
        load(model, live[0])
    average = build(call, model)
    update = updater(average, model)
    for step in range(1 if at_construction else 0, STEPS):
        load(model, live[step])
        update()
        expected = profile(rule, step + 1) @ live[: step + 1]
        np.testing.assert_allclose(flat(weights_of(average)), expected, atol=1e-10)


def test_every_library_that_is_installed_is_run() -> None:
    ran = {case.values[1] for case in cases()}
    assert ran == {
        "ema_pytorch.EMA",
        "torch_ema.ExponentialMovingAverage",
        "torch.optim.swa_utils.AveragedModel",
        "diffusers.training_utils.EMAModel",
    }


@pytest.mark.parametrize("rule", each_rule(RULES), ids=str)
def test_a_call_begins_with_its_key(rule: Rule) -> None:
    for name, call in equivalents(rule).items():
        assert call.startswith(f"{name}(") and call.endswith(")")


NONE = [
    Window(5),
    Bema(),
    Exponential(0.9, debias=True),
    Exponential(Cosine(0.5, 10)),
    ArticleEMA(),
    Tail(Window(2), 3),
    Tail(Tail(Uniform(), 1), 1),
]


@pytest.mark.parametrize("rule", NONE, ids=str)
def test_what_no_library_has(rule: Rule) -> None:
    assert equivalents(rule) == {}


UNRUN: list[tuple[Rule, dict[str, str]]] = [
    (
        Exponential(0.99),
        {
            "timm.utils.ModelEmaV3": "model, decay=0.99",
            "lightning.pytorch.callbacks.EMAWeightAveraging": "decay=0.99",
        },
    ),
    (
        Uniform(),
        {
            "timm.utils.ModelEmaV3": "model, decay=1.0, use_warmup=True, warmup_gamma=1.0,"
            " warmup_power=1.0",
            "lightning.pytorch.callbacks.WeightAveraging": "",
        },
    ),
    (
        Tail(Exponential(InversePower(2.0, 0.5, 0.1, 0.9)), 8),
        {
            "timm.utils.ModelEmaV3": "model, decay=0.9, use_warmup=True, warmup_gamma=2.0,"
            " warmup_power=0.5, min_decay=0.1, update_after_step=8"
        },
    ),
    (Power(0.0), {"training.phema.PowerFunctionEMA": "model, stds=[0.2886751345948129]"}),
    (Power(-0.5), {}),
]


@pytest.mark.parametrize(("rule", "calls"), UNRUN, ids=[str(rule) for rule, _ in UNRUN])
def test_calls_of_libraries_that_are_not_run(rule: Rule, calls: dict[str, str]) -> None:
    found = {
        name: call for name, call in equivalents(rule).items() if name.split(".")[0] not in RUN
    }
    assert found == {name: f"{name}({arguments})" for name, arguments in calls.items()}


def test_karras_ema_counts_the_first_weights_twice() -> None:
    """ema-pytorch's clock is one update ahead, so its class is no `Power` and is left out."""
    post_hoc = importlib.import_module("ema_pytorch.post_hoc_ema")
    model = torch.nn.Linear(2, 1)
    average = post_hoc.KarrasEMA(model, gamma=6.94, update_every=1)
    live = np.random.default_rng(0).normal(size=(STEPS, 3))
    for row in live:
        load(model, row)
        average.update()
    expected = profile(Power(6.94), STEPS + 1) @ np.vstack([live[:1], live])
    np.testing.assert_allclose(flat(list(average.ema_model.parameters())), expected, atol=1e-10)
    assert not any(name.startswith("ema_pytorch") for name in equivalents(Power(6.94)))
