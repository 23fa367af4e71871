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
from polyak.integrations._states import load_state, require_apart, save_state
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


APART = [
    (["a"], ["b", "c"], True),
    (["a", "b"], ["a-c"], True),
    (["a", "b"], ["c", "b"], False),
    (["a", "b"], ["a-b"], False),
    (["ema"], ["EMA"], False),
    (["a"], ["a.safetensors"], False),
    (["a-b.dcp"], ["a", "b"], False),
]
"""The averages of two averagers, and whether their files in one folder have different names."""


@pytest.mark.parametrize(("names", "others", "apart"), APART)
def test_averagers_that_would_write_one_file_are_refused(
    names: list[str], others: list[str], apart: bool, tmp_path: Path
) -> None:
    """`apart` is what the real files of both say."""
    files = [_files(each, tmp_path / str(i)) for i, each in enumerate([names, others])]
    assert files[0].isdisjoint(files[1]) == apart
    for one, two in ([names, others], [others, names]):
        if apart:
            require_apart(one, [two], "two")
        else:
            with pytest.raises(ValueError, match=r"two have files of the name .*other names"):
                require_apart(one, [two], "two")


def _files(names: list[str], folder: Path) -> set[str]:
    """What a trainer's checkpoint has of an averager: its state, and a folder for each average."""
    averager = Averager({"w": torch.ones(2)}, dict.fromkeys(names, Uniform()))
    averager.update()
    save_state(folder, averager, writes=True)
    saved = {path.name for path in (folder / "averages").iterdir()}
    return {name.casefold() for name in {*saved, *names, "-".join(names) + ".dcp"}}


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
