"""The examples of one screen, cut short: what they write is the average that they name."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetRegressor  # type: ignore[import-untyped]
from skorch.callbacks import Callback  # type: ignore[import-untyped]
from skorch.dataset import ValidSplit  # type: ignore[import-untyped]
from torch import nn

from models import assert_same
from patience import HANG
from polyak import checkpoints

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ["diffusion_digits", "keras_digits", "skorch_digits", "trl_sft"]
"""Those of one screen: fewer than 60 lines."""


def run(name: str, *arguments: object) -> str:
    """What an example prints."""
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=offline)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", SHORT)
def test_an_example_is_one_screen(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.slow
def test_diffusion(tmp_path: Path) -> None:
    found = re.findall(r"(\w+): held-out loss ([.\d]+)", run("diffusion_digits", 40, tmp_path))
    assert [name for name, _ in found] == ["live", "ema"]
    assert all(0 < float(loss) < 1 for _, loss in found)  # 1 is the loss of no prediction at all
    state = checkpoints.read(tmp_path / "state" / "averages" / "ema.safetensors")
    wanted = {"ema": dict(state.average("ema").items())}
    wanted["live"] = load_file(tmp_path / "state" / "model.safetensors")
    for name, weights in wanted.items():
        unet = UNet2DModel.from_pretrained(tmp_path / name, subfolder="unet")
        assert_same(dict(unet.state_dict()), weights)
    assert not torch.equal(wanted["ema"]["conv_in.weight"], wanted["live"]["conv_in.weight"])


@pytest.mark.slow
def test_skorch() -> None:
    printed = re.sub(r"\x1b\[\d+m", "", run("skorch_digits", 3))
    title = re.search(r"epoch +.*", printed)
    assert title is not None
    columns = title.group().split()
    rows = [line.split() for line in re.findall(r"^ +\d+ +[\d. ]+$", printed, re.MULTILINE)]
    losses = [
        [float(row[columns.index(name)]) for name in ("valid_loss", "ema_loss")] for row in rows
    ]
    assert len(losses) == 3
    assert all(live < ema for live, ema in losses)  # the average lags
    assert losses[2][1] < losses[1][1] < losses[0][1]
    found = re.findall(r"(\w+): test accuracy ([.\d]+)", printed)
    assert [name for name, _ in found] == ["live", "ema"]
    assert all(float(accuracy) > 0.7 for _, accuracy in found)


class Doubled(nn.Module):
    """A network of one weight, whose average is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.weight


class Steps(Callback):  # type: ignore[misc]
    """The weights after each step."""

    def __init__(self) -> None:
        self.taken_: list[float] = []  # skorch clones a net by the names without an underscore

    def on_batch_end(self, net: Any, training: bool = False, **_: Any) -> None:
        if training:
            self.taken_.append(net.module_.weight.item())


@pytest.mark.slow
def test_the_callback_of_skorch_in_other_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search, `partial_fit`, no validation, a copy of the net: `uniform()` is the mean of the steps' weights."""
    monkeypatch.setattr(sys, "argv", ["", "1"])
    monkeypatch.syspath_prepend(EXAMPLES)
    average, steps = import_module("skorch_digits").Average("uniform()"), Steps()
    net = NeuralNetRegressor(
        Doubled, lr=0.1, batch_size=4, max_epochs=2, verbose=0, callbacks=[average, steps]
    )
    inputs = torch.linspace(-1, 1, 20).unsqueeze(1).numpy()
    for count, call in ((8, net.fit), (16, net.partial_fit)):
        call(inputs, 3 * inputs)
        assert average.averager_.count == len(steps.taken_) == count
        assert average.averager_.average()["weight"].item() == pytest.approx(fmean(steps.taken_))
    for copied in (copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))):
        twin = copied(net)
        dict(twin.callbacks_)["Average"].averager_.copy_to(twin.module_)
        assert twin.module_.weight.item() == pytest.approx(fmean(steps.taken_))
    net.set_params(train_split=None)
    assert "ema_loss" not in net.fit(inputs, 3 * inputs).history[-1]
    net.set_params(train_split=ValidSplit(2))
    search = GridSearchCV(net, {"lr": [0.01, 0.1]}, cv=2, scoring="neg_mean_squared_error")
    best = search.fit(inputs, 3 * inputs).best_estimator_
    assert dict(best.callbacks_)["Average"].averager_.count == 2 * 3


@pytest.mark.slow
def test_keras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has the metrics of the average, and trainable weights are those of Keras's own average."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))  # where it writes its configuration
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("keras_process.py"))]
    command += [str(EXAMPLES / "keras_digits.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(re.findall(r"^(\w+): (.*)$", done.stdout, re.MULTILINE))
    assert list(found) == ["live", "ema", "file", "steps", "own"]
    assert int(found["steps"]) == 10
    assert found["file"] == found["ema"] != found["live"]
    assert float(found["ema"].rpartition(" ")[2]) > 0.8
    assert float(found["own"]) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_trl(tmp_path: Path) -> None:
    """The loss that is printed is the one of the log in which the average was best."""
    (loss, step) = re.findall(
        r"best average: loss ([.\d]+), of step (\d+)", run("trl_sft", 40, tmp_path)
    )[0]
    state = json.loads((tmp_path / "checkpoint-40" / "trainer_state.json").read_text())
    found = {e["step"]: e["eval_ema_loss"] for e in state["log_history"] if "eval_ema_loss" in e}
    assert min(found, key=found.__getitem__) == int(step)
    assert float(loss) == pytest.approx(found[int(step)], abs=1e-3)
