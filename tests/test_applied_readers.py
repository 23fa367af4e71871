"""Calls inside a block of another averager: what they read of the live weights is no average.

Each call gives what it gives outside of the block, or is refused. A call joins `CALLS` by one line, and
a block that swaps other kinds of tensors joins `BLOCKS`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from models import assert_same, snapshot, wander
from polyak import EMA, Averager, Bema, Exponential
from quick import first_quick


class Scene:
    """A model with a frozen parameter and buffers, two averagers of it, and the article's class."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        self.model.register_buffer("constant", torch.ones(2))
        self.model[0].bias.requires_grad_(False)
        self.averager = Averager(self.model, Exponential(0.5), buffers="copy")
        self.bema = Averager(self.model, Bema())
        self.ema = EMA(
            self.model, update_every=1, update_after_step=0, ignore_names={"constant", "0.bias"}
        )
        self.others = {
            name: Averager(self.model, Exponential(0.25), **options)
            for name, options in BLOCKS.items()
        }
        for step in range(2):
            for held in (self.averager, self.bema, *self.others.values()):
                held.update()
            self.train(step)
            self.model(torch.randn(8, 2))

    @torch.no_grad()
    def train(self, step: int) -> None:
        wander(self.model, step)
        self.model[0].bias.add_(1.0)
        self.model.get_buffer("constant").add_(1.0)


BLOCKS: dict[str, dict[str, Any]] = {
    "all": {"select": "*", "buffers": "average"},
    "a frozen parameter": {"select": "0.bias", "dtype": torch.float64},
    "running statistics": {"select": "1.running_*", "buffers": "average"},
    "a buffer": {"select": "constant", "buffers": "average"},
    "a trained parameter": {"select": "2.weight"},
}


def values(held: Any) -> dict[str, Tensor]:
    return {name: held[name].detach().clone() for name in held}


def updated(scene: Scene) -> dict[str, Tensor]:
    scene.averager.update()
    return {name: t.clone() for name, t in scene.averager.state_dict()["copies"].items()}


def begun(scene: Scene, *given: str) -> dict[str, Tensor]:
    fresh = Averager(scene.model, Exponential(0.5), buffers="copy")
    weights = {name: torch.zeros_like(snapshot(scene.model)[name]) for name in given}
    fresh.begin(weights or None)
    state = fresh.state_dict()
    return state["copies"] | state["averages"]["average"]["slots"]["average"]  # type: ignore[no-any-return]


def saved(scene: Scene, folder: Path) -> dict[str, Tensor]:
    polyak.save(folder / "saved", scene.bema)
    return values(polyak.checkpoints.read(folder / "saved").average())


def written(scene: Scene) -> dict[str, Tensor]:
    other = deepcopy(scene.model)
    scene.averager.copy_to(other)
    return snapshot(other)


def pulled(scene: Scene) -> dict[str, Tensor]:
    scene.averager.pull(0.5)
    return {name: snapshot(scene.model)[name] for name in WEIGHTS}


def saved_ema(scene: Scene, folder: Path) -> dict[str, Tensor]:
    polyak.save(folder / "ema", scene.ema)
    model = deepcopy(scene.model)
    loaded = EMA(model, update_every=1, update_after_step=0, ignore_names={"constant", "0.bias"})
    polyak.load(folder / "ema", loaded)
    return {name: tensor.clone() for name, tensor in loaded.state_dict().items()}


def live_of(averager: Any) -> dict[str, Tensor]:
    return snapshot(averager._live.model)


def article(scene: Scene) -> dict[str, Tensor]:
    scene.ema.update()
    return snapshot(scene.ema.ema_model)


WEIGHTS = ("0.weight", "1.weight", "1.bias", "2.weight", "2.bias")

CALLS: dict[str, Callable[[Scene, Path], dict[str, Tensor]]] = {
    "average": lambda s, _: values(s.averager.average()),
    "weights": lambda s, _: values(s.averager.weights()),
    "average of live weights too": lambda s, _: values(s.bema.average()),
    "update": lambda s, _: updated(s),
    "begin": lambda s, _: begun(s),
    "begin, with buffers that are not given": lambda s, _: begun(s, *WEIGHTS),
    "save": saved,
    "save an EMA": saved_ema,
    "copy_to": lambda s, _: written(s),
    "pull": lambda s, _: pulled(s),
    "a copy": lambda s, _: live_of(deepcopy(s.averager)),
    "a pickle": lambda s, _: live_of(pickle.loads(pickle.dumps(s.averager))),
    "EMA": lambda s, _: snapshot(EMA(s.model).ema_model),
    "EMA.update": lambda s, _: article(s),
}


@pytest.mark.parametrize("block", first_quick(BLOCKS, 2))
@pytest.mark.parametrize("call", CALLS)
def test_a_call_reads_no_average_for_a_live_weight(call: str, block: str, tmp_path: Path) -> None:
    scene = Scene()
    wanted = CALLS[call](Scene(), tmp_path / "wanted")
    with scene.others[block].applied():
        try:
            seen = CALLS[call](scene, tmp_path / "seen")
        except RuntimeError as error:
            assert "in a block applied('average')" in str(error)
            return
    assert_same(seen, wanted)
