"""Sharded models: each rank averages its own parts, and the average is that of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import docs_ranks
import pipeline_ranks
import replicas_ranks
import sharding_ranks
import torch_private_ranks
from launching import require_laws
from patience import HANG


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_models(tmp_path: Path, world: int) -> None:
    require_laws(sharding_ranks.__file__, sharding_ranks.laws_on(world), world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_averages_divided_over_replicas(tmp_path: Path, world: int) -> None:
    require_laws(replicas_ranks.__file__, replicas_ranks.LAWS, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_model_split_into_stages(tmp_path: Path, world: int) -> None:
    laws = pipeline_ranks.laws_on(world)
    require_laws(pipeline_ranks.__file__, laws, world, tmp_path)


@pytest.mark.slow
def test_the_examples_of_the_docs(tmp_path: Path) -> None:
    require_laws(docs_ranks.__file__, docs_ranks.LAWS, 2, tmp_path)


@pytest.mark.slow
def test_layouts_of_other_versions_of_torch(tmp_path: Path) -> None:
    """What older versions have is known; what no version has is refused."""
    require_laws(torch_private_ranks.__file__, torch_private_ranks.LAWS, 1, tmp_path)


# What FSDP2 makes under CPUOffloadPolicy where there are GPUs: parts in the host's memory, on a mesh of
# theirs. Nothing here has one, so the first move to it would raise.
ON_ANOTHER_DEVICE = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

import polyak

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
mesh = init_device_mesh("cpu", (2,))
mesh._device_type = "cuda"
meta = TensorMeta(torch.Size([4, 3]), (3, 1), torch.bfloat16)
part = torch.ones(2, 3, dtype=torch.bfloat16)
weight = DTensor(part, DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)
averager = polyak.Averager({"w": weight}, "uniform()")
averager.update()
part.fill_(3)
slot = averager.state_dict()["averages"]["average"]["slots"]["average"]["w"]
assert slot.device_mesh == weight.device_mesh and slot.placements == weight.placements
assert slot.shape == weight.shape and slot.stride() == weight.stride()
assert slot.dtype == torch.float32 and slot._local_tensor.device.type == "cpu"
averager.update()
assert (slot._local_tensor == 2).all()
assert (averager.average()["w"]._local_tensor == 2).all()
"""


@pytest.mark.slow
def test_parts_in_the_hosts_memory_stay_there() -> None:
    command = [sys.executable, "-c", ON_ANOTHER_DEVICE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
