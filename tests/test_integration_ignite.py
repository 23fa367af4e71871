"""The ignite adapter with real engines, against a plain loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, FastaiLRFinder, TensorboardLogger
from ignite.metrics import Average
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import nn

from integration_contract import (
    EVERY,
    HALF,
    LAWS,
    MONITORED,
    RULES,
    STEPS,
    EvaluationError,
    Host,
    Net,
    Outcome,
    batches,
    evaluate,
    held_out,
    loss,
    net,
    optimizer,
    plain,
    require_equal,
)  # fmt: skip
from polyak import Averager, Pull, theory
from polyak.integrations.ignite import Weights, evaluators, log_measures

DOCS = Path(__file__).parents[1] / "docs" / "lightning.md"


def evaluator(model: Net) -> Engine:
    def step(_: Engine, batch: Any) -> float:
        model.eval()
        with torch.no_grad():
            value = loss(model, batch).item()
        model.train()
        return value

    engine = Engine(step)
    Average().attach(engine, "loss")
    return engine


def host(
    folder: Path,
    *,
    until: int = STEPS,
    resume: bool = False,
    skip: bool = False,
    fails: bool = False,
    pull: Pull | None = None,
) -> Outcome:
    model, scaler = net(fails=fails), torch.amp.GradScaler("cpu", enabled=skip)
    steps, averager = optimizer(model), Averager(model, RULES, pull=pull)
    averager.attach(steps, scaler)
    data = batches(skip=skip)

    def train(engine: Engine, _: Any) -> None:
        scaler.scale(loss(model, data[engine.state.iteration - 1])).backward()
        scaler.step(steps)
        scaler.update()
        steps.zero_grad()

    trainer = Engine(train)
    engines = {"live": evaluator(model), **evaluators(averager, lambda: evaluator(model))}
    metrics: list[dict[str, float]] = []

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate() -> None:
        scores = {name: engine.run(held_out()) for name, engine in engines.items()}
        metrics.append({name: state.metrics["loss"] for name, state in scores.items()})

    saver: Any = DiskSaver(str(folder), require_empty=False)
    best = Checkpoint(
        {"model": Weights(averager, MONITORED)},
        saver,
        n_saved=1,
        filename_pattern="best.pt",
        score_function=lambda engine: -engine.state.metrics["loss"],
    )
    engines[MONITORED].add_event_handler(Events.COMPLETED, best)
    whole = {"trainer": trainer, "model": model, "optimizer": steps, "averager": averager}
    last = Checkpoint(whole, saver, n_saved=1, filename_pattern="last.pt")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, last)
    if resume:
        Checkpoint.load_objects(whole, torch.load(folder / "last.pt", weights_only=True))
    try:
        trainer.run([0] * EVERY, max_epochs=until // EVERY)
    except EvaluationError:
        assert fails
    if (folder / "best.pt").exists():
        save_file(torch.load(folder / "best.pt", weights_only=True), folder / "best.safetensors")
    return Outcome(
        live=model.state_dict(),
        averages={name: averager.average(name) for name in RULES},
        count=averager.count,
        metrics=metrics,
        best=folder / "best.safetensors",
    )


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_contract(law: Callable[[Host, Path], None], tmp_path: Path) -> None:
    law(host, tmp_path)


def test_an_evaluator_of_an_average_can_run_again_and_needs_an_average() -> None:
    model = net()
    averager = Averager(model, RULES)
    engines = evaluators(averager, lambda: evaluator(model))
    assert list(engines) == list(RULES)
    with pytest.raises(RuntimeError, match="before the first update"):
        engines["fast"].run(held_out())
    averager.update()
    handlers = engines["fast"]._event_handlers
    before = len(handlers[Events.COMPLETED])
    first = [engines["fast"].run(held_out()).metrics for _ in range(2)]
    assert first[0] == first[1]
    assert len(handlers[Events.COMPLETED]) == before


LAST = {
    "completed": Events.COMPLETED,
    "terminated": Events.TERMINATE,
    "interrupted": Events.INTERRUPT,
    "raises": Events.EXCEPTION_RAISED,
}
"""How a run of an engine ends -> the event of it that a checkpoint's handler may wait for."""


@pytest.mark.parametrize("handled", [True, False], ids=["handled", "alone"])
@pytest.mark.parametrize("ends", LAST)
def test_the_average_is_there_in_every_epoch_and_live_weights_at_its_end(
    ends: str, handled: bool
) -> None:
    """Whatever ends the run; handlers of its end see live weights, and an exception comes out as ever."""
    model = net()
    averager = Averager(model, RULES)
    averager.update()
    weight: Any = model.body[0].weight
    wanted = weight.detach().clone()
    torch.nn.init.zeros_(weight)
    engine = evaluators(averager, lambda: evaluator(model))["fast"]
    seen: list[bool] = []
    after: list[bool] = []

    def fail() -> None:
        raise EvaluationError

    stop = {"terminated": engine.terminate, "interrupted": engine.interrupt, "raises": fail}

    def look(_: Engine) -> None:
        seen.append(torch.equal(weight, wanted))
        if ends in stop and len(seen) == 3:
            stop[ends]()

    engine.add_event_handler(Events.ITERATION_COMPLETED, look)
    if handled:
        engine.add_event_handler(LAST[ends], lambda *_: after.append(weight.any().item()))
    raises = ends == "raises" and not handled
    with pytest.raises(EvaluationError) if raises else nullcontext():
        engine.run(held_out(), max_epochs=3)
    goes_on = ends == "raises" and handled  # with the epoch after that of the exception
    assert seen == [True] * (6 if ends == "completed" else 5 if goes_on else 3)
    assert after == [False] * handled
    assert not weight.any()


def test_a_logger_gets_what_is_averaged(tmp_path: Path) -> None:
    logger = TensorboardLogger(str(tmp_path))
    trainer = Engine(lambda *_: None)
    log_measures(logger, trainer, Averager(net(), RULES, every=2), steps=STEPS)
    trainer.run([0] * 3, max_epochs=2)
    logger.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    told = {
        name: [event.value for event in found.Scalars(name)] for name in found.Tags()["scalars"]
    }
    wanted = {}
    for name, rule in RULES.items():
        seen = theory.explain(rule, STEPS, every=2)
        wanted[f"averages/{name}/half_life"] = [pytest.approx(seen.half_life)]
        wanted[f"averages/{name}/mean_age"] = [pytest.approx(seen.mean_age)]
    assert told == wanted


@pytest.mark.filterwarnings("ignore:Run completed without loss diverging")
@pytest.mark.parametrize("before", [0, HALF])
def test_a_finder_of_the_learning_rate_takes_its_steps_back(before: int) -> None:
    """From an averager that it was given, as the docs say."""
    model = net()
    steps, averager = optimizer(model), Averager(model, RULES)
    averager.attach(steps)
    trainer: Any = create_supervised_trainer(model, steps, nn.functional.mse_loss)
    if before:
        trainer.run(batches()[:before])
    given = {"model": model, "optimizer": steps, "averager": averager}
    with FastaiLRFinder().attach(trainer, given, num_iter=4, end_lr=0.1) as finding:
        finding.run(batches()[:4])
    assert averager.count == before
    create_supervised_trainer(model, steps, nn.functional.mse_loss).run(batches()[before:])
    averages = {name: averager.average(name) for name in RULES}
    require_equal(Outcome(model.state_dict(), averages, averager.count), plain())


def test_bad_input_is_an_error_with_its_cure() -> None:
    model: Any = net()
    averager = Averager(model, RULES)
    one = evaluator(model)
    with pytest.raises(ValueError, match="the same engine twice, wanted a new one"):
        evaluators(averager, lambda: one)
    engine: Any = evaluator(model)
    calls: dict[str, Callable[[Any], Any]] = {
        "averager is of type integration_contract.Net, wanted polyak.Averager": Weights,
        "evaluators: averager is": lambda got: evaluators(got, lambda: engine),
        "evaluators: what make returned is": lambda _: evaluators(averager, net),  # type: ignore[arg-type]
        "log_measures: averager is": lambda got: log_measures(engine, engine, got),
        "log_measures: trainer is .* wanted ignite.Engine": lambda got: log_measures(
            engine, got, averager
        ),
        "log_measures: logger is": lambda got: log_measures(got, engine, averager),
    }
    for words, call in calls.items():
        with pytest.raises(TypeError, match=words):
            call(model)
    with pytest.raises(TypeError, match="save and load the averager"):
        Weights(averager, "fast").load_state_dict(model.state_dict())


def test_the_code_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it saves as the best loads into the model, and has the metric that chose it."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"## ignite\n\n```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    model = net()
    steps = optimizer(model)

    def train(_: Engine, batch: Any) -> None:
        loss(model, batch).backward()
        steps.step()
        steps.zero_grad()

    trainer = Engine(train)
    scope: dict[str, Any] = {"model": model, "optimizer": steps, "trainer": trainer}
    exec(code, {**scope, "make_evaluator": lambda: evaluator(model)}, scope)
    for first in range(0, STEPS, EVERY):
        trainer.run(batches()[first : first + EVERY], max_epochs=1)
        for engine in scope["engines"].values():
            engine.run(held_out())
    (saved,) = (tmp_path / "run").iterdir()
    state = torch.load(saved, weights_only=True)
    assert float(saved.stem.rpartition("_")[2]) == pytest.approx(-evaluate(state), abs=1e-3)
    assert scope["averager"].count == STEPS
    scope["last"](trainer)
    assert len(list((tmp_path / "run").iterdir())) == 2
