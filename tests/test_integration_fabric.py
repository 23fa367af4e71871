"""The Fabric adapter in a real loop of Fabric, against a plain loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning_fabric
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.fabric.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]
from tensorboard.plugins.hparams import plugin_data_pb2  # type: ignore[import-untyped]

from integration_contract import (
    EVERY,
    LAWS,
    MONITORED,
    RULES,
    STEPS,
    EvaluationError,
    Host,
    Outcome,
    batches,
    loss,
    mean_loss,
    net,
    optimizer,
)  # fmt: skip
from models import assert_same
from polyak import Pull, theory
from polyak.checkpoints import export
from polyak.integrations.fabric import average

DOCS = Path(__file__).parents[1] / "docs" / "lightning.md"


def score(model: Any) -> float:
    model.eval()
    with torch.no_grad():
        found = mean_loss(model)
    model.train()
    return found


def host(
    folder: Path,
    *,
    until: int = STEPS,
    resume: bool = False,
    skip: bool = False,
    fails: bool = False,
    pull: Pull | None = None,
) -> Outcome:
    amp = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[amp] if skip else [])
    plain_model = net(fails=fails)
    model, steps = fabric.setup(plain_model, optimizer(plain_model))
    averager = average(fabric, model, RULES, steps, steps=STEPS, pull=pull)
    state: dict[str, Any] = {"model": model, "optimizer": steps, "averager": averager, "step": 0}
    if resume:
        fabric.load(folder / "last.ckpt", state)
    call = plain_model if skip else model  # the wrapper would compute in float16
    metrics: list[dict[str, float]] = []
    best = folder / "best.safetensors"
    try:
        for step, batch in enumerate(batches(skip=skip)[:until]):
            if step < state["step"]:
                continue
            fabric.backward(loss(call, batch))
            steps.step()
            steps.zero_grad()
            if (step + 1) % EVERY == 0:
                metrics.append({"live": score(call)})
                for name in RULES:
                    with averager.applied(name):
                        metrics[-1][name] = score(call)
                if metrics[-1][MONITORED] == min(each[MONITORED] for each in metrics):
                    export(best, averager, MONITORED, overwrite=True)
        fabric.save(folder / "last.ckpt", {**state, "step": until})
    except EvaluationError:
        assert fails
    return Outcome(
        live=plain_model.state_dict(),
        averages={name: averager.average(name) for name in RULES},
        count=averager.count,
        metrics=metrics,
        best=best,
    )


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_contract(law: Callable[[Host, Path], None], tmp_path: Path) -> None:
    law(host, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Fabric, lightning_fabric.Fabric])
@pytest.mark.parametrize("wraps", [lambda model: model, partial(torch.compile, backend="eager")])
def test_the_fabric_of_either_package_with_a_model_that_is_compiled_or_not(
    kind: Any, wraps: Any
) -> None:
    fabric, made = kind(accelerator="cpu", devices=1), net()
    model, steps = fabric.setup(made, optimizer(made))
    averager = average(fabric, wraps(model), RULES, steps)
    fabric.backward(loss(model, batches()[0]))
    steps.step()
    assert averager.count == 1
    assert set(averager.average("fast")) == set(made.state_dict())


def test_a_model_that_fabric_has_not_set_up_is_refused() -> None:
    fabric, model = Fabric(accelerator="cpu", devices=1), net()
    with pytest.raises(TypeError, match=r"model is a plain Net, wanted what fabric\.setup"):
        average(fabric, model, RULES, optimizer(model))
    with pytest.raises(TypeError, match=r"fabric is of type Net, wanted lightning\.Fabric"):
        average(model, model, RULES, optimizer(model))  # type: ignore[arg-type]


@pytest.mark.slow
def test_loggers_get_what_is_averaged(tmp_path: Path) -> None:
    loggers: list[Any] = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="board")]
    fabric = Fabric(accelerator="cpu", devices=1, loggers=loggers)
    model, steps = fabric.setup(plain_model := net(), optimizer(plain_model))
    average(fabric, model, {"ema": "exponential(0.6)"}, steps, steps=STEPS, every=2)
    loggers[1].finalize("success")
    (path,) = tmp_path.rglob("events*")
    events = list(EventFileLoader(str(path)).Load())
    contents = [v.metadata.plugin_data.content for event in events for v in event.summary.value]
    plugins = [plugin_data_pb2.HParamsPluginData.FromString(each) for each in contents]
    (told,) = (
        each.session_start_info.hparams for each in plugins if each.HasField("session_start_info")
    )
    seen = theory.explain("exponential(0.6)", STEPS, every=2)
    assert told["ema/rule"].string_value == "exponential(0.6)"
    assert told["ema/half_life"].number_value == seen.half_life
    assert told["ema/mean_age"].number_value == seen.mean_age


def test_the_code_of_the_docs_runs(tmp_path: Path) -> None:
    """The state of the page is saved and loaded, by `strict=False` from a file without the averager too."""
    (code,) = re.findall(r"## Fabric\n\n```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    made = net()
    scope: dict[str, Any] = {"model": made, "optimizer": optimizer(made)}
    exec(code.replace("Fabric()", 'Fabric(accelerator="cpu", devices=1)'), scope)
    fabric, state = scope["fabric"], scope["state"]
    fabric.save(tmp_path / "without", {"model": scope["model"]})
    for batch in batches()[:3]:
        fabric.backward(loss(scope["model"], batch))
        scope["optimizer"].step()
    fabric.save(tmp_path / "with", state)
    wanted = scope["averager"].average()
    scope["optimizer"].step()
    fabric.load(tmp_path / "with", state)
    assert scope["averager"].count == 3
    assert_same(scope["averager"].average(), wanted)
    fabric.load(tmp_path / "without", {**state, "averager": scope["averager"]}, strict=False)
    assert scope["averager"].count == 3
    assert_same(made.state_dict(), net().state_dict())
