"""Averages in the Trainer of transformers, on real Trainers and models made from a config."""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
import signal
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import polyak
import tiny_trainers as tiny
import trainer_ranks
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
    held_out,
    net,
    optimizer,
)
from launching import require_laws
from models import assert_same, snapshot
from polyak import Pull
from polyak.integrations.transformers import AveragerCallback
from tiny_trainers import Sentences, Steps, ema, weights


class Rows(Dataset[dict[str, Tensor]]):
    """The examples of batches, in order."""

    def __init__(self, found: list[tuple[Tensor, Tensor]]) -> None:
        self._inputs, self._wanted = (torch.cat(parts) for parts in zip(*found, strict=True))

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self._inputs[index], "labels": self._wanted[index]}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """No tracker, no progress bar, and every file in the folder."""
    told: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 5}
    told |= {"remove_unused_columns": False, "label_names": ["labels"]}
    return TrainingArguments(str(folder), **(told | options))


class InOrder(Trainer):
    """A Trainer that takes the examples in their order."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(cast(Rows, self.train_dataset))


class StopAt(TrainerCallback):
    """Stops the training after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        control.should_training_stop |= state.global_step == self._step


class Kept(TrainerCallback):
    """What each step leaves: at the end the Trainer loads what was best."""

    def __init__(self, model: nn.Module, averages: AveragerCallback) -> None:
        self._model, self._averages = model, averages
        self.outcome = Outcome({}, {}, 0)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        averager = self._averages.averager
        assert averager is not None
        self.outcome.count = averager.count
        self.outcome.live = snapshot(self._model)
        self.outcome.averages = {name: averager.average(name) for name in RULES}


def train_by_trainer(
    folder: Path,
    *,
    until: int = STEPS,
    resume: bool = False,
    skip: bool = False,
    fails: bool = False,
    pull: Pull | None = None,
) -> Outcome:
    """The contract's host."""
    model = net(fails=fails)
    steps = optimizer(model)
    args = arguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        eval_strategy="steps",
        eval_steps=EVERY,
        save_steps=EVERY,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{MONITORED}_loss",
        max_grad_norm=0.0,
    )
    trainer = InOrder(
        model,
        args,
        train_dataset=Rows(batches(skip=skip)),
        eval_dataset=Rows(held_out()),
        optimizers=(steps, torch.optim.lr_scheduler.LambdaLR(steps, lambda _: 1.0)),
        compute_loss_func=lambda out, labels, **_: nn.functional.mse_loss(out, labels),
        callbacks=[StopAt(until)],
    )
    if skip:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    averages = AveragerCallback(RULES, pull=pull).attach(trainer)
    kept = Kept(model, averages)
    trainer.add_callback(kept)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except EvaluationError:
        kept.on_step_end()
    kept.outcome.metrics = evaluations(trainer)
    if trainer.state.best_model_checkpoint:
        best = Path(trainer.state.best_model_checkpoint)
        kept.outcome.best = best / "averages" / MONITORED / "model.safetensors"
    return kept.outcome


def evaluations(trainer: Trainer) -> list[dict[str, float]]:
    """The losses in the log of each evaluation, under "live" and the averages' names."""
    keys = {"live": "eval_loss"} | {name: f"eval_{name}_loss" for name in RULES}
    found: dict[int, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        for name, key in keys.items():
            if key in entry:
                found.setdefault(int(entry["step"]), {})[name] = entry[key]
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_contract(law: Callable[[Host, Path], None], tmp_path: Path) -> None:
    law(train_by_trainer, tmp_path)


DECAY = 0.75
EMA = {"ema": f"exponential({DECAY})"}


def averaged(trainer: Trainer, rules: Any = EMA, **options: Any) -> AveragerCallback:
    return AveragerCallback(rules, **options).attach(trainer)


def average_of(callback: AveragerCallback, name: str = "ema") -> dict[str, Tensor]:
    assert callback.averager is not None
    return callback.averager.average(name)


def assert_close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], msg=name)


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


SETS = {
    "one set": (None, {"eval_loss", "eval_ema_loss", "eval_mean_loss"}),
    "a dictionary": (
        {"a": Sentences(8, seed=1), "b": Sentences(8, seed=2)},
        {f"eval_{of}{name}_loss" for of in ("", "ema_", "mean_") for name in "ab"},
    ),
}


@pytest.mark.parametrize("sets", SETS)
def test_every_set_is_evaluated_once_by_every_average(sets: str, tmp_path: Path) -> None:
    given, wanted = SETS[sets]
    options: dict[str, Any] = {"eval_dataset": given} if given else {}
    one = tiny.trainer(tmp_path, max_steps=2, **options)
    averaged(one, EMA | {"mean": "uniform()"})
    one.train()
    logged = [key for entry in one.state.log_history for key in entry if key.endswith("_loss")]
    assert sorted(logged) == sorted([*wanted, "train_loss"])
    assert {key for key in one.evaluate() if key.endswith("_loss")} == wanted
    assert "test_ema_loss" in one.evaluate(Sentences(8), None, "test")


@pytest.mark.slow
def test_a_training_is_the_one_without_averages(tmp_path: Path) -> None:
    left, steps = [], Steps()
    for averages in (False, True):
        one = tiny.trainer(tmp_path / str(averages), callbacks=[steps])
        callback = averaged(one) if averages else None
        one.train()
        left.append(steps.taken[-1])
    assert_same(*left)  # with dropout: evaluations of averages draw no random number
    assert callback is not None
    assert_close(average_of(callback), ema(steps.taken, DECAY))
    assert callback.averager is not None and callback.averager.count == tiny.STEPS


def test_a_checkpoint_has_the_average_as_a_model_and_as_a_state(tmp_path: Path) -> None:
    one = tiny.trainer(tmp_path, save_total_limit=1)
    callback = averaged(one)
    one.train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    loaded = BertForSequenceClassification.from_pretrained(checkpoint / "averages" / "ema")
    assert_same(dict(loaded.state_dict()), average_of(callback))
    state = polyak.checkpoints.read(checkpoint / "averages" / "ema.safetensors")
    assert_same(dict(state.average("ema").items()), average_of(callback))
    card = (checkpoint / "averages" / "ema" / "README.md").read_text()
    assert f"`exponential({DECAY})`, {tiny.STEPS} updates" in card and "| mean age | " in card
    one.save_model(str(tmp_path / "final"))
    assert_same(saved(tmp_path / "final" / "averages" / "ema"), saved(checkpoint / "averages/ema"))
    assert not list((tmp_path / "final" / "averages").glob("*.*"))  # no state beside a model


def test_best_by_an_average_loads_that_average(tmp_path: Path) -> None:
    one = tiny.trainer(
        tmp_path,
        learning_rate=0.1,  # the loss is not the lowest at the end
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_loss",
    )
    callback = averaged(one)
    one.train()
    best = Path(str(one.state.best_model_checkpoint))
    losses = {e["step"]: e["eval_ema_loss"] for e in one.state.log_history if "eval_ema_loss" in e}
    assert best.name == f"checkpoint-{min(losses, key=losses.__getitem__)}"
    assert_same(saved(best / "averages" / "ema"), weights(one.model))
    assert any(not torch.equal(t, saved(best)[n]) for n, t in weights(one.model).items())
    again = one.evaluate()
    assert again["eval_loss"] == again["eval_ema_loss"] == min(losses.values())
    assert_same(average_of(callback), weights(one.model))


@pytest.mark.slow
@pytest.mark.parametrize("names", [("ema", "ema_slow"), ("ema_slow", "ema")])
def test_the_longer_of_two_names_decides(names: tuple[str, str], tmp_path: Path) -> None:
    """Of two callbacks, whichever is attached first."""
    one = tiny.trainer(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_ema_slow_loss"
    )
    rules = {"ema": "exponential(0.75)", "ema_slow": "uniform()"}
    for name in names:
        averaged(one, {name: rules[name]})
    one.train()
    best = Path(str(one.state.best_model_checkpoint))
    assert_same(saved(best / "averages" / "ema_slow"), weights(one.model))


@pytest.mark.slow
def test_best_by_the_live_weights_takes_averages_along(tmp_path: Path) -> None:
    one = tiny.trainer(
        tmp_path, learning_rate=0.1, load_best_model_at_end=True, metric_for_best_model="eval_loss"
    )
    callback = averaged(one)
    one.train()
    best = Path(str(one.state.best_model_checkpoint))
    assert_same(saved(best), weights(one.model))
    assert_same(saved(best / "averages" / "ema"), average_of(callback))


def resumed(folder: Path, path: Path | bool, callback: AveragerCallback | None) -> Trainer:
    """A Trainer for twice as many steps, resumed."""
    one = tiny.trainer(folder, max_steps=2 * tiny.STEPS)
    if callback is not None:
        callback.attach(one)
    one.train(resume_from_checkpoint=path if path is True else str(path))
    return one


@pytest.mark.slow
def test_an_optimizer_that_averages_itself_trains_as_without_averages(tmp_path: Path) -> None:
    steps, left, judged = Steps(), [], []
    for averages in (False, True):
        one = tiny.trainer(
            tmp_path / str(averages),
            optim="schedule_free_adamw",
            lr_scheduler_type="constant",
            callbacks=[steps],
        )
        if averages:
            callback = averaged(one)
            with pytest.warns(UserWarning, match="AdamWScheduleFree averages the weights itself"):
                one.train()
        else:
            one.train()
        left.append(steps.taken[-1])
        judged.append([e["eval_loss"] for e in one.state.log_history if "eval_loss" in e])
    assert_same(*left)
    assert judged[0] == judged[1]
    assert_close(average_of(callback), ema(steps.taken, DECAY))


@pytest.mark.slow
def test_a_run_without_averages_is_resumed_with_them_if_told(tmp_path: Path) -> None:
    first = tiny.trainer(tmp_path)
    first.train()
    with pytest.raises(
        FileNotFoundError, match=r"no state of the averages ema \(there: none\); .*pass start=6$"
    ):
        resumed(tmp_path, True, AveragerCallback(EMA))
    steps = Steps()
    callback = AveragerCallback(EMA, start=tiny.STEPS)
    one = tiny.trainer(tmp_path, max_steps=2 * tiny.STEPS, callbacks=[steps])
    callback.attach(one)
    one.train(resume_from_checkpoint=True)
    assert len(steps.taken) == tiny.STEPS
    assert_close(average_of(callback), ema(steps.taken, DECAY))


@pytest.mark.slow
def test_a_run_with_averages_is_resumed_without_them(tmp_path: Path) -> None:
    averaged(one := tiny.trainer(tmp_path))
    one.train()
    assert resumed(tmp_path, True, None).state.global_step == 2 * tiny.STEPS


@pytest.mark.slow
def test_a_run_is_resumed_in_another_folder(tmp_path: Path) -> None:
    averaged(one := tiny.trainer(tmp_path / "1", max_steps=2 * tiny.STEPS))
    one.train()
    callback = AveragerCallback(EMA)
    resumed(tmp_path / "2", tmp_path / "1" / f"checkpoint-{tiny.STEPS}", callback)
    name = Path(f"checkpoint-{2 * tiny.STEPS}", "averages", "ema.safetensors")
    assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.slow
def test_another_rule_on_resume_is_an_error_unless_told(tmp_path: Path) -> None:
    averaged(one := tiny.trainer(tmp_path))
    one.train()
    with pytest.raises(ValueError, match=r"change_rule=True"):
        resumed(tmp_path, True, AveragerCallback({"ema": "exponential(0.5)"}))
    with pytest.raises(FileNotFoundError, match=r"averages slow \(there: ema.safetensors\)"):
        resumed(tmp_path, True, AveragerCallback({"slow": "exponential(0.5)"}))
    callback = AveragerCallback({"ema": "exponential(0.5)"}, change_rule=True)
    resumed(tmp_path, True, callback)
    assert callback.averager is not None and callback.averager.mixed


@pytest.mark.slow
def test_a_callback_alone_averages_saves_and_resumes(tmp_path: Path) -> None:
    states = []
    for name, attached in (("alone", False), ("attached", True)):
        for steps, resume in ((tiny.STEPS, False), (2 * tiny.STEPS, True)):
            callback = AveragerCallback(EMA)
            one = tiny.trainer(tmp_path / name, max_steps=steps, lr_scheduler_type="constant")
            callback.attach(one) if attached else one.add_callback(callback)
            one.train(resume_from_checkpoint=resume)
        assert ("eval_ema_loss" in one.evaluate()) == attached
        made = tmp_path / name / f"checkpoint-{2 * tiny.STEPS}" / "averages"
        assert (made / "ema" / "config.json").exists()
        states.append((made / "ema.safetensors").read_bytes())
    assert states[0] == states[1]


@pytest.mark.slow
def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    steps = Steps()
    one = tiny.trainer(
        tmp_path, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=5, callbacks=[steps]
    )
    callback = averaged(one)
    one.train()  # 16 batches: the last step has one
    assert callback.averager is not None and callback.averager.count == len(steps.taken) == 4
    assert_close(average_of(callback), ema(steps.taken, DECAY))


class Altered(BertForSequenceClassification):
    """The transformer with a scaled loss, and with memory for so many examples in a batch."""

    def __init__(
        self, scale: Callable[[], float] = lambda: 1.0, most: Callable[[], int] = lambda: 100
    ) -> None:
        torch.manual_seed(7)
        super().__init__(tiny.config())
        self._scale, self._most = scale, most

    def forward(self, input_ids: Tensor, labels: Tensor, **others: Any) -> Any:
        if self.training and len(input_ids) > self._most():
            raise RuntimeError("CUDA out of memory.")
        out = super().forward(input_ids, labels=labels, **others)
        out["loss"] = out["loss"] * self._scale()
        return out


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_amp_skips_does_not_count(optim: str, tmp_path: Path) -> None:
    steps = Steps()
    one = tiny.trainer(
        tmp_path,
        Altered(lambda: math.inf if len(steps.taken) == 2 else 1.0),
        optim=optim,
        max_grad_norm=0.0,
        callbacks=[steps],
    )
    one.accelerator.scaler = torch.amp.GradScaler("cpu")  # skips the third step
    callback = averaged(one)
    one.train()
    moved = [w for before, w in pairwise([weights(tiny.bert()), *steps.taken]) if differ(before, w)]
    assert len(moved) == tiny.STEPS - 1
    assert callback.averager is not None and callback.averager.count == len(moved)
    assert_close(average_of(callback), ema(moved, DECAY))


def differ(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_averages_begin_anew_when_the_batch_size_is_halved(tmp_path: Path) -> None:
    steps = Steps()
    one = tiny.trainer(
        tmp_path,
        Altered(most=lambda: 4 if len(steps.taken) == 2 else 6),
        auto_find_batch_size=True,
        per_device_train_batch_size=6,
        callbacks=[steps],
    )
    callback = averaged(one)
    one.train()
    assert one.state.train_batch_size is not None and one.state.train_batch_size <= 4
    assert callback.averager is not None and callback.averager.count == tiny.STEPS
    assert_close(average_of(callback), ema(steps.taken, DECAY))


@pytest.mark.slow
def test_every_training_has_its_own_averages(tmp_path: Path) -> None:
    steps = Steps()
    one = tiny.trainer(tmp_path, model_init=tiny.bert, callbacks=[steps])
    callback = averaged(one)
    for rate in (0.01, 0.05):  # as a hyper-parameter search does
        one.args.learning_rate = rate
        earlier = callback.averager
        one.train()
        assert callback.averager is not None and callback.averager.count == tiny.STEPS
        assert_close(average_of(callback), ema(steps.taken, DECAY))
        assert callback.averager is not earlier


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_evaluation_that_ends_early_leaves_the_live_weights(
    error: type[BaseException], tmp_path: Path
) -> None:
    calls: list[int] = []

    def compute_metrics(_: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise error("in the evaluation of the average")
        return {}

    steps = Steps()
    one = tiny.trainer(tmp_path, compute_metrics=compute_metrics, callbacks=[steps])
    callback = averaged(one)
    with pytest.raises(error, match="of the average"):
        one.train()
    assert_same(weights(one.model), steps.taken[-1])
    assert_close(average_of(callback), ema(steps.taken, DECAY))
    assert "eval_ema_loss" in one.evaluate()
    interrupted = callback.averager
    assert interrupted is not None
    count = interrupted.count
    one.train()  # with the optimizer of the interrupted training
    assert interrupted.count == count
    assert callback.averager is not None and callback.averager.count == tiny.STEPS


class Terminated(TrainerCallback):
    """Sends the process SIGTERM at a step, and waits until the Trainer knows of it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step == 3 and not self.jit.is_checkpoint_requested:
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.jit.is_checkpoint_requested:
                time.sleep(0.01)

    def attach(self, trainer: Trainer) -> None:
        (found,) = (c for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager"))
        self.jit = found.jit_manager
        self.jit.kill_wait = 0
        trainer.add_callback(self)


@pytest.mark.slow
def test_a_save_on_sigterm_has_the_averages(tmp_path: Path) -> None:
    one = tiny.trainer(tmp_path, enable_jit_checkpoint=True, save_strategy="no")
    Terminated().attach(one)
    callback = averaged(one)
    one.train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert saved(checkpoint / "averages" / "ema").keys() == saved(checkpoint).keys()
    state = polyak.checkpoints.read(checkpoint / "averages" / "ema.safetensors")
    assert (
        state.clock is not None
        and f"checkpoint-{state.clock.count}" == checkpoint.name == "checkpoint-3"
    )
    again = AveragerCallback(EMA)
    resumed(tmp_path, True, again)
    assert again.averager is not None and again.averager.count == 2 * tiny.STEPS
    assert callback.averager is not None


class Hub:
    """Stands for the network: it keeps what would be uploaded, as it is at that time."""

    def __init__(self) -> None:
        self.uploads: list[set[str]] = []

    def create_repo(self, name: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, folder_path: Path, **_: Any) -> Any:
        files = Path(folder_path).rglob("*.safetensors")
        self.uploads.append({str(path.relative_to(folder_path)) for path in files})
        return SimpleNamespace(done=lambda: True, is_done=lambda: True, result=lambda: None)


@pytest.mark.slow
def test_a_push_to_the_hub_has_the_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *_, **__: hub)
    one = tiny.trainer(
        tmp_path,
        push_to_hub=True,
        hub_model_id="a/b",
        hub_strategy="all_checkpoints",
        hub_always_push=True,
    )
    averaged(one)
    one.train()
    model, average = "model.safetensors", "averages/ema/model.safetensors"
    assert len(hub.uploads) == 2 * tiny.STEPS // tiny.EVERY
    assert all({model, average} <= files for files in hub.uploads)
    assert all("averages/ema.safetensors" in files for files in hub.uploads[1::2])  # checkpoints
    one.push_to_hub()
    assert {model, average} <= hub.uploads[-1]


@pytest.mark.slow
def test_what_the_trainer_decides_by_a_metric_it_can_decide_by_an_average(tmp_path: Path) -> None:
    one = tiny.trainer(
        tmp_path,
        max_steps=20,
        save_strategy="best",
        metric_for_best_model="eval_ema_loss",
        load_best_model_at_end=True,
        greater_is_better=True,  # a falling loss is never better than the first
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"mode": "max", "patience": 0},
        callbacks=[EarlyStoppingCallback(2)],
    )
    averaged(one)
    one.train()
    assert one.state.global_step == 3 * tiny.EVERY
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{tiny.EVERY}"]
    assert cast(Any, one.lr_scheduler).get_last_lr()[0] < one.args.learning_rate


@pytest.mark.slow
def test_a_tracker_gets_metrics_and_what_the_averages_average(tmp_path: Path) -> None:
    one = tiny.trainer(tmp_path, report_to="tensorboard")
    averaged(one)
    one.train()
    found = EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload()
    assert {"eval/loss", "eval/ema_loss"} <= set(found.Tags()["scalars"])
    (mean_age,) = found.Scalars("train/ema/mean_age")
    assert mean_age.value == pytest.approx(polyak.theory.explain(EMA["ema"], tiny.STEPS).mean_age)
    assert len(found.Scalars("eval/ema_loss")) == tiny.STEPS // tiny.EVERY


@pytest.mark.slow
def test_averages_begin_after_start(tmp_path: Path) -> None:
    steps = Steps()
    one = tiny.trainer(tmp_path, callbacks=[steps])
    callback = averaged(one, start=3)
    one.train()
    assert_close(average_of(callback), ema(steps.taken[3:], DECAY))
    logged = [entry["step"] for entry in one.state.log_history if "eval_ema_loss" in entry]
    assert logged == [4, 6]
    assert not (tmp_path / "checkpoint-2" / "averages" / "ema").exists()
    resumed(tmp_path, tmp_path / "checkpoint-2", again := AveragerCallback(EMA, start=3))
    assert again.averager is not None and again.averager.count == 2 * tiny.STEPS - 3


@pytest.mark.slow
def test_start_that_is_never_reached_leaves_everything_alone(tmp_path: Path) -> None:
    averaged(one := tiny.trainer(tmp_path), start=100)
    one.train()
    assert not any("eval_ema_loss" in entry for entry in one.state.log_history)
    assert "eval_ema_loss" not in one.evaluate()


def two_of_one_name(folder: Path) -> None:
    one = tiny.trainer(folder, callbacks=[AveragerCallback(EMA)])
    averaged(one)
    one.train()


def two_with_one_file(folder: Path) -> None:
    one = tiny.trainer(folder, callbacks=[AveragerCallback({"a-b": "uniform()"})])
    averaged(one, {"a": "uniform()", "b": "uniform()"})
    one.train()


def a_set_named_like_an_average(folder: Path) -> None:
    sets = {"ema": Sentences(4), "b": Sentences(4)}
    averaged(one := tiny.trainer(folder, eval_dataset=sets, callbacks=[steps := Steps()]))
    try:
        one.train()
    finally:
        assert not steps.taken  # it is known before the first step


def a_metric_named_like_an_average(folder: Path) -> None:
    averaged(one := tiny.trainer(folder, compute_metrics=lambda _: {"ema_loss": 0.0}))
    one.train()


def metrics_of_two_averages_that_meet(folder: Path) -> None:
    one = tiny.trainer(folder, max_steps=2, compute_metrics=lambda _: {"slow_loss": 0.0})
    averaged(one, {"ema": "uniform()", "ema_slow": "uniform()"})
    one.train()
    one.evaluate()


def another_model(folder: Path) -> None:
    averaged(one := tiny.trainer(folder, max_steps=2))
    one.train()
    one.model = tiny.bert()
    one.evaluate()


def another_model_saved(folder: Path) -> None:
    averaged(one := tiny.trainer(folder, max_steps=2))
    one.train()
    one.model = tiny.bert()
    one.save_model(str(folder / "final"))


def new_weights(folder: Path) -> None:
    averaged(one := tiny.trainer(folder, max_steps=2))
    one.train()
    cast(Any, one.model).more = nn.Linear(1, 1)
    one.evaluate()


def best_by_an_average_that_no_one_evaluates(folder: Path) -> None:
    metric = "eval_ema_loss"
    one = tiny.trainer(folder, metric_for_best_model=metric, callbacks=[AveragerCallback(EMA)])
    one.train()


def two_trainers(folder: Path) -> None:
    averaged(tiny.trainer(folder)).attach(tiny.trainer(folder))


def another_object(_: Path) -> None:
    averaged(tiny.bert())  # type: ignore[arg-type]


def deepspeed(folder: Path) -> None:
    averaged(one := tiny.trainer(folder))
    one.args.deepspeed = "zero.json"
    one.train()


def a_start_that_is_no_step(_: Path) -> None:
    AveragerCallback(EMA, start=-1)


def a_rule_that_does_not_parse(_: Path) -> None:
    AveragerCallback({"ema": "exponential(2)"})


def a_name_that_is_no_folder(_: Path) -> None:
    AveragerCallback({"a/b": "uniform()"})


def a_name_that_is_too_long(_: Path) -> None:
    AveragerCallback({"x" * 61: "uniform()"})


def an_option_that_averagers_lack(_: Path) -> None:
    AveragerCallback(EMA, decay=0.9)


def a_cadence_that_is_none(_: Path) -> None:
    AveragerCallback(EMA, every=0)


BAD: list[tuple[Callable[[Path], None], type[Exception], str]] = [
    (
        two_of_one_name,
        ValueError,
        r"two callbacks of this training have files of the name 'ema': .*as in a mapping",
    ),
    (
        two_with_one_file,
        ValueError,
        r"files of the name 'a-b': one has the averages a-b, the other a, b; give",
    ),
    (a_set_named_like_an_average, ValueError, r"'eval_ema_loss' already.*give the average another"),
    (
        a_metric_named_like_an_average,
        ValueError,
        r"'eval_ema_loss' already.*give the average another",
    ),
    (
        metrics_of_two_averages_that_meet,
        ValueError,
        r"'ema_slow_loss' is a metric of the average 'ema'.*metric of 'ema_slow': give",
    ),
    (another_model, RuntimeError, r"not the model that was trained.*remove_callback"),
    (another_model_saved, RuntimeError, r"not the model that was trained.*remove_callback"),
    (new_weights, RuntimeError, r"(?s)not the tensors that.*more.weight"),
    (best_by_an_average_that_no_one_evaluates, ValueError, r"call attach\(trainer\)"),
    (two_trainers, ValueError, r"attached to another Trainer.*deepcopy"),
    (
        another_object,
        TypeError,
        r"attach: trainer is of type transformers.Bert\w+, wanted transformers.Trainer",
    ),
    (deepspeed, ValueError, r"DeepSpeed keeps the weights.*use FSDP2"),
    (a_start_that_is_no_step, ValueError, r"start is -1, wanted"),
    (a_rule_that_does_not_parse, ValueError, r"decay"),
    (a_name_that_is_no_folder, ValueError, r"'a/b', wanted one without a slash"),
    (a_name_that_is_too_long, ValueError, r"wanted one of at most 60 characters"),
    (an_option_that_averagers_lack, TypeError, r"decay"),
    (a_cadence_that_is_none, ValueError, r"every is 0, wanted an integer >= 1"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), BAD, ids=[each[0].__name__ for each in BAD])
def test_what_is_wrong_is_an_error_with_its_cure(
    wrong: Callable[[Path], None], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        wrong(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_of_a_callback_averages_another_training(
    copied: Callable[[AveragerCallback], AveragerCallback], tmp_path: Path
) -> None:
    steps = Steps()
    first = averaged(one := tiny.trainer(tmp_path / "1", callbacks=[steps]), start=1, every=2)
    one.train()
    twin = copied(first)
    assert twin.averager is None
    twin.attach(two := tiny.trainer(tmp_path / "2"))
    two.train()
    assert_same(average_of(twin), average_of(first))
    by_hand = {name: tensor.clone() for name, tensor in steps.taken[0].items()}
    averager = polyak.Averager(by_hand, EMA, every=2)
    for taken in steps.taken[1:]:
        for name, tensor in taken.items():
            by_hand[name].copy_(tensor)
        averager.update()
    assert_same(average_of(first), averager.average("ema"))


@pytest.mark.slow
def test_two_callbacks_average_and_save_side_by_side(tmp_path: Path) -> None:
    steps = Steps()
    one = tiny.trainer(tmp_path, callbacks=[steps])
    first, second = averaged(one), averaged(one, {"other": "exponential(0.5)"}, start=1)
    one.train()
    assert_close(average_of(first), ema(steps.taken, DECAY))
    assert_close(average_of(second, "other"), ema(steps.taken[1:], 0.5))
    logged = {key for e in one.state.log_history for key in e if key.endswith("_loss")}
    assert logged == {"train_loss", "eval_loss", "eval_ema_loss", "eval_other_loss"}
    made = {path.name for path in (tmp_path / f"checkpoint-{tiny.STEPS}/averages").iterdir()}
    assert made == {"ema", "ema.safetensors", "other", "other.safetensors"}


@pytest.mark.slow
def test_options_of_an_evaluation_reach_every_average(tmp_path: Path) -> None:
    class Told(Trainer):
        def evaluate(self, *args: Any, told: str = "", **kwargs: Any) -> dict[str, float]:
            heard.append((told, kwargs.get("metric_key_prefix", "eval")))
            return super().evaluate(*args, **kwargs)

    heard: list[tuple[str, str]] = []
    averaged(one := tiny.trainer(tmp_path, kind=Told, max_steps=2))
    one.train()
    heard.clear()
    cast(Told, one).evaluate(told="it")
    assert heard == [("it", "eval"), ("it", "eval_ema")]


@pytest.mark.slow
def test_a_callback_that_is_removed_is_forgotten(tmp_path: Path) -> None:
    callback = averaged(one := tiny.trainer(tmp_path, max_steps=2))
    one.train()
    one.remove_callback(callback)
    one.model = tiny.bert()
    assert "eval_ema_loss" not in one.evaluate()


@pytest.mark.slow
def test_several_ranks_train_with_averages(tmp_path: Path) -> None:
    require_laws(trainer_ranks.__file__, trainer_ranks.LAWS, 2, tmp_path)


DOCS = Path(__file__).parents[1] / "docs" / "transformers.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_code_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, peft, accelerate = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    sets = {"train": Sentences(24), "held_out": Sentences(8)}
    small = 'eval_steps=2, save_steps=2, use_cpu=True, num_train_epochs=1, report_to="none",'
    found: dict[str, Any] = {"model": tiny.bert(), **sets}
    exec(train.replace('    "run",', f'    "run", {small}'), found)
    assert found["trainer"].evaluate()["eval_ema_loss"] == found["trainer"].state.best_metric
    model = tiny.lora()
    model.save_pretrained("run/checkpoint-500/averages/ema")
    loaded: dict[str, Any] = {"PeftModel": PeftModel, "base": tiny.bert()}
    exec(peft, loaded)
    assert_same(weights(loaded["model"]), weights(model))
    plain, seen = nn.Linear(2, 1), []
    carried: dict[str, Any] = {"model": plain, "optimizer": torch.optim.SGD(plain.parameters())}
    carried["train"] = lambda _, optimizer: optimizer.step()
    carried["evaluate"] = lambda model: seen.append(weights(model))
    exec(accelerate, carried)
    assert_same(seen[0], carried["averager"].average())
    assert_same(load_file(tmp_path / "ema" / "model.safetensors"), seen[0])
    carried["accelerator"].save_state("state")
    assert (tmp_path / "state" / "averages" / "ema.safetensors").exists()
