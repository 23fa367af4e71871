"""What each rank runs to save a folder of torch.distributed.checkpoint: `python saving_ranks.py ...`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # torch's own

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_state_dict  # noqa: E402
from torch.distributed.checkpoint.state_dict_saver import async_save, save  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor  # noqa: E402


def trained(mesh: DeviceMesh) -> dict[str, Any]:
    """A model sharded over the mesh, after a step, and its optimizer's state.

    Neither 7 nor 3 rows divide by 2 or 4; of 3 rows the fourth rank has none.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.BatchNorm1d(3))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    return {
        "model": weights,
        "optimizer": moments,
        "step": 7,
        "note": "hello",
        "list": [1, {"a": 2.5}],
    }


def spread(world: int) -> dict[str, Tensor]:
    """Tensors in every way of spreading them."""
    torch.manual_seed(1)
    mesh = init_device_mesh("cpu", (world,))
    held: dict[str, Tensor] = {
        "columns": distribute_tensor(torch.randn(3, 5).bfloat16(), mesh, [Shard(1)]),
        "same": distribute_tensor(torch.randn(3, 5).double(), mesh, [Replicate()]),
        "plain": torch.arange(3),
        "number": torch.tensor(2.5),
        "none": torch.empty(0, 3),
    }
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2))
        held["grid"] = distribute_tensor(torch.randn(5, 3, 3), grid, [Shard(0), Shard(2)])
        held["rows twice"] = distribute_tensor(torch.randn(7, 2), grid, [Shard(0), Shard(0)])
        held["half"] = distribute_tensor(torch.randn(5, 3), grid, [Replicate(), Shard(0)])
    return held


def whole(value: object) -> object:
    """The same structure with whole tensors."""
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    if isinstance(value, DTensor):
        return value.full_tensor().detach()
    return value.detach() if isinstance(value, Tensor) else value


def main(folder: Path, rank: int, world: int) -> None:
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=world)
    state = trained(init_device_mesh("cpu", (world,))) | {"spread": spread(world)}
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
        state["replicated"] = trained(mesh)["model"]
    wanted = whole(state)
    if rank == 0:
        torch.save(wanted, folder / "wanted.pt")
    save(state, checkpoint_id=folder / "saved")
    group = dist.new_group(backend="gloo")
    async_save(state, checkpoint_id=folder / "async", process_group=group).result()  # type: ignore[union-attr]
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may not let go
