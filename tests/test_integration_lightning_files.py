"""The Lightning callback: checkpoints and the files beside them, steps, several runs, bad input."""

from __future__ import annotations

import copy
import pickle
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as other
import torch
import torch._dynamo
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from safetensors.torch import load_file, load_model
from tensorboard.backend.event_processing.event_file_loader import (  # type: ignore[import-untyped]
    EventFileLoader,
)
from tensorboard.plugins.hparams import plugin_data_pb2  # type: ignore[import-untyped]

from integration_contract import (
    EVERY,
    IN_AN_AVERAGE,
    LR,
    MOMENTUM,
    RULES,
    STEPS,
    EvaluationError,
    Net,
    batches,
    evaluate,
    held_out,
    loss,
    net,
    plain,
)
from lightning_modules import QUIET, WARNINGS, Module, loader, made, trainer_of
from polyak import Averager, theory
from polyak.integrations.lightning import AveragerCallback

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(text) for text in WARNINGS)]
BEST = 2 * EVERY + EVERY  # the step at which `fast` is best, as the contract checks


def averages(callback: AveragerCallback) -> dict[str, dict[str, torch.Tensor]]:
    assert callback.averager is not None
    return {name: callback.averager.average(name) for name in callback.names}


def require_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_live_weights_and_the_averages_lie_beside(
    tmp_path: Path, weights_only: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with `save_weights_only`; what Lightning removes, and links, takes its averages along."""
    average = AveragerCallback(RULES)
    best = ModelCheckpoint(
        tmp_path, monitor="val_loss/fast", filename="{step}", save_weights_only=weights_only
    )
    each = ModelCheckpoint(tmp_path / "each", save_top_k=-1, filename="{step}")
    trainer, module = trainer_of(average, best, each), made()
    caplog.set_level("INFO")
    trainer.fit(module)
    assert Path(best.best_model_path).name == f"step={BEST}.ckpt"
    assert f"step={BEST}.fast.safetensors is the average that was best" in caplog.text
    names = {f"step={BEST}.ckpt", *(f"step={BEST}.{name}.safetensors" for name in RULES)}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == names
    assert len(list((tmp_path / "each").iterdir())) == STEPS // EVERY * 3
    for step in range(EVERY, STEPS + 1, EVERY):
        path, wanted = tmp_path / "each" / f"step={step}.ckpt", plain(step)
        require_equal(torch.load(path, weights_only=True)["state_dict"], wanted.live)
        require_equal(Module.load_from_checkpoint(path).state_dict(), wanted.live)
        for name in RULES:
            require_equal(load_file(average.exported(path, name)), wanted.averages[name])
    fresh = made()
    load_model(fresh, average.exported(best.best_model_path, "fast"))
    require_equal(fresh.state_dict(), plain(BEST).averages["fast"])
    assert best.best_model_score == pytest.approx(evaluate(fresh.state_dict()))
    require_equal(
        torch.load(best.best_model_path, weights_only=True)["state_dict"], plain(BEST).live
    )


def test_a_link_to_the_last_checkpoint_finds_its_averages(tmp_path: Path) -> None:
    average = AveragerCallback(RULES)
    last = ModelCheckpoint(tmp_path, save_last="link", filename="{step}")
    trainer, module = trainer_of(average, last), made()
    trainer.fit(module)
    assert Path(last.last_model_path).is_symlink()
    for name in RULES:
        exported = load_file(average.exported(last.last_model_path, name))
        require_equal(exported, plain().averages[name])
    (got,) = trainer.test(module, ckpt_path="last", verbose=False, weights_only=True)
    assert got["test_loss/fast"] == pytest.approx(evaluate(plain().averages["fast"]))


def test_a_checkpoint_by_hand_and_one_average(tmp_path: Path) -> None:
    average = AveragerCallback("exponential(0.6)")
    trainer, module = trainer_of(average, enable_checkpointing=False), made()
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    assert average.exported(tmp_path / "final.ckpt") == tmp_path / "final.average.safetensors"
    require_equal(load_file(tmp_path / "final.average.safetensors"), plain().averages["fast"])
    named = AveragerCallback({"ema": "uniform()"})
    assert named.exported(tmp_path / "final.ckpt") == tmp_path / "final.ema.safetensors"


def test_monitors_see_the_metrics_of_averages() -> None:
    """EarlyStopping by the average alone: `fast` improves by less than 0.1 at the third evaluation."""
    stop = EarlyStopping("val_loss/fast", min_delta=0.1, patience=1)
    trainer = trainer_of(AveragerCallback(RULES), stop, enable_checkpointing=False)
    trainer.fit(made())
    assert trainer.global_step == 3 * EVERY


class Loaders(Module):
    """It logs in every way by which Lightning changes a metric's name, and one that looks like an average's."""

    def training_step(self, batch: Any, number: int) -> Any:
        found = super().training_step(batch, number)
        self.log("train_ema_slow", found.detach(), on_epoch=True, on_step=False)
        return found

    def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> None:
        value = loss(self, batch)
        self.log("loss", value)
        self.log("both", value, on_step=True, on_epoch=True)
        if dataloader_idx == 0:
            self.log("top_epoch", value, add_dataloader_idx=False)

    def val_dataloader(self) -> Any:
        return [loader(held_out()), loader(held_out())]


WHOSE = {
    "loss_ema_slow/dataloader_idx_0": "ema_slow",
    "loss_slow/dataloader_idx_1": "slow",
    "both_ema_slow_epoch/dataloader_idx_0": "ema_slow",
    "both_slow/dataloader_idx_1": "slow",
    "top_epoch_slow": "slow",
    "train_ema_slow": None,
    "both_epoch/dataloader_idx_0": None,
}
"""A metric that decides which checkpoint is the best, and the average that it is of."""


@pytest.mark.parametrize("apart", [False, True], ids=["one callback", "two callbacks"])
def test_one_line_for_each_metric_of_an_average_says_what_was_best(
    apart: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["slow", "ema_slow"]
    groups = [[name] for name in names] if apart else [names]
    ours = [AveragerCallback(dict.fromkeys(each, ONE), separator="_") for each in groups]
    bests = [
        ModelCheckpoint(tmp_path / str(i), monitor=metric, filename="best")
        for i, metric in enumerate(WHOSE)
    ]
    caplog.set_level("INFO")
    trainer_of(*ours, *bests, epochs=1).fit(made(Loaders))
    lines = [line for line in caplog.messages if line.startswith("best ")]
    told = {
        f"best {metric}: {tmp_path / str(i) / f'best.{name}.safetensors'} is the average that was best; "
        f"{tmp_path / str(i) / 'best.ckpt'} has the live weights of that step, and the averages' state"
        for i, (metric, name) in enumerate(WHOSE.items())
        if name is not None
    }
    assert sorted(lines) == sorted(told)


def test_a_run_that_resumes_after_the_last_validation_says_what_was_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(epochs: int, start: str | None, **options: Any) -> list[str]:
        best = ModelCheckpoint(tmp_path, monitor="val_loss_ema_slow", filename="best", save_last=True)  # fmt: skip
        ours = AveragerCallback({"slow": ONE, "ema_slow": ONE}, separator="_")
        caplog.clear()
        trainer_of(ours, best, epochs=epochs, **options).fit(made(), ckpt_path=start)
        return [line for line in caplog.messages if line.startswith("best ")]

    caplog.set_level("INFO")
    told = run(1, None)
    assert told and "best.ema_slow.safetensors is the average" in told[0]
    assert run(2, "last", check_val_every_n_epoch=5) == told


def test_a_test_of_the_best_checkpoint_evaluates_its_averages(tmp_path: Path) -> None:
    """In the same process, and in another with a new callback."""
    average = AveragerCallback(RULES)
    best = ModelCheckpoint(tmp_path, monitor="val_loss/fast", filename="{step}")
    trainer, module = trainer_of(average, best), made()
    trainer.fit(module)
    wanted = {"test_loss": evaluate(plain(BEST).live)}
    wanted |= {f"test_loss/{n}": evaluate(plain(BEST).averages[n]) for n in RULES}
    path = best.best_model_path
    for runner in (trainer, trainer_of(AveragerCallback(RULES), enable_checkpointing=False)):
        (got,) = runner.test(made(), ckpt_path=path, verbose=False, weights_only=True)
        assert got == pytest.approx(wanted, rel=1e-5)


def test_no_average_is_seen_before_there_is_one() -> None:
    """Neither `validate` before the training, nor the sanity check of any fit, sees an average."""
    average = AveragerCallback(RULES)
    trainer, module = trainer_of(average, epochs=2, enable_checkpointing=False), made()
    (got,) = trainer.validate(module, verbose=False)
    assert list(got) == ["val_loss"]
    passes: list[bool] = []
    step = module.validation_step

    def noted(*args: Any) -> None:
        passes.append(trainer.sanity_checking)
        step(*args)

    module.validation_step = noted
    for epochs in (2, 4):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module)
    assert passes == 2 * ([True] * 2 + [False] * 2 * 2 * 3)


def test_start_is_the_number_of_steps_before_the_first_update(tmp_path: Path) -> None:
    average = AveragerCallback("exponential(0.6)", start=5)
    never = AveragerCallback({"never": "uniform()"}, start=100)
    trainer, module = trainer_of(average, never, default_root_dir=tmp_path), made()
    trainer.fit(module)
    require_equal(module.state_dict(), plain().live)
    assert average.averager is not None and average.averager.count == STEPS - 5
    model = net()
    steps, wanted = torch.optim.SGD(model.parameters(), LR, 0.5), None
    for number, batch in enumerate(batches()):
        torch.nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        steps.step()
        steps.zero_grad()
        if number == 5:
            wanted = Averager(model, "exponential(0.6)")
        if wanted is not None:
            wanted.update()
    assert wanted is not None
    require_equal(average.averager.average(), wanted.average())
    assert never.averager is not None and never.averager.count == 0
    assert not any("never" in name for name in trainer.callback_metrics)
    assert not list(tmp_path.rglob("*never*"))


class Two(Module):
    """Two optimizers by hand: the second steps in every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, number: int) -> None:
        optimizers: Any = self.optimizers()
        first, second = optimizers
        super().training_step(batch, number).backward()
        first.step()
        if number % 2 == 0:
            second.step()
        first.zero_grad()
        second.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.body[i].parameters(), lr=LR) for i in (0, 3)]


class Gan(Two):
    """Each optimizer in turn, while the other's parameters need no gradient."""

    def training_step(self, batch: Any, number: int) -> None:
        optimizers: Any = self.optimizers()
        for each in optimizers:
            self.toggle_optimizer(each)
            Module.training_step(self, batch, number).backward()
            each.step()
            each.zero_grad()
            self.untoggle_optimizer(each)


class First(Two):
    """The second optimizer takes no step."""

    def training_step(self, batch: Any, number: int) -> None:
        optimizers: Any = self.optimizers()
        first, _ = optimizers
        Module.training_step(self, batch, number).backward()
        first.step()
        first.zero_grad()


def test_an_average_that_waits_for_an_optimizer_is_told() -> None:
    for kind, told in ((First, True), (Two, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = trainer_of(AveragerCallback(RULES), epochs=2, enable_checkpointing=False)
            trainer.fit(made(kind))
        texts = [str(each.message) for each in caught]
        assert any("waits until each of them has stepped" in text for text in texts) == told
        assert ("val_loss/fast" in trainer.callback_metrics) != told


@pytest.mark.parametrize(
    ("kind", "options", "rules", "count"),
    [
        (Module, {"accumulate_grad_batches": 2}, {}, 8),  # the last of an epoch's three counts too
        (Module, {}, {"every": 4}, 3),
        (Two, {}, {"select": "body.0.*"}, 12),
        (Two, {}, {"select": "body.3.*"}, 8),
        (Gan, {}, {}, 12),
        (Two, {}, {}, 8),  # an update follows when each optimizer has stepped
    ],
)
def test_optimizer_steps_are_counted(
    kind: Any, options: dict[str, Any], rules: dict[str, Any], count: int
) -> None:
    average = AveragerCallback("uniform()", **rules)
    trainer_of(average, enable_checkpointing=False, **options).fit(made(kind))
    assert average.averager is not None and average.averager.count == count


def test_two_callbacks(tmp_path: Path) -> None:
    one, two = (AveragerCallback({name: rule}) for name, rule in RULES.items())
    best = ModelCheckpoint(tmp_path, monitor="val_loss/fast", filename="{step}")
    trainer, module = trainer_of(one, two, best), made()
    trainer.fit(module)
    require_equal(averages(one)["fast"], plain().averages["fast"])
    require_equal(averages(two)["slow"], plain().averages["slow"])
    wanted = {"val_loss": plain().metrics[-1]["live"]}
    wanted |= {f"val_loss/{name}": plain().metrics[-1][name] for name in RULES}
    got = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert got == pytest.approx(wanted, rel=1e-5)
    assert len(list(tmp_path.iterdir())) == 3
    again = [AveragerCallback({name: rule}) for name, rule in RULES.items()]
    trainer_of(*again, enable_checkpointing=False).fit(
        made(), ckpt_path=best.best_model_path, weights_only=True
    )
    require_equal(averages(again[1])["slow"], plain().averages["slow"])


def test_ctrl_c_in_a_validation_leaves_the_live_weights(tmp_path: Path) -> None:
    average = AveragerCallback(RULES)
    trainer, module = trainer_of(average, default_root_dir=tmp_path), made()
    step = module.validation_step

    def interrupted(*args: Any) -> None:
        if average.averager is not None:
            assert not torch.equal(module.body[0].weight, plain(EVERY).live["body.0.weight"])
            signal.raise_signal(signal.SIGINT)
        step(*args)

    module.validation_step = interrupted
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            trainer.fit(module)
    finally:
        signal.signal(signal.SIGINT, handler)
    require_equal(module.state_dict(), plain(EVERY).live)
    require_equal(averages(average)["fast"], plain(EVERY).averages["fast"])


def test_fit_again_goes_on_and_another_model_begins_anew() -> None:
    average = AveragerCallback(RULES)
    trainer, module = trainer_of(average, epochs=2, enable_checkpointing=False), made()
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module)
    assert average.averager is not None and average.averager.count == STEPS
    trainer.fit_loop.max_epochs = 5
    trainer.fit(made())
    assert average.averager is not None and average.averager.count == EVERY
    require_equal(averages(average)["slow"], plain(EVERY).averages["slow"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_the_callback_has_its_averages(
    copied: Callable[[Any], Any], tmp_path: Path
) -> None:
    average = AveragerCallback(RULES)
    fitted(tmp_path, average)
    again = copied(copied(average))
    (got,) = trainer_of(again, enable_checkpointing=False).validate(made(), verbose=False)
    wanted = plain(2 * EVERY).metrics[-1]
    assert [got[f"val_loss/{name}"] for name in RULES] == pytest.approx([wanted[n] for n in RULES])
    require_equal(averages(average)["slow"], averages(again)["slow"])


def test_hyper_parameters_say_what_is_averaged(tmp_path: Path) -> None:
    average = AveragerCallback({"ema": "exponential(0.6)"}, every=2)
    logger = CSVLogger(tmp_path)
    trainer_of(average, logger=logger, enable_checkpointing=False, log_every_n_steps=1).fit(made())
    told = logger.experiment.hparams
    seen = theory.explain("exponential(0.6)", STEPS, every=2)
    assert told["ema/rule"] == "exponential(0.6)"
    assert (told["ema/half_life"], told["ema/mean_age"]) == (seen.half_life, seen.mean_age)


def test_tensorboard_has_the_module_s_hyper_parameters_too(tmp_path: Path) -> None:
    """It shows what was logged last, so this has both."""

    class Known(Module):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"width": 6, "nested": {"depth": 1}})

    logger = TensorBoardLogger(tmp_path)
    average = AveragerCallback({"ema": ONE})
    trainer_of(average, logger=logger, enable_checkpointing=False, log_every_n_steps=1).fit(
        made(Known)
    )
    (path,) = tmp_path.rglob("events*")
    events = list(EventFileLoader(str(path)).Load())
    contents = [v.metadata.plugin_data.content for event in events for v in event.summary.value]
    plugins = [plugin_data_pb2.HParamsPluginData.FromString(each) for each in contents]
    told = [p.session_start_info.hparams for p in plugins if p.HasField("session_start_info")][-1]
    assert told["ema/half_life"].number_value == theory.explain(ONE, STEPS).half_life
    assert (told["width"].number_value, told["nested/depth"].number_value) == (6, 1)


class Once(CSVLogger):
    """A logger that refuses another value of what it has already, as MLflow's does."""

    def log_hyperparams(self, params: Any = None) -> None:
        had = self.experiment.hparams
        if changed := [name for name, value in params.items() if had.get(name, value) != value]:
            raise ValueError(f"changing {changed} is not allowed")
        super().log_hyperparams(params)


def test_a_tracker_that_refuses_hyper_parameters_ends_no_training(tmp_path: Path) -> None:
    logger, module = Once(tmp_path), made()
    average = AveragerCallback({"ema": "exponential(0.6)"})
    options: Any = {"logger": logger, "enable_checkpointing": False, "log_every_n_steps": 1}
    trainer_of(average, epochs=1, **options).fit(module)
    with pytest.warns(UserWarning, match=r"Once refused .*'ema/mean_age'.* is not allowed"):
        trainer_of(average, epochs=2, **options).fit(module)
    assert average.averager is not None and average.averager.count == 3 * EVERY
    assert logger.experiment.hparams["ema/mean_age"] == theory.explain(ONE, EVERY).mean_age


def test_a_trial_run_and_no_validation() -> None:
    for options in ({"fast_dev_run": True, "logger": True}, {"limit_val_batches": 0}):
        average = AveragerCallback(RULES)
        trainer_of(average, **options, enable_checkpointing=False).fit(made())
        assert average.averager is not None
        assert average.averager.count == (1 if "fast_dev_run" in options else STEPS)


@pytest.mark.filterwarnings(r"ignore:.*\.fit\(ckpt_path=")
def test_a_run_resumes_from_the_checkpoint_of_its_failure(tmp_path: Path) -> None:
    """`OnExceptionCheckpoint` saves when an average's evaluation has failed: live weights, all updates."""
    average = AveragerCallback(RULES)
    with pytest.raises(EvaluationError):
        trainer_of(average, OnExceptionCheckpoint(tmp_path)).fit(made(Module, IN_AN_AVERAGE))
    path = tmp_path / "on_exception.ckpt"
    require_equal(torch.load(path, weights_only=True)["state_dict"], plain(EVERY).live)
    again = AveragerCallback(RULES)
    trainer_of(again, enable_checkpointing=False).fit(made(), ckpt_path=path, weights_only=True)
    for name in RULES:
        require_equal(averages(again)[name], plain().averages[name])


def test_no_checkpoint_is_saved_while_the_module_carries_an_average(tmp_path: Path) -> None:
    """It would have the average under the names of the live weights."""

    class Saving(Module):
        def validation_step(self, batch: Any, number: int) -> None:
            super().validation_step(batch, number)
            self.trainer.save_checkpoint(
                tmp_path / "step.ckpt", weights_only=self.trainer.current_epoch == 0
            )

    trainer, module = trainer_of(AveragerCallback(RULES), enable_checkpointing=False), made(Saving)
    with pytest.raises(RuntimeError, match=r"inside applied\('fast'\)"):
        trainer.fit(module)
    require_equal(
        torch.load(tmp_path / "step.ckpt", weights_only=True)["state_dict"], net().state_dict()
    )


def test_compiled_modules_are_not_compiled_anew_for_every_average() -> None:
    frames = []
    for callbacks in ([], [AveragerCallback(RULES)]):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = trainer_of(*callbacks, enable_checkpointing=False)
        trainer.fit(torch.compile(made(), backend="eager"))  # type: ignore[arg-type]
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert frames[1] <= frames[0]
    require_equal(averages(callbacks[0])["fast"], plain().averages["fast"])
    torch._dynamo.reset()


def fitted(folder: Path, *callbacks: Any, **options: Any) -> tuple[Trainer, Any]:
    trainer = trainer_of(*callbacks, ModelCheckpoint(folder, save_last=True, **options), epochs=2)
    module = made()
    trainer.fit(module)
    return trainer, module


def resume(folder: Path, *callbacks: Any) -> Trainer:
    trainer = trainer_of(*callbacks, enable_checkpointing=False)
    trainer.fit(made(), ckpt_path=folder / "last.ckpt", weights_only=True)
    return trainer


class WithoutOptimizer(Module):
    def training_step(self, batch: Any, number: int) -> None:
        """It trains nothing."""

    def configure_optimizers(self) -> None:
        """Lightning takes it, and warns."""


class Clashing(Module):
    def validation_step(self, batch: Any, number: int) -> None:
        super().validation_step(batch, number)
        self.log("val_loss/average", 0.0)


class Meeting(Module):
    def validation_step(self, batch: Any, number: int) -> None:
        super().validation_step(batch, number)
        self.log("val_loss_ema", 0.0)


ONE = "exponential(0.6)"
BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "an unknown option": (lambda _: AveragerCallback(ONE, evry=2), TypeError, "evry"),
    "a bad rule": (lambda _: AveragerCallback("mean()"), ValueError, "mean"),
    "a bad start": (lambda _: AveragerCallback(ONE, start=-1), ValueError, "start is -1, wanted"),
    "a bad cadence": (lambda _: AveragerCallback(ONE, every=0), ValueError, "every is 0, wanted"),
    "no separator": (lambda _: AveragerCallback(ONE, separator=""), ValueError, "separator is ''"),
    "no name of several": (
        lambda folder: AveragerCallback(RULES).exported(folder / "last.ckpt"),
        ValueError,
        "the average is None, wanted one of fast, slow",
    ),
    "an unknown name": (
        lambda folder: AveragerCallback({"ema": ONE}).exported(folder / "last.ckpt", "average"),
        ValueError,
        "the average is 'average', wanted one of ema",
    ),
    "the same callback twice": (
        lambda _: trainer_of(AveragerCallback(ONE), AveragerCallback(ONE)),
        RuntimeError,
        "AveragerCallback",
    ),
    "one name in two callbacks": (
        lambda _: trainer_of(AveragerCallback(RULES), AveragerCallback({"fast": ONE})).fit(made()),
        ValueError,
        "two callbacks have files of the name 'fast': .* averages fast, .*give .* other names",
    ),
    "one file of two callbacks": (
        lambda _: trainer_of(AveragerCallback(RULES), AveragerCallback({"fast-slow": ONE})).fit(
            made()
        ),
        ValueError,
        "two callbacks have files of the name 'fast-slow': .* averages fast-slow, .* fast, slow; give",
    ),
    "a metric of that name": (
        lambda _: trainer_of(AveragerCallback(ONE), enable_checkpointing=False).fit(made(Clashing)),
        ValueError,
        "'val_loss/average', wanted a name that no average has",
    ),
    "one metric of two averages": (
        lambda _: trainer_of(
            AveragerCallback({"slow": ONE, "ema_slow": ONE}, separator="_"),
            enable_checkpointing=False,
        ).fit(made(Meeting)),
        ValueError,
        "average '(ema_)?slow' is 'val_loss_ema_slow', wanted a name that no metric of .*rename",
    ),
    "pruned midway": (
        lambda folder: fitted(folder, AveragerCallback(ONE), ModelPruning("l1_unstructured")),
        RuntimeError,
        "(?s)missing: body.0.weight.*call prune.identity before",
    ),
    "no optimizer": (
        lambda _: trainer_of(AveragerCallback(ONE), enable_checkpointing=False).fit(
            made(WithoutOptimizer)
        ),
        ValueError,
        "configure_optimizers returned no optimizer, .* return one, or remove the AveragerCallback",
    ),
    "another model": (
        lambda folder: fitted(folder, AveragerCallback(ONE))[0].test(made()),
        ValueError,
        "the averages belong to another model; pass ckpt_path to use those of a checkpoint",
    ),
    "another rule": (
        lambda folder: (
            fitted(folder, AveragerCallback(ONE)),
            resume(folder, AveragerCallback("exponential(0.7)")),
        ),
        ValueError,
        r"(?s)last.ckpt: load_state_dict: .*other rules.*pass change_rule=True",
    ),
    "another cadence": (
        lambda folder: (
            fitted(folder, AveragerCallback(ONE, every=2)),
            resume(folder, AveragerCallback(ONE)),
        ),
        ValueError,
        "last.ckpt: .*saved with every=2, this averager has every=1: .*take change_rule=True",
    ),
    "other weights": (
        lambda folder: (
            fitted(folder, AveragerCallback(ONE)),
            resume(folder, AveragerCallback(ONE, select="body.0.*")),
        ),
        ValueError,
        r"(?s)last.ckpt: .*the tensors differ(?!.*change_rule)",
    ),
    "a rule that needs other slots": (
        lambda folder: (
            fitted(folder, AveragerCallback(ONE)),
            resume(folder, AveragerCallback("window(3)", change_rule=True)),
        ),
        ValueError,
        r"last.ckpt: change_rule: .*needs",
    ),
    "another name": (
        lambda folder: (
            fitted(folder, AveragerCallback({"ema": ONE})),
            resume(folder, AveragerCallback({"mean": ONE})),
        ),
        ValueError,
        r"last.ckpt has the averages of AveragerCallback\(ema\), and none of AveragerCallback\(mean\)",
    ),
    "a checkpoint without averages": (
        lambda folder: (fitted(folder), resume(folder, AveragerCallback(ONE))),
        ValueError,
        "last.ckpt has no averages and is of step 6, .* pass start=6 to begin them here",
    ),
}


OTHER = {name: value for name, value in vars(Module).items() if not name.startswith("__")}
"""What the contract's module does, for a class of `pytorch_lightning`, which has Lightning's classes again."""


def test_modules_and_trainers_of_pytorch_lightning(tmp_path: Path) -> None:
    kind: Any = type("Other", (Net, other.LightningModule), OTHER)
    settings: Any = {**QUIET, "reload_dataloaders_every_n_epochs": 1, "enable_progress_bar": True}
    best = other.callbacks.ModelCheckpoint(tmp_path, "{step}", monitor="val_loss/fast")
    bar, average, seen = other.callbacks.TQDMProgressBar(0), AveragerCallback(RULES), set[bool]()
    trainer = other.Trainer(max_epochs=4, callbacks=[average, best, bar], **settings)  # type: ignore[list-item]
    module, step = made(kind), kind.validation_step

    def noted(*args: Any) -> None:
        seen.add(trainer.progress_bar_callback is bar)
        step(module, *args)

    module.validation_step = noted
    trainer.fit(module)
    require_equal(module.state_dict(), plain().live)
    for name in RULES:
        require_equal(averages(average)[name], plain().averages[name])
    exported = load_file(average.exported(best.best_model_path, "fast"))
    require_equal(exported, plain(BEST).averages["fast"])
    assert seen == {True}
    idle = type("Idle", (kind,), {"configure_optimizers": WithoutOptimizer.configure_optimizers})
    idle.training_step = WithoutOptimizer.training_step  # type: ignore[attr-defined]
    trainer = other.Trainer(max_epochs=1, callbacks=[AveragerCallback(RULES)], **settings)  # type: ignore[list-item]
    with (
        pytest.warns(UserWarning, match="no optimizer"),
        pytest.raises(ValueError, match="return one"),
    ):
        trainer.fit(made(idle))


@pytest.mark.parametrize(
    "kind",
    [
        DeepSpeedStrategy,
        FSDPStrategy,
        other.strategies.DeepSpeedStrategy,
        other.strategies.FSDPStrategy,
    ],
)
def test_strategies_that_hide_the_weights_are_refused(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither runs here, so the Trainer is given one that was not set up."""
    average = AveragerCallback(ONE)
    trainer = trainer_of(average, enable_checkpointing=False)
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", object.__new__(kind))
    with pytest.raises(ValueError, match=r"use ModelParallelStrategy \(FSDP2\)"):
        average.setup(trainer)


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer")
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_an_error_with_its_cure(what: str, tmp_path: Path) -> None:
    call, kind, words = BAD[what]
    with pytest.raises(kind, match=words):
        call(tmp_path)


def test_a_run_goes_on_with_another_rule(tmp_path: Path) -> None:
    """The cure that the error names: as `change_rule` of an averager in a plain loop."""
    fitted(tmp_path, AveragerCallback({"ema": ONE}))
    average = AveragerCallback({"ema": "exponential(0.7)"}, change_rule=True)
    resume(tmp_path, average)
    model = net()
    steps, wanted = torch.optim.SGD(model.parameters(), LR, MOMENTUM), Averager(model, ONE)
    for number, batch in enumerate(batches()):
        torch.nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        steps.step()
        steps.zero_grad()
        if number == 6:
            wanted.change_rule("exponential(0.7)")
        wanted.update()
    require_equal(averages(average)["ema"], wanted.average())
    assert average.averager is not None and average.averager.mixed


def test_an_average_can_begin_in_an_old_run(tmp_path: Path) -> None:
    """The cure that the error names."""
    fitted(tmp_path)
    average = AveragerCallback(ONE, start=6)
    resume(tmp_path, average)
    assert average.averager is not None and average.averager.count == 6


def test_a_test_of_weights_alone_warns(tmp_path: Path) -> None:
    """The averager still has the last averages, which are not those of the checkpoint."""
    trainer, module = fitted(tmp_path, AveragerCallback(RULES), save_weights_only=True)
    with pytest.warns(UserWarning, match="has no averages: only live weights are evaluated"):
        (got,) = trainer.test(module, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert list(got) == ["test_loss"]
