"""The exact states of averagers in a trainer's checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from polyak import Averager, Uniform
from polyak.integrations._lightning_files import parts
from polyak.integrations._states import load_state, save_state
from since import since


def begun(value: float, *, sharded: bool) -> Averager:
    model: Any = nn.Linear(2, 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    averager = Averager(model, Uniform())
    averager.update()
    return averager


@since("2.7", "FSDP2 on the CPU")
@pytest.mark.usefixtures("lone_rank")
@pytest.mark.parametrize("sharded", [False, True])
def test_the_state_of_the_last_save_is_loaded_whoever_saved_before(
    sharded: bool, tmp_path: Path
) -> None:
    """A run that shards goes on in the folder of one that did not, or the other way round."""
    save_state(tmp_path, begun(1.0, sharded=not sharded), writes=True)
    save_state(tmp_path, begun(2.0, sharded=sharded), writes=True)
    for again in (begun(3.0, sharded=sharded), begun(3.0, sharded=not sharded)):
        load_state(tmp_path, again)
        weight: Any = again.average()["weight"]
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        assert torch.equal(local, torch.full((2, 2), 2.0))


@pytest.mark.parametrize("length", [5, 60])
def test_many_averages_are_saved_in_one_file(length: int, tmp_path: Path) -> None:
    """Their names together are longer than a file's may be; each set of names has its own file."""
    names = [f"{i}".rjust(length, "\N{GREEK SMALL LETTER ALPHA}") for i in range(60)]
    for last, value in (("x", 1.0), ("y", 2.0)):
        model = {"w": torch.full((2,), value)}
        averager = Averager(model, dict.fromkeys([*names, last], Uniform()))
        averager.update()
        save_state(tmp_path, averager, writes=True)
        parts(tmp_path / "last.ckpt", list(averager.rules)).mkdir()  # as Lightning's shards
    again = Averager({"w": torch.zeros(2)}, dict.fromkeys([*names, "x"], Uniform()))
    load_state(tmp_path, again)
    assert torch.equal(again.average(names[0])["w"], torch.ones(2))
