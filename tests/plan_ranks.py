"""Byte counts of real sharding code on one rank of a group that is not there: `python plan_ranks.py CASE`.

torch's fake process group lets one process be any rank of 16 384; nothing is sent. Weights are on the
meta device or fake, so that torch cuts models that no machine here could hold. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's own
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
from plan import MODELS, Model
from polyak._engine import infinities, tracking
from polyak._ranks.replicas import gather_
from polyak._ranks.sharding import rows

ODD = ((131, 7), (3, 5), (1,), (64, 3), (65,), (17, 2, 3))
"""Rows that 8 and 64 do not divide, and fewer than either."""


@contextmanager
def rank_of(rank: int, world: int) -> Iterator[None]:
    """This process as one rank of so many."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Shapes(nn.Module):
    """A model of nothing but parameters, and how tensor parallelism cuts each."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], kinds: Sequence[str] = ()) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)
        self.kinds = kinds


def sharded(model: Model, layout: str, cut: int) -> list[tuple[int, DTensor]]:
    """One parameter of each shape, spread by torch's own code, and how many there are of it."""
    routed = [p for p in model.parameters if p.kind == "expert"]
    dense = [p for p in model.parameters if p.kind != "expert"]
    with torch.device("meta"):
        module = Shapes([p.shape for p in dense], [p.kind for p in dense])
        experts = Shapes([p.shape for p in routed])
    LAYOUTS[layout](module, experts, cut)
    pairs = zip([*dense, *routed], [*module.weights, *experts.weights], strict=True)
    return [(p.times, as_dtensor(tensor)) for p, tensor in pairs]


def as_dtensor(tensor: Tensor) -> DTensor:
    assert isinstance(tensor, DTensor)
    return tensor


def fully(module: Shapes, experts: Shapes, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(module, mesh=mesh)
    fully_shard(experts, mesh=mesh)


def hybrid(module: Shapes, experts: Shapes, shard: int) -> None:
    mesh = grid("copies", "rows", shard)
    fully_shard(module, mesh=mesh)
    fully_shard(experts, mesh=mesh)


def tensor_parallel(module: Shapes, experts: Shapes, tensor: int) -> None:
    """As ColwiseParallel, RowwiseParallel and a norm's SequenceParallel place their weights."""
    assert not len(experts.weights)
    mesh = grid("data", "tensor", tensor)
    placements = {"column": Shard(0), "row": Shard(1), "whole": Replicate()}
    for i, kind in enumerate(module.kinds):
        spread(module, i, mesh["tensor"], placements[kind])
    fully_shard(module, mesh=mesh["data"])


def expert_parallel(module: Shapes, experts: Shapes, parallel: int) -> None:
    """As torchtitan does: experts over ranks, then the first dimension of each over the others."""
    mesh = grid("rows", "experts", parallel)
    for i in range(len(experts.weights)):
        spread(experts, i, mesh["experts"], Shard(0))
    fully_shard(experts, mesh=mesh["rows"], shard_placement_fn=lambda _: Shard(1))
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def grid(outer: str, inner: str, ranks: int) -> DeviceMesh:
    """All ranks, neighbours along the inner dimension."""
    shape = (dist.get_world_size() // ranks, ranks)
    return init_device_mesh("cpu", shape, mesh_dim_names=(outer, inner))


LAYOUTS: dict[str, Callable[[Shapes, Shapes, int], None]] = {
    "fully_sharded": fully,
    "hybrid": hybrid,
    "tensor_parallel": tensor_parallel,
    "expert_parallel": expert_parallel,
}


def spread(module: Shapes, index: int, mesh: Any, placement: Any) -> None:
    whole = module.weights[index]
    module.weights[index] = nn.Parameter(
        distribute_tensor(whole, mesh, [placement], src_data_rank=None)
    )


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


Case = tuple[int, str, int, int, int]
"""Model, layout, its size, ranks, rank."""


def parts(cases: list[Case]) -> list[dict[str, int]]:
    """The bytes of a rank's parts, and of the memory under them."""
    found = []
    for model, layout, cut, world, rank in cases:
        with rank_of(rank, world):
            locals_ = [(n, t.to_local()) for n, t in sharded(MODELS[model], layout, cut)]
        held = sum(count * size(part) for count, part in locals_)
        padded = sum(count * part.untyped_storage().nbytes() for count, part in locals_)
        found.append({"held": held, "padded": padded})
    return found


def models(_: Any) -> list[dict[str, Any]]:
    """The models as transformers builds them: shapes, and what one rank of 64 has of all of it."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

    configs = [
        LlamaConfig(
            hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
        ),
        LlamaConfig(
            hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
        ),
        DeepseekV3Config(
            hidden_size=7168, num_hidden_layers=61, intermediate_size=18432,
            moe_intermediate_size=2048, num_attention_heads=64, num_key_value_heads=64,
            n_routed_experts=384, n_shared_experts=1, num_experts_per_tok=8, q_lora_rank=1536,
            kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
            vocab_size=163840, first_k_dense_replace=1, n_group=1, topk_group=1,
        ),
    ]  # fmt: skip
    found = []
    for config in configs:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        shapes = [list(p.shape) for p in model.parameters()]
        with rank_of(3, 64):
            fully_shard(model)
            held = sum(size(as_dtensor(p).to_local()) for p in model.parameters())
        found.append({"shapes": shapes, "held": held})
    return found


RULES: dict[str, dict[str, str]] = {
    "one": {"a": "exponential(0.9)"},
    "two": {"a": "exponential(0.9)", "b": "power(3)"},
    "window": {"a": "window(8)"},
}


def averagers(cases: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """(ranks, rank): what averagers of a real model of odd rows hold, and what its saves have."""
    found = []
    for world, rank in cases:
        with rank_of(rank, world):
            model = Shapes(list(ODD))
            fully_shard(model)
            held: dict[str, Any] = {}
            for name in RULES:
                averager = averager_of(model, name)
                held[name] = averager.summary().memory
                assert held[name] == slot_bytes(averager)
            held["bfloat16"] = averager_of(model, "two", torch.bfloat16).summary().memory
            held["saved"] = planned(averager_of(model, "two"))
        found.append(held)
    return found


def averager_of(model: Any, rules: str, dtype: torch.dtype = torch.float32) -> polyak.Averager:
    """With every slot that its rules ever have."""
    averager = polyak.Averager(model, RULES[rules], dtype=dtype)
    for _ in range(8 if rules == "window" else 1):
        averager.update()
    return averager


def slot_bytes(averager: polyak.Averager) -> int:
    """The bytes of all slots, as they leave an averager."""
    averages = averager.state_dict()["averages"].values()
    slots = [slot for average in averages for slot in average["slots"].values()]
    return sum(size(as_dtensor(t).to_local()) for slot in slots for t in slot.values())


def planned(averager: polyak.Averager) -> int:
    """The bytes of tensors that torch.distributed.checkpoint plans to write on this rank."""
    planner = DefaultSavePlanner()
    slots = {n: a["slots"] for n, a in averager.state_dict()["averages"].items()}
    planner.set_up_planner(slots, is_coordinator=dist.get_rank() == 0)
    chunks = [item.tensor_data for item in planner.create_local_plan().items]
    assert all(chunk is not None for chunk in chunks)
    return sum(c.chunk.sizes.numel() * c.properties.dtype.itemsize for c in chunks if c)


def full_size(cases: list[Case]) -> list[dict[str, int]]:
    """What averagers hold of fake weights in the shapes and places of all real ones, and what they move."""
    # Fake tensors stand for plain ones here, and have no values in which to look for infinities.
    tracking.refuse_wrapper = lambda *_: None  # type: ignore[attr-defined]
    infinities.infinite = lambda _: []  # type: ignore[attr-defined, assignment]
    found = []
    for model, layout, cut, world, rank in cases:
        with rank_of(rank, world):
            fake = FakeTensorMode()
            spread = sharded(MODELS[model], layout, cut)
            copies = [(t, i) for count, t in spread for i in range(count)]
            weights = {f"{n}.{i}": fake_like(t, fake) for n, (t, i) in enumerate(copies)}
            with fake:
                one = averager_of(weights, "one")
                two = averager_of(weights, "two")
                with Traffic() as traffic:
                    one.update()
            found.append({"two": slot_bytes(two), "moved": traffic.moved})
    return found


def fake_like(tensor: DTensor, fake: FakeTensorMode) -> DTensor:
    """Weights without content in the places of others."""
    shape = tensor.to_local().shape
    with fake:
        part = torch.empty(shape)
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def replicas(cases: list[tuple[int, int]]) -> list[dict[str, int]]:
    """(ranks, rank): bytes of a rank's rows of whole weights, and what it gets to have all rows."""
    found = []
    for world, rank in cases:
        with rank_of(rank, world):
            mesh = init_device_mesh("cpu", (world,))
            wholes = [torch.zeros(shape) for shape in ODD]
            own = [rows(whole, mesh) for whole in wholes]
            with Traffic() as traffic:
                gather_(list(zip(wholes, own, strict=True)), mesh)
            found.append({"held": sum(map(size, own)), "received": traffic.received})
    return found


class Traffic(TorchDispatchMode):
    """Bytes that lerps read and write, and that other ranks send in gathers."""

    moved = received = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach_lerp_" in str(func):
            self.moved += sum(
                2 * size(slot) + size(live) for slot, live in zip(*args[:2], strict=True)
            )
        if "_allgather_base_" in str(func):
            self.received += size(args[0]) - size(args[1])
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    case, given = sys.argv[1], json.loads(sys.argv[2])
    functions = (parts, models, averagers, full_size, replicas)
    print(json.dumps({each.__name__: each for each in functions}[case](given)))
