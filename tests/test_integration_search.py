"""The Trainer's hyper-parameter search by optuna: every trial has its own average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

import tiny_trainers as tiny
from models import assert_same
from polyak.integrations.transformers import AveragerCallback

DECAY, TRIALS = 0.6, 4


class SecondTrial(optuna.pruners.BasePruner):
    """Prunes the second trial at its first evaluation."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:  # noqa: ARG002
        return trial.number == 1


class Ends(TrainerCallback):
    """The averager, its average and the plain formula's at the end of each training."""

    def __init__(self, averages: AveragerCallback, steps: tiny.Steps) -> None:
        self._averages, self._steps = averages, steps
        self.averagers: list[Any] = []
        self.found: list[dict[str, Tensor]] = []
        self.wanted: list[dict[str, Tensor]] = []

    def on_train_end(self, *_: Any, **__: Any) -> None:
        averager = self._averages.averager
        assert averager is not None
        self.averagers.append(averager)
        self.found.append(averager.average("ema"))
        self.wanted.append(tiny.ema(self._steps.taken, DECAY))


@pytest.mark.slow
def test_every_trial_has_its_own_average(tmp_path: Path) -> None:
    """Its objective is the average's metric, its folder has it, and a pruned trial leaves no trace."""
    steps = tiny.Steps()
    one = tiny.trainer(tmp_path, model_init=tiny.bert, callbacks=[steps])
    averages = AveragerCallback({"ema": f"exponential({DECAY})"}).attach(one)
    ends = Ends(averages, steps)
    one.add_callback(ends)
    best: Any = one.hyperparameter_search(
        lambda trial: {"learning_rate": 10.0 ** -(trial.number + 1)},
        compute_objective=lambda metrics: metrics["eval_ema_loss"],
        n_trials=TRIALS,
        backend="optuna",
        direction="minimize",
        pruner=SecondTrial(),
    )
    assert len(set(map(id, ends.averagers))) == TRIALS
    assert [each.count for each in ends.averagers] == [
        tiny.EVERY if trial == 1 else tiny.STEPS for trial in range(TRIALS)
    ]
    for found, wanted in zip(ends.found, ends.wanted, strict=True):
        torch.testing.assert_close(found, wanted)
    losses = {}
    for trial in {*range(TRIALS)} - {1}:
        made = tmp_path / f"run-{trial}/checkpoint-{tiny.STEPS}/averages/ema"
        assert_same(load_file(made / "model.safetensors"), ends.found[trial])
        model = tiny.bert()
        model.load_state_dict(ends.found[trial])
        losses[str(trial)] = tiny.trainer(tmp_path / "judge", model).evaluate()["eval_loss"]
    assert best.run_id == min(losses, key=losses.__getitem__)
    assert best.objective == pytest.approx(losses[best.run_id], rel=1e-6)
