"""An average of a part of a model: the rest comes from the live weights, and that is said.

A new layout joins `FILES` by one line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import polyak
from cli_runs import run
from polyak import Averager, checkpoints, offline

Weights = dict[str, Tensor]


def live() -> Weights:
    return {"a.weight": torch.ones(3, 3), "b.weight": torch.ones(3), "n": torch.tensor(7)}


def marked(mark: str) -> Callable[[Weights], object]:
    return lambda part: {"state_dict": {**live(), **{mark.format(n): t for n, t in part.items()}}}


FILES: dict[str, Callable[[Weights], object]] = {
    "a submodule": marked("ema.{}"),
    "a submodule of a submodule": marked("model_ema.module.{}"),
    "beside the tensors": marked("{}_ema"),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_tensors_that_are_live_weights_are_named(kind: str, tmp_path: Path) -> None:
    part = {"a.weight": torch.zeros(3, 3)}
    if kind == "beside the tensors":  # few of them are no average
        part = {"a.weight": torch.zeros(3, 3), "b.weight": torch.zeros(3)}
    torch.save(FILES[kind](part), tmp_path / "some.ckpt")
    found = checkpoints.read(tmp_path / "some.ckpt")
    (name,) = found.averages
    wanted = ["b.weight"] if len(part) == 1 else []
    assert found.from_live(name) == wanted
    assert offline.describe(found).averages[name].from_live == tuple(wanted)
    said = f"{name}: 1 of 3 tensors are live weights, because"
    for command in (["inspect"], ["export"]):
        out = [str(tmp_path / "out.safetensors")] if command == ["export"] else []
        result = run(*command, str(tmp_path / "some.ckpt"), *out)
        assert (said in result.stdout + result.stderr) is bool(wanted)


def test_whole_averages_have_none_from_the_live_weights(tmp_path: Path) -> None:
    """Also where live weights and average are equal: they are stored twice."""
    model = nn.Linear(3, 3)
    averager = Averager(model, "exponential(0.5)")
    averager.update()
    polyak.save(tmp_path / "ours.safetensors", averager)
    whole = {f"ema.{name}": tensor.clone() for name, tensor in live().items()}
    torch.save({**live(), **whole}, tmp_path / "whole.pt")
    for file in ("ours.safetensors", "whole.pt"):
        found = checkpoints.read(tmp_path / file)
        assert [found.from_live(name) for name in found.averages] == [[]]
