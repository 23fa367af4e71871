"""Averages in a loop of Accelerate, with real Accelerators in one process and in several."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType  # type: ignore[import-untyped]
from torch import nn

import accelerate_ranks
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
)
from launching import require_laws
from models import assert_same
from polyak import EMA, Averager, Pull, checkpoints
from polyak.integrations.accelerate import register


def train_by_accelerate(
    folder: Path,
    *,
    until: int = STEPS,
    resume: bool = False,
    skip: bool = False,
    fails: bool = False,
    pull: Pull | None = None,
) -> Outcome:
    """The contract's host: a loop that evaluates by `applied`."""
    accelerator = Accelerator(cpu=True)
    if skip:
        accelerator.scaler = torch.amp.GradScaler("cpu")
    model = net(fails=fails)
    model, steps = accelerator.prepare(model, optimizer(model))
    averager = Averager(model, RULES, pull=pull)
    averager.attach(steps)
    register(accelerator, averager)
    done = 0
    if resume:
        accelerator.load_state(str(folder / "last"))
        done = averager.count
    out, best, lowest = Outcome({}, {}, 0), folder / "best.safetensors", math.inf
    try:
        for step in range(done, until):
            model.train()
            accelerator.backward(loss(model, batches(skip=skip)[step]))
            steps.step()
            steps.zero_grad()
            if (step + 1) % EVERY == 0:
                out.metrics.append(judged(model, averager))
                if out.metrics[-1][MONITORED] < lowest:
                    lowest = out.metrics[-1][MONITORED]
                    checkpoints.export(best, averager, MONITORED, overwrite=True)
                accelerator.save_state(str(folder / "last"))
    except EvaluationError:
        pass
    out.live = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out.averages = {name: averager.average(name) for name in RULES}
    out.count, out.best = averager.count, best
    return out


def judged(model: nn.Module, averager: Averager) -> dict[str, float]:
    model.eval()
    found = {}
    with torch.no_grad():
        found["live"] = mean_loss(model)
        for name in RULES:
            with averager.applied(name):
                found[name] = mean_loss(model)
    return found


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_contract(law: Callable[[Host, Path], None], tmp_path: Path) -> None:
    law(train_by_accelerate, tmp_path)


class Run:
    """A network trained by a fresh Accelerator, averaged before or after `prepare`."""

    def __init__(self, *, rule: Any = RULES, early: bool = False, **options: Any) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.model: nn.Module = net()
        if early and rule:
            self.averager = Averager(self.model, rule)
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer(self.model))
        if rule and not early:
            self.averager = Averager(self.model, rule)
        if rule:
            self.averager.attach(self.optimizer)
            self.remove = register(self.accelerator, self.averager, **options)

    def train(self, first: int = 0, last: int = STEPS) -> Run:
        for step in range(first, last):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss(self.model, batches()[step]))
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self


@pytest.mark.parametrize("early", [False, True])
def test_batches_that_are_accumulated_are_one_update(early: bool) -> None:
    found, wanted = Run(early=early).train(), net()
    steps, averager = optimizer(wanted), Averager(wanted, RULES)
    for step, batch in enumerate(batches()):
        (loss(wanted, batch) / 2).backward()
        if step % 2:
            steps.step()
            steps.zero_grad()
            averager.update()
    assert found.averager.count == STEPS // 2
    for name in RULES:
        assert_same(found.averager.average(name), averager.average(name))


def test_a_state_goes_into_and_out_of_runs_without_averages(tmp_path: Path) -> None:
    Run(rule=None).train(0, 4).accelerator.save_state(str(tmp_path / "plain"))
    with pytest.raises(
        FileNotFoundError, match=r"\(there: none\); .*register with missing_ok=True"
    ):
        Run().accelerator.load_state(str(tmp_path / "plain"))
    joined = Run(missing_ok=True)
    joined.accelerator.load_state(str(tmp_path / "plain"))
    joined.train(4).accelerator.save_state(str(tmp_path / "averaged"))
    assert joined.averager.count == (STEPS - 4) // 2
    without = Run(rule=None)
    without.accelerator.load_state(str(tmp_path / "averaged"))
    assert_same(dict(without.model.state_dict()), dict(joined.model.state_dict()))


def test_the_folders_that_accelerate_names_itself_have_averages(tmp_path: Path) -> None:
    run = Run()
    run.accelerator.project_configuration.set_directories(str(tmp_path))
    run.accelerator.project_configuration.automatic_checkpoint_naming = True
    for first in (0, 4):
        run.train(first, first + 4).accelerator.save_state()
    assert sorted(tmp_path.rglob("fast-slow.safetensors")) == [
        tmp_path / "checkpoints" / f"checkpoint_{n}" / "averages" / "fast-slow.safetensors"
        for n in (0, 1)
    ]


def test_another_rule_is_refused_unless_told(tmp_path: Path) -> None:
    Run().train().accelerator.save_state(str(tmp_path))
    other = RULES | {"fast": "exponential(0.5)"}
    with pytest.raises(ValueError, match="change_rule=True"):
        Run(rule=other).accelerator.load_state(str(tmp_path))
    changed = Run(rule=other, change_rule=True)
    changed.accelerator.load_state(str(tmp_path))
    assert changed.averager.mixed


def test_two_averagers_need_different_names(tmp_path: Path) -> None:
    run = Run()
    with pytest.raises(
        ValueError,
        match=r"two averagers have files of the name 'fast': .*give the averages other names.*, or call what register returned",
    ):
        register(run.accelerator, Averager(run.model, RULES))
    with pytest.raises(ValueError, match="files of the name 'fast-slow'"):
        register(run.accelerator, Averager(run.model, {"fast-slow": "uniform()"}))
    with pytest.raises(
        TypeError, match=r"averager is of type polyak\.EMA, wanted polyak\.Averager"
    ):
        register(run.accelerator, EMA(run.model))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"accelerator is of type polyak.Averager, wanted accelerate.Accelerator"
    ):
        register(run.averager, run.averager)
    with pytest.raises(ValueError, match=r"name is 'a:b', and files get that name"):
        register(run.accelerator, Averager(run.model, {"a:b": "uniform()"}))
    more = Averager(run.model, {"third": "uniform()"})
    more.update()
    register(run.accelerator, more)
    run.train(0, 2).accelerator.save_state(str(tmp_path))
    names = {path.name for path in (tmp_path / "averages").iterdir()}
    assert names == {"fast-slow.safetensors", "third.safetensors"}


def test_deepspeed_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    before = accelerator.state.distributed_type
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    try:
        with pytest.raises(ValueError, match=r"DeepSpeed keeps the weights.*use FSDP2"):
            register(accelerator, Averager(net(), RULES))
    finally:
        accelerator.state.distributed_type = before


def test_an_averager_that_is_removed_is_no_longer_carried(tmp_path: Path) -> None:
    run = Run()
    run.remove()
    run.train(0, 2).accelerator.save_state(str(tmp_path))
    assert not (tmp_path / "averages").exists()
    register(run.accelerator, run.averager)
    run.remove()  # again: the later register stays
    run.accelerator.save_state(str(tmp_path))
    assert (tmp_path / "averages").exists()
    with pytest.raises(ValueError, match="files of the name 'fast'"):
        register(run.accelerator, run.averager)


@pytest.mark.slow
def test_several_ranks_carry_averages(tmp_path: Path) -> None:
    require_laws(accelerate_ranks.__file__, accelerate_ranks.LAWS, 2, tmp_path)
