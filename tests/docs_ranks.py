"""The examples of docs/distributed.md, run by each rank: `python docs_ranks.py FOLDER RANK WORLD`."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's own

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import polyak
from polyak import checkpoints
from sharding_ranks import require_same, run_laws, whole

PAGE = Path(__file__).parent.parent / "docs" / "distributed.md"
TEXT = PAGE.read_text()
ROWS, REST = TEXT.split("## Saving and loading")


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def started() -> dict[str, Any]:
    """What a reader has before the first example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters())

    def train_step(model: nn.Module, batch: torch.Tensor) -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "torch": torch,
        "dist": dist,
        "polyak": polyak,
        "checkpoints": checkpoints,
        "fully_shard": fully_shard,
        "model": model,
        "optimizer": optimizer,
        "train_step": train_step,
        "evaluate": lambda model: model(torch.ones(1, 4)),
        "batches": [torch.randn(8, 4) for _ in range(5)],
        "step": 5,
    }


def averages_of_shards_and_of_rows() -> None:
    first, rows = blocks(ROWS)
    for code in (first, rows):
        names = started()
        exec(code, names)
        names["averager"].update()
        assert names["averager"].sharded


def saves_restarts_snapshots_and_exports() -> None:
    save, restart, background, snapshots, export, stage = blocks(REST)
    names = started()
    fully_shard(names["model"])
    names["optimizer"] = torch.optim.AdamW(names["model"].parameters())
    averager = names["averager"] = polyak.Averager(names["model"], "power(relative_std=0.1)")
    recorder = polyak.Recorder(averager, "run/snapshots", every=2)
    for _ in range(20):
        averager.update()
        recorder.update()
    exec(save, names)
    average = whole(averager.average())
    imported = {name: names[name] for name in ("get_state_dict", "set_state_dict")}
    fresh = started() | imported | {"step": 0}
    fully_shard(fresh["model"])
    fresh["optimizer"] = torch.optim.AdamW(fresh["model"].parameters())
    fresh["averager"] = polyak.Averager(fresh["model"], "power(relative_std=0.1)")
    exec(restart, fresh)
    require_same(whole(fresh["averager"].average()), average)
    assert fresh["step"] == 5
    names["step"] = 6
    exec(background, names)
    exec(snapshots, names)
    exec(export, names)
    shape, dimensions = (1, dist.get_world_size()), ("stage", "data")
    names["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=dimensions)
    exec(stage, names)
    assert checkpoints.latest("run") == Path("run/step-6")
    if dist.get_rank() == 0:
        plain = polyak.Averager(started()["model"], "power(relative_std=0.1)")
        polyak.load("run/step-6/average", plain)
        require_same(plain.average(), average)
        assert Path("averaged.safetensors").exists() and Path("stage-0.safetensors").exists()
        assert len(list(Path("folder").iterdir())) > 1


LAWS: list[Callable[[], None]] = [
    averages_of_shards_and_of_rows,
    saves_restarts_snapshots_and_exports,
]


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    run_laws(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), LAWS)
