"""Migration: what a call of another library means here is the average that the library makes.

The libraries that are installed are run beside ours. The others are compared with their formulas, as
they were read in their sources.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator

import ema_pytorch
import pytest
import torch
import torch_ema
from diffusers.training_utils import EMAModel
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import polyak
from cli_runs import run
from polyak import Averager
from polyak.theory import from_library
from polyak.theory._calls import Source, parse_call
from polyak.theory._peer_classes import CLASSES

with warnings.catch_warnings():  # its import of torch.distributed.optim has torch.jit.script
    warnings.simplefilter("ignore", DeprecationWarning)
    from ignite.engine import Engine, Events
    from ignite.handlers import EMAHandler

STEPS = 40
Average = Callable[[], list[torch.Tensor]]
Peer = tuple[Callable[[int], None], Average]
"""A function that is called after each step (from 1), and one that gives the average."""


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def _ema_pytorch(call: str, model: nn.Module) -> Peer:
    average = eval(call, {"ema_pytorch": ema_pytorch, "model": model})
    return lambda _: average.update(), lambda: list(average.ema_model.parameters())


def _torch_ema(call: str, model: nn.Module) -> Peer:
    average = eval(call, {"torch_ema": torch_ema, "model": model})
    return lambda _: average.update(), lambda: list(average.shadow_params)


def _averaged_model(call: str, model: nn.Module) -> Peer:
    names = {"AveragedModel": AveragedModel, "get_ema_multi_avg_fn": get_ema_multi_avg_fn}
    average = eval(call, {**names, "model": model})
    return lambda _: average.update_parameters(model), lambda: list(average.module.parameters())


def _diffusers(call: str, model: nn.Module) -> Peer:
    average = eval(call, {"EMAModel": EMAModel, "model": model})
    return lambda _: average.step(model.parameters()), lambda: list(average.shadow_params)


def _lightning(call: str, model: nn.Module) -> Peer:
    """Its own decision when to update, and its own average."""
    callback = eval(call, {"EMAWeightAveraging": EMAWeightAveraging})
    average = AveragedModel(model, use_buffers=True, **callback._kwargs)

    def update(step: int) -> None:
        if callback.should_update(step_idx=step - 1):
            average.update_parameters(model)

    return update, lambda: list(average.module.parameters())


def _ignite(call: str, model: nn.Module) -> Peer:
    handler = eval(call, {"EMAHandler": EMAHandler, "model": model})
    engine = Engine(lambda *_: None)
    handler.attach(engine, event=Events.ITERATION_COMPLETED)

    def update(_: int) -> None:
        engine.run([0])

    return update, lambda: list(handler.ema_model.parameters())


# A call, how the library is run, and whether its average begins with the weights at construction.
CALLS: list[tuple[str, Callable[[str, nn.Module], Peer], bool]] = [
    ("ema_pytorch.EMA(model, beta=0.9, update_after_step=3, update_every=1)", _ema_pytorch, False),
    ("ema_pytorch.EMA(model, beta=0.9, update_after_step=0, update_every=1)", _ema_pytorch, False),
    ("ema_pytorch.EMA(model, beta=0.9, update_after_step=3, update_every=2)", _ema_pytorch, False),
    ("ema_pytorch.EMA(model, beta=0.9, update_after_step=6, update_every=4)", _ema_pytorch, False),
    (
        "ema_pytorch.EMA(model, beta=0.9, min_value=0.9, update_after_step=0, update_every=3)",
        _ema_pytorch,
        False,
    ),
    (
        "ema_pytorch.EMA(model, beta=0.95, min_value=0.3, inv_gamma=4.0, power=3/4,"
        " update_after_step=5, update_every=1)",
        _ema_pytorch,
        False,
    ),
    ("torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.9)", _torch_ema, True),
    (
        "torch_ema.ExponentialMovingAverage(model.parameters(), 0.9, use_num_updates=False)",
        _torch_ema,
        True,
    ),
    ("AveragedModel(model)", _averaged_model, False),
    ("AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))", _averaged_model, False),
    (
        "AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(), use_buffers=True)",
        _averaged_model,
        False,
    ),
    ("EMAModel(model.parameters(), decay=0.9)", _diffusers, False),
    ("EMAModel(model.parameters(), decay=0.9, update_after_step=4)", _diffusers, False),
    ("EMAModel(model.parameters(), decay=0.9, min_decay=0.9)", _diffusers, False),
    (
        "EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True, inv_gamma=2, power=0.5)",
        _diffusers,
        False,
    ),
    ("EMAWeightAveraging(decay=0.9)", _lightning, False),
    ("EMAWeightAveraging(decay=0.9, update_every_n_steps=3)", _lightning, False),
    ("EMAWeightAveraging(decay=0.9, update_starting_at_step=8)", _lightning, False),
    ("EMAHandler(model, momentum=0.1)", _ignite, True),
]


def wander(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize(("call", "peer", "at_construction"), CALLS, ids=[c[0] for c in CALLS])
def test_the_average_is_the_same(
    call: str, peer: Callable[[str, nn.Module], Peer], at_construction: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    found = from_library(call)
    assert at_construction == any("at construction" in change for change in found.changes)
    averager = Averager(model, found.rule, every=found.every, buffers=found.buffers)  # type: ignore[arg-type]
    update, average = peer(call, model)
    if at_construction:
        averager.update()
    for step in range(1, STEPS):
        wander(model)
        update(step)
        averager.update()
        if step > 10:  # Lightning's average is nothing before it starts
            for ours, theirs in zip(averager.average().values(), average(), strict=True):
                torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-10)


def test_each_line_is_code() -> None:
    for call, _, _ in CALLS:
        found = from_library(call)
        averager = eval(found.code, {"polyak": polyak, "model": nn.Linear(3, 2)})
        assert averager.every == found.every


# Libraries that are not installed: (call, our rule, every).
READ = [
    ("timm.utils.ModelEmaV3(model, decay=0.9)", "exponential(0.9)", 1),
    (
        "ModelEmaV3(model, decay=0.9998, use_warmup=True, update_after_step=7)",
        "tail(exponential(inverse_power(max_decay=0.9998)), 7)",
        1,
    ),
    ("timm.utils.ModelEmaV2(model, 0.99)", "exponential(0.99)", 1),
    ("composer.algorithms.EMA(half_life='100ba')", "exponential(half_life=100)", 1),
    (
        "composer.algorithms.EMA(half_life='100ba', update_interval='10ba')",
        "exponential(half_life=100)",
        10,
    ),
    ("nemo.collections.common.callbacks.EMA(decay=0.5, every_n_steps=2)", f"exponential({0.5**0.5})", 2),
    ("mmengine.model.ExponentialMovingAverage(model, momentum=0.25)", "exponential(0.75)", 1),
    (
        "MomentumAnnealingEMA(model, momentum=0.25, gamma=50)",
        "exponential(inverse_power(inv_gamma=50, power=1.0, max_decay=0.75))",
        1,
    ),
    ("StochasticWeightAverage(model, interval=5)", "uniform()", 5),
    ("EMAModuleConfig(ema_decay=0.5, ema_start_update=9)", "tail(exponential(0.5), 9)", 1),
    (
        "trl.BEMACallback(update_freq=400, lag=10, multiplier=2.0, update_after=100)",
        "bema(gamma=2.0, rho=210.0)",
        400,
    ),
    (
        "TraditionalEMA(net, halflife_Mimg=0.5)",
        "exponential(half_life_ramp(500000.0))",
        1,
    ),
    ("lightning.pytorch.callbacks.WeightAveraging()", "uniform()", 1),
    ("StochasticWeightAveraging(swa_lrs=1e-2)", "uniform()", 1),
    ("KarrasEMA(model, gamma=6.94, update_every=1)", "power(6.94)", 1),
]  # fmt: skip


@pytest.mark.parametrize(("call", "rule", "every"), READ, ids=[call for call, _, _ in READ])
def test_formulas_that_were_read(call: str, rule: str, every: int) -> None:
    found = from_library(call)
    assert (str(found.rule), found.every) == (rule, every)


# Of those, the calls whose average begins with the weights at construction, and calls like them that do not.
BEGUN = [
    ("timm.utils.ModelEmaV2(model, 0.99)", True),
    ("nemo.collections.common.callbacks.EMA(decay=0.5)", True),
    ("EMAModuleConfig(ema_decay=0.5)", True),
    ("EMAModuleConfig(ema_decay=0.5, ema_update_freq=4)", True),
    ("EMAModuleConfig(ema_decay=0.5, ema_start_update=9)", False),
    ("mmengine.model.ExponentialMovingAverage(model)", False),
    ("training.phema.TraditionalEMA(net, halflife_Mimg=0.5, rampup_ratio=None)", True),
    ("training.phema.TraditionalEMA(net, halflife_Mimg=0.5)", False),  # its first step is all but a copy
    ("training.phema.PowerFunctionEMA(net)", False),
]  # fmt: skip


@pytest.mark.parametrize(("call", "told"), BEGUN, ids=[call for call, _ in BEGUN])
def test_an_average_that_begins_at_construction_is_told(call: str, told: bool) -> None:
    assert told == any(
        "call update() before training" in each for each in from_library(call).changes
    )


def test_several_averages() -> None:
    found = from_library("PostHocEMA(model, sigma_rels=(0.05, 0.1), update_every=1)")
    assert "Recorder" in str(found)
    averager = eval(found.code, {"polyak": polyak, "model": nn.Linear(3, 2)})
    assert [str(rule) for rule in averager.rules.values()] == [
        "power(relative_std=0.05)",
        "power(relative_std=0.1)",
    ]
    edm2 = from_library("training.phema.PowerFunctionEMA(net)")
    assert isinstance(edm2.rule, dict) and list(edm2.rule) == ["0.050", "0.100"]


def test_every_class_is_tried() -> None:
    tried = {from_library(call).library for call, *_ in [*CALLS, *READ]}
    assert tried | {"ema_pytorch.PostHocEMA", "training.phema.PowerFunctionEMA"} == set(CLASSES)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("EMA(model)", "EMA may be several classes, wanted one of: ema_pytorch.EMA, composer"),
        ("Other(model)", "Other is not known, wanted one of: ema_pytorch.EMA"),
        ("ema_pytorch.EMA(model, beta=args.beta)", "beta is args.beta, wanted its value"),
        ("ema_pytorch.EMA(model, betta=0.9)", "betta is 0.9, wanted an argument that it has"),
        ("ema_pytorch.EMA(model, beta='a')", "beta is 'a', wanted a number"),
        ("ema_pytorch.EMA(1, 2, 3, 4, 5, 6, 7, 8, 9)", "too many positional arguments"),
        ("ema_pytorch.EMA(model, update_every=1.5)", "update_every is 1.5, wanted an integer"),
        ("EMAModel(p, min_decay=0.5)", "min_decay is 0.5, wanted at most 2/11"),
        ("AveragedModel(model, avg_fn=mine)", "avg_fn is"),
        ("ema_pytorch.EMA(**options)", "without * and **"),
        ("0.995", "is not a call"),
        ("import os", "is not a call"),
        ("(" * 500, "is not a call"),
        ("composer.algorithms.EMA(half_life='3ep')", "half_life is '3ep', wanted batches"),
        ("EMAWeightAveraging(update_starting_at_epoch=3)", "wanted a start in steps"),
    ],
)
def test_bad_calls(call: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        from_library(call)
    assert words in str(error.value)


def test_nothing_is_run() -> None:
    call = parse_call("EMA(__import__('os').abort(), x=[1, -2.5], y=1/0, z=2 * 3)")
    assert call.kwargs == {"x": [1, -2.5], "y": Source("1 / 0"), "z": 6}


def test_the_command() -> None:
    call = "ema_pytorch.EMA(beta=.995, update_after_step=3, update_every=2)"
    found = json.loads(run("migrate", call, "--json").stdout)
    assert found["every"] == 2 and found["code"] == from_library(call).code
    assert run("migrate", call).stdout.startswith("polyak.Averager(model, ")
    wrong = run("migrate", "nothing")
    assert wrong.exit_code == 2 and "is not a call" in wrong.stderr
