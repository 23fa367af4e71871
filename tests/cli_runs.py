"""A finished run as the command line's tests find it: checkpoints, averages, snapshots, a judge."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import polyak
from polyak import Averager, Recorder
from polyak.cli import app

STEPS = 2000
CHECKPOINTS = (500, 1000, 2000)  # step-1.pt, step-2.pt, step-3.pt
JUDGE = '''
import sys

import torch

best = torch.load("best.pt")


def loss(weights):
    """The distance from some weights."""
    return float((weights["0.weight"] - best).norm())


def broken(weights):
    return weights["no such tensor"]


def silent(weights):
    return None


def leaves(weights):
    sys.exit(0)
'''


def run(*arguments: object) -> Any:
    """What `polyak ARGUMENTS` prints and its exit code."""
    return CliRunner().invoke(app, [str(each) for each in arguments], prog_name="polyak")


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))


@torch.no_grad()
def moved(live: nn.Module, step: int) -> None:
    """A step of a noisy run: towards a point, and a random walk."""
    for parameter in live.parameters():
        parameter.add_(0.01 * (1 - parameter) + 0.05 * torch.randn(parameter.shape))
    statistics = live[1]  # type: ignore[index]
    statistics.running_mean.fill_(step / STEPS)
    statistics.num_batches_tracked.fill_(step)


def finished_run(folder: Path) -> None:
    """Fills a folder with what the examples of `polyak --help` name."""
    live = model()
    both = {"fast": "power(relative_std=0.05)", "slow": "power(relative_std=0.1)"}
    tracked = Averager(live, both)
    one = Averager(live, "exponential(half_life=100)")
    recorder = Recorder(tracked, folder / "snapshots", every=50)
    for step in range(1, STEPS + 1):
        moved(live, step)
        tracked.update()
        one.update()
        recorder.update()
        if step in CHECKPOINTS:
            torch.save(live.state_dict(), folder / f"step-{CHECKPOINTS.index(step) + 1}.pt")
    polyak.save(folder / "average.safetensors", one)
    polyak.save(folder / "both.safetensors", tracked)
    torch.save({"model": live.state_dict(), "ema": one.average()}, folder / "ema.pt")
    torch.save(one.average()["0.weight"], folder / "best.pt")
    (folder / "judge.py").write_text(JUDGE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    finished_run(folder)
    return folder


@pytest.fixture(autouse=True)
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, as the current directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
