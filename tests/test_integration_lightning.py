"""The Lightning callback with the real Trainer, against a plain loop and against Lightning without it."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import load_model
from torch.nn.utils import prune

import polyak
from integration_contract import (
    EVERY,
    IN_AN_AVERAGE,
    LAWS,
    LR,
    MONITORED,
    RULES,
    STEPS,
    EvaluationError,
    Host,
    Outcome,
    evaluate,
)  # fmt: skip
from launching import launched
from lightning_modules import QUIET, WARNINGS, Busy, Fused, Module, expected, made, trainer_of
from patience import HANG
from polyak import Pull
from polyak.integrations.lightning import AveragerCallback

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]
ROOT = Path(__file__).parents[1]
RANKS = Path(__file__).with_name("lightning_ranks.py")


def host(
    folder: Path,
    *,
    until: int = STEPS,
    resume: bool = False,
    skip: bool = False,
    fails: bool = False,
    pull: Pull | None = None,
) -> Outcome:
    module = made(Module, IN_AN_AVERAGE if fails else math.inf)
    module.skip = skip
    metrics: list[dict[str, float]] = []

    def note(trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            found = {k: v.item() for k, v in trainer.callback_metrics.items()}
            names = ["live", *RULES]
            metrics.append({n: found["val_loss" + f"/{n}" * (n != "live")] for n in names})

    average = AveragerCallback(RULES, pull=pull)
    best = ModelCheckpoint(
        folder, monitor=f"val_loss/{MONITORED}", filename="{step}", save_last=True
    )
    amp = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    look = LambdaCallback(on_validation_end=note)
    trainer = trainer_of(average, best, look, epochs=until // EVERY, plugins=[amp] if skip else [])
    try:
        trainer.fit(module, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    except EvaluationError:
        assert fails
    assert average.averager is not None
    return Outcome(
        live=module.state_dict(),
        averages={name: average.averager.average(name) for name in RULES},
        count=average.averager.count,
        metrics=metrics,
        best=average.exported(best.best_model_path, MONITORED),
    )


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_contract(law: Callable[[Host, Path], None], tmp_path: Path) -> None:
    law(host, tmp_path)


def test_a_fused_optimizer_counts_no_skipped_step() -> None:
    average, module = AveragerCallback(RULES), made(Fused)
    module.skip = True
    amp = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    trainer_of(average, plugins=[amp], enable_checkpointing=False).fit(module)
    assert average.averager is not None and average.averager.count == STEPS - 1


@pytest.mark.slow
def test_training_is_the_same_as_without_the_callback() -> None:
    """Random numbers, progress, optimizer and metrics of the live weights do not depend on averages."""
    runs = []
    for callbacks in ([], [AveragerCallback(RULES)]):
        trainer = trainer_of(
            *callbacks, epochs=2, val_check_interval=0.5, enable_checkpointing=False
        )
        module = Busy()
        trainer.fit(module)
        runs.append((trainer, module))
    (one, without), (two, module) = runs
    for name, tensor in without.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    plain = one.callback_metrics
    assert {k: v for k, v in two.callback_metrics.items() if k in plain} == plain
    assert len(two.callback_metrics) > len(plain)
    states = [each._checkpoint_connector.dump_checkpoint() for each in (one, two)]
    assert states[0]["loops"] == states[1]["loops"]
    assert str(states[0]["optimizer_states"]) == str(states[1]["optimizer_states"])


class Found(Module):
    """What Lightning's finders set; the batches stay as they are."""

    batch_size, lr = 2, LR


BESIDE: dict[str, Callable[[], Any]] = {
    "BatchSizeFinder": lambda: BatchSizeFinder(max_trials=1, steps_per_trial=1),
    "LearningRateFinder": lambda: LearningRateFinder(num_training_steps=3, update_attr=False),
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=2),
    "GradientAccumulationScheduler": lambda: GradientAccumulationScheduler({1: 2}),
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.9),
}
"""Callbacks of Lightning that run the loops by themselves, or write weights."""


@pytest.mark.filterwarnings("ignore:.*lr_find.*|.*not enough points.*|.*Swapping.*|.*lr.*")
@pytest.mark.parametrize("first", [False, True], ids=["", "first"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("Batch")) for n in BESIDE]
)
def test_another_callback_of_lightning_does_what_it_does_alone(
    name: str, first: bool, tmp_path: Path
) -> None:
    """Before ours in the list and behind it, in `fit` and in `validate`; the metric is the average's."""
    runs = []
    for ours in ([], [AveragerCallback({"ema": "exponential(0.6)"})]):
        callbacks = [*ours, BESIDE[name]()]
        options = {"default_root_dir": tmp_path, "enable_checkpointing": False}
        trainer = trainer_of(*callbacks[:: 1 if first else -1], epochs=3, **options)
        module = made(Found)
        trainer.fit(module)
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
        runs.append((metrics, trainer.validate(module, verbose=False)[0], module.state_dict()))
    (fitted, validated, live), (both, again, after) = runs
    assert fitted.items() <= both.items() and validated.items() <= again.items()
    assert all(torch.equal(after[key], tensor) for key, tensor in live.items())
    (average,) = ours
    assert average.averager is not None
    wanted = pytest.approx(evaluate(average.averager.average()), rel=1e-5)
    assert again["val_loss/ema"] == wanted
    if name != "StochasticWeightAveraging":  # it re-estimates statistics after the last validation
        assert both["val_loss/ema"] == wanted


class Renamed(Module):
    def on_fit_start(self) -> None:
        prune.identity(self.body[0], "weight")


@pytest.mark.slow
def test_weights_are_pruned_as_without_the_callback() -> None:
    """The cure that its error names: the weight has the name that pruning gives it before."""
    left = []
    for ours in ([], [AveragerCallback({"ema": "exponential(0.6)"})]):
        module = made(Renamed)
        pruning = ModelPruning(
            "l1_unstructured", [(module.body[0], "weight")], make_pruning_permanent=False
        )
        trainer = trainer_of(*ours, pruning, enable_checkpointing=False)
        trainer.fit(module)
        left.append(module.state_dict())
    assert all(torch.equal(left[1][key], tensor) for key, tensor in left[0].items())
    average = ours[0].averager
    assert average is not None and "val_loss/ema" in trainer.callback_metrics
    mask = average.average("ema")[
        "body.0.weight_mask"
    ]  # of the last update, before the last pruning
    assert 0 < left[0]["body.0.weight_mask"].mean() < mask.mean() < 1


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_a_progress_bar_is_there_in_every_pass(kind: type[Any]) -> None:
    """The thread in which Rich draws needs it at any time."""
    bar, module = kind(refresh_rate=0), made()  # it starts no thread here
    seen, step = [], module.validation_step

    def noted(*args: Any) -> None:
        seen.append(module.trainer.progress_bar_callback is bar)
        step(*args)

    module.validation_step = noted
    options = {"enable_checkpointing": False, "enable_progress_bar": True}
    trainer = trainer_of(AveragerCallback(RULES), bar, epochs=2, **options)
    trainer.fit(module)
    sanity, batches_of_a_pass, epochs = 2, 2, 2
    assert seen == [True] * (sanity + batches_of_a_pass * epochs * (1 + len(RULES)))


@pytest.mark.slow
@pytest.mark.parametrize("separator", ["/", "@"])
def test_every_average_is_evaluated_as_the_live_weights_are(separator: str) -> None:
    """Lists, torchmetrics, groups of them, several loaders: each value is that of the weights it names."""
    average = AveragerCallback(RULES, separator=separator)
    seen: list[tuple[dict[str, Any], dict[str, float]]] = []

    def note(trainer: Trainer, module: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            assert average.averager is not None
            weights = {"": module.state_dict()}
            weights |= {separator + n: average.averager.average(n) for n in RULES}
            copies = {k: {n: t.clone() for n, t in w.items()} for k, w in weights.items()}
            seen.append((copies, {k: v.item() for k, v in trainer.callback_metrics.items()}))

    look = LambdaCallback(on_validation_end=note, on_test_end=note)
    options = {"enable_checkpointing": False, "num_sanity_val_steps": 0}
    trainer = trainer_of(average, look, epochs=2, **options)
    module = Busy()
    trainer.fit(module)
    returned = trainer.test(module, verbose=False)
    assert len(seen) == 3
    history: dict[str, list[dict[str, float]]] = {}
    for weights, metrics in seen:
        for suffix, state in weights.items():
            if suffix and metrics is seen[-1][1]:
                del history[suffix]  # another call of the Trainer; the module's own metrics go on
            history.setdefault(suffix, []).append(values := expected(state))
            values = {**values, "highest": max(each["list"] for each in history[suffix])}
            values["cat"] = fmean(each["cat"] for each in history[suffix])
            for name, value in values.items():
                metric, slash, index = name.partition("/")
                ends = "_epoch" * metric.endswith("_epoch")  # Lightning puts it last
                named = metric.removesuffix("_epoch") + suffix + ends + slash + index
                assert metrics[named] == pytest.approx(value, rel=1e-4), named
    flat = {name: value for each in returned for name, value in each.items()}
    assert (
        flat.keys() <= seen[-1][1].keys()
        and "loss@fast/dataloader_idx_1".replace("@", separator) in flat
    )
    assert all(seen[-1][1][name] == value for name, value in flat.items())
    assert module.lengths == [5] * 9


@pytest.mark.slow
@pytest.mark.parametrize(("law", "checks"), [("replicas", 4), ("sharded", 2)])
def test_ranks(law: str, checks: int, tmp_path: Path) -> None:
    """DistributedDataParallel and FSDP2 on two ranks."""
    out = tmp_path / "out"
    out.mkdir()
    with launched(RANKS, law, str(out), log=tmp_path / "log") as launch:
        assert launch.wait().count("checked") == checks


@pytest.mark.slow
def test_spawned_ranks(tmp_path: Path) -> None:
    """One process that lets Lightning start the ranks; it gets no averages back, but their files."""
    command = [sys.executable, str(RANKS), "spawned", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("checked") == 2


def blocks(title: str, kind: str = "python") -> list[str]:
    """The code under a title of the page."""
    page = (ROOT / "docs" / "lightning.md").read_text()
    return re.findall(
        rf"```{kind}\n(.*?)```", page.partition(f"## {title}\n")[2].partition("\n## ")[0], re.S
    )


@pytest.mark.slow
def test_the_lines_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("The Trainer of Lightning")
    scope: dict[str, Any] = {"model": (model := made())}
    settings = {**QUIET, "max_epochs": 4, "reload_dataloaders_every_n_epochs": 1}
    monkeypatch.setattr("lightning.pytorch.Trainer", partial(Trainer, **settings))
    exec(code.replace("max_epochs=4, ", ""), scope)
    fresh = made()
    load_model(fresh, scope["exported"])
    (got,) = scope["trainer"].test(model, ckpt_path="best", verbose=False)
    assert got["test_loss/ema"] == pytest.approx(evaluate(fresh.state_dict()), rel=1e-5)


@pytest.mark.slow
def test_the_configuration_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """LightningCLI takes a rule's text, and every option of `Averager`, and no other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls of it
    (text,) = blocks("The Trainer of Lightning", "yaml")
    config: dict[str, Any] = yaml.safe_load(text)
    config["trainer"] |= {**QUIET, "max_epochs": 1, "enable_checkpointing": False}
    (callback,) = config["trainer"]["callbacks"]
    given = callback["init_args"]

    def run() -> AveragerCallback:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", "config.yaml"])
        cli = LightningCLI(Module, save_config_callback=None, seed_everything_default=1)
        trainer: Any = cli.trainer
        (average,) = (c for c in trainer.callbacks if isinstance(c, AveragerCallback))
        return average

    averager = run().averager
    assert averager is not None and averager.count == EVERY
    assert {name: str(rule) for name, rule in averager.rules.items()} == given["rule"]
    assert averager.state_dict()["pull"] == "Pull(fraction=0.5, every=10, name='ema')"
    average = averager.average("ema")
    assert set(average) == {"body.0.weight", "body.0.bias", "body.3.weight", "body.3.bias"}
    assert {tensor.dtype for tensor in average.values()} == {torch.float64}
    given |= {"every": 2, "buffers": "copy", "rounding": "nearest", "device": "cpu", "start": 1}
    given["pull"] = {"fraction": 1.0}
    given |= {"rule": {"class_path": "polyak.Exponential", "init_args": {"decay": 0.5}}}
    averager = run().averager
    assert averager is not None and (averager.count, averager.every) == (1, 2)
    assert averager.rule == polyak.Exponential(0.5)
    given["evry"] = 2
    with pytest.raises(SystemExit):
        run()
    assert "Option 'evry' is not accepted" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "digits_lightning.py")]
    command += ["--out", str(tmp_path), "--epochs", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"(live|ema): test loss ([.\d]+), accuracy ([.\d]+)", done.stdout)
    assert [name for name, _, _ in found] == ["live", "ema"]
    assert all(float(accuracy) > 0.8 for _, _, accuracy in found)
    assert (tmp_path / "best.ema.safetensors").exists() and (tmp_path / "best.ckpt").exists()
