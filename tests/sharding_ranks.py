"""The laws of averages of sharded models, run by each rank: `python sharding_ranks.py FOLDER RANK WORLD`."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn, cast

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's own

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

import polyak

RULES = {"ema": "exponential(0.9)", "all": "uniform()", "last": "window(3)", "bema": "bema()"}
ROWS = 8


class Net(nn.Module):
    """Neither 3 nor 7 rows divide by 2 or 4, and of `scale`'s one row all ranks but one have none."""

    passes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.block = nn.Sequential(nn.Linear(8, 3), nn.Tanh())
        self.last = nn.Linear(3, 7)
        self.norm = nn.LayerNorm(3)  # equal on all ranks, behind what is uneven
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.passes.add_(int(self.training))
        hidden = self.norm(self.block(self.first(x).tanh()))
        if self.fails:
            raise KeyError("in the forward pass")
        return self.last(hidden) * self.scale  # type: ignore[no-any-return]


def plain(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def fsdp(model: Net) -> Net:
    """The root is left whole after a forward pass, the block is not."""
    fully_shard(model.block)
    fully_shard(model)
    return model


@cache
def square(first: str, second: str) -> DeviceMesh:
    """Four ranks as two by two, made once as trainings do: each mesh has groups and threads of its own."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=(first, second))


def tensor_parallel(model: Net) -> Net:
    """Some of the parameters are DTensors, the others are plain; 7 rows are spread unevenly."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan: dict[str, ParallelStyle] = {"first": ColwiseParallel(), "block.0": RowwiseParallel()}
    plan["last"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    return model


def grid(model: Net) -> Net:
    mesh = square("data", "tensor")
    plan = {"first": ColwiseParallel(), "block.0": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model.block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model


def hybrid(model: Net) -> Net:
    """Shards on two ranks, twice."""
    mesh = square("replicate", "shard")
    fully_shard(model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def offloaded(model: Net) -> Net:
    """Shards rest in the host's memory."""
    policy = CPUOffloadPolicy(pin_memory=False)
    fully_shard(model.block, offload_policy=policy)
    fully_shard(model, offload_policy=policy)
    return model


Sharded = Callable[[Net], Net]
PARTS: dict[Sharded, Callable[[], tuple[int, int]]] = {
    fsdp: lambda: (dist.get_rank(), dist.get_world_size()),
    tensor_parallel: lambda: (0, 1),
    grid: lambda: (dist.get_rank() // 2, 2),
    hybrid: lambda: (dist.get_rank(), 4),
    offloaded: lambda: (dist.get_rank(), dist.get_world_size()),
}


def batch(step: int, part: tuple[int, int] = (0, 1), dtype: torch.dtype = torch.float64) -> Tensor:
    """A step's rows, those of this rank alone where data are spread over ranks."""
    rows = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(step), dtype=dtype)
    index, count = part
    return rows[index * ROWS // count : (index + 1) * ROWS // count]


class Training:
    """A model, the optimizer and the data of its ranks."""

    def __init__(self, sharded: Sharded | None = None, dtype: torch.dtype = torch.float64) -> None:
        self.model = plain(dtype) if sharded is None else sharded(plain(dtype))
        self.dtype = dtype
        self.part = (0, 1) if sharded is None else PARTS[sharded]()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, foreach=False
        )
        self.steps = 0

    def step(self) -> None:
        self.model.train()
        loss = (self.model(batch(self.steps, self.part, self.dtype)) - 1).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def train(self, steps: int, *averagers: polyak.Averager) -> None:
        for _ in range(steps):
            self.step()
            for averager in averagers:
                averager.update()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        self.model.eval()
        return self.model(batch(99, dtype=self.dtype))  # type: ignore[no-any-return]

    def parts(self) -> dict[str, Tensor]:
        """This rank's weights, bit for bit."""
        return {name: to_local(t).clone() for name, t in self.model.state_dict().items()}


def to_local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in weights.items()}


def require_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@contextmanager
def raises(
    kind: type[BaseException] | tuple[type[BaseException], ...], *said: str
) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert all(each in str(error) for each in said), str(error)
    else:
        raise AssertionError(f"no {kind}")


class DTensorOperations(TorchDispatchMode):
    """Counts operations on DTensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def the_average_is_that_of_one_process(sharded: Sharded) -> None:
    """To the rounding of the gradients' sum; to the bit, of the weights that were trained."""
    there, here = Training(sharded), Training()
    averager = polyak.Averager(there.model, RULES)
    one = polyak.Averager(here.model, RULES)
    gathered = whole(there.model.state_dict())
    same = polyak.Averager({n: t.clone() for n, t in gathered.items()}, RULES)
    for step in range(30):
        there.step()
        here.train(1, one)
        if step % 7 == 0:
            there.evaluate()
        averager.update()
        for item in same.tracked:
            item.local().copy_(whole(there.model.state_dict())[item.name])
        same.update()
    for name in RULES:
        average, wanted = averager.average(name), one.average(name)
        assert list(average) == list(wanted)
        require_same(whole(average), same.average(name))
        largest = max(t.abs().max() for t in wanted.values() if t.is_floating_point())
        for key, tensor in whole(average).items():
            assert (tensor - wanted[key]).abs().max() <= 1e-15 * largest, (name, key)
    assert averager.count == 30
    held = dict(there.model.state_dict())
    for key, tensor in averager.average("ema").items():
        assert isinstance(tensor, DTensor) == isinstance(held[key], DTensor), key
        if isinstance(tensor, DTensor):
            assert (tensor.placements, tensor.shape) == (held[key].placements, held[key].shape)


def an_update_neither_communicates_nor_dispatches(sharded: Sharded) -> None:
    run = Training(sharded)
    averager = polyak.Averager(run.model, {"a": "exponential(0.9, debias=True)", "b": "power(3)"})
    run.train(3, averager)
    weight = run.model.first.weight
    assert isinstance(weight, DTensor)
    with CommDebugMode() as control, DTensorOperations() as seen:
        whole({"twice": weight.detach() * 2})
    assert control.get_total_counts() > 0
    assert seen.seen
    for before in (lambda: None, run.evaluate):
        before()
        with CommDebugMode() as communicated:
            averager.update()
        before()
        with DTensorOperations() as dispatched:
            averager.update()
        with CommDebugMode() as exchanged, averager.applied("a"):
            pass
        assert communicated.get_total_counts() == exchanged.get_total_counts() == 0
        assert dispatched.seen == []


def memory_stays_flat_while_the_decay_changes(sharded: Sharded) -> None:
    run = Training(sharded)
    averager = polyak.Averager(run.model, {"a": "exponential(0.9, debias=True)", "b": "power(3)"})
    sizes = []
    for _ in range(3):
        for _ in range(500):
            averager.update()
        sizes.append(resident_bytes())
    assert sizes[2] - sizes[0] < 200_000, sizes  # an operation on DTensors would leave 2 kB a call


def resident_bytes() -> int:
    """The memory in use: without mapped files and free parts of the heap, which go when the system likes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _, resident, mapped, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - mapped) * os.sysconf("SC_PAGE_SIZE")


def names_are_those_of_the_plain_model(sharded: Sharded) -> None:
    """Through activation checkpointing and torch.compile; frozen weights and ties come along."""
    tied = sharded not in (tensor_parallel, grid)  # which does not spread ties
    wraps: list[Callable[[Any], Any]] = [checkpoint_wrapper]
    wraps += [lambda block: checkpoint_wrapper(cast(nn.Module, torch.compile(block)))] * tied
    for wrap in wraps:
        model = plain()
        model.block[0].requires_grad_(False)
        if tied:
            model.first.register_parameter("same", model.first._parameters["weight"])
        model.add_module("block", wrap(model.block))
        compiled = torch.compile(sharded(model))
        averager = polyak.Averager(compiled, "uniform()")  # type: ignore[arg-type]
        averager.update()
        named: dict[str, Any] = get_model_state_dict(model)  # torch leaves `_orig_mod` within
        weights = {name.replace("_orig_mod.", ""): each for name, each in named.items()}
        average = whole(averager.average())
        assert set(plain().state_dict()) <= set(average)
        assert sorted(average) == sorted(weights)
        ties = [item.aliases for item in averager.tracked if item.name == "first.weight"]
        assert ties == ([("first.same",)] if tied else [()])
        held = whole(weights)
        require_same(average, {name: held[name] for name in average})


def adapters_alone_are_averaged(sharded: Sharded) -> None:
    """As in training with LoRA: all but the block is frozen, and has no slot."""
    runs = [Training(sharded), Training()]
    averagers = []
    for run in runs:
        run.model.requires_grad_(False)
        run.model.block.requires_grad_(True)
        averagers.append(polyak.Averager(run.model, "exponential(0.5)", select="block.*"))
    frozen = whole({"first.weight": runs[0].model.first.weight.detach()})["first.weight"].clone()
    for _ in range(4):
        for run, averager in zip(runs, averagers, strict=True):
            run.train(1, averager)
    got, wanted = (whole(averager.average()) for averager in averagers)
    assert list(got) == list(wanted) == ["block.0.weight", "block.0.bias"]
    for name, tensor in wanted.items():
        assert (got[name] - tensor).abs().max() < 1e-15, name
    live = runs[0].parts()
    with averagers[0].applied():
        inside = runs[0].parts()
        changed = [name for name in live if not torch.equal(live[name], inside[name])]
        assert set(changed) <= set(wanted)
    require_same(runs[0].parts(), live)
    now = whole({"first.weight": runs[0].model.first.weight.detach()})["first.weight"]
    assert torch.equal(now, frozen)


def applied_leaves_the_trajectory_as_it_was(sharded: Sharded) -> None:
    undisturbed = Training(sharded)
    undisturbed.train(8)
    for before in (False, True):
        for rule in ("exponential(0.5)", "window(3)"):
            run = Training(sharded)
            averager = polyak.Averager(run.model, rule)
            run.train(5, averager)
            state, average = run.parts(), whole(averager.average())
            live = [run.evaluate()] if before else []
            with averager.applied():
                got = run.evaluate()
                assert not any(torch.equal(got, each) for each in live)
            require_same(run.parts(), state)
            require_same(whole(averager.average()), average)
            reference = Training()
            reference.model.load_state_dict(average)
            assert torch.allclose(got, reference.evaluate(), rtol=0, atol=1e-14)
            run.train(3, averager)
            require_same(run.parts(), undisturbed.parts())


def narrow_weights_come_back_bit_for_bit(sharded: Sharded) -> None:
    run = Training(sharded, torch.bfloat16)
    averager = polyak.Averager(run.model, "exponential(0.5)")
    run.train(4, averager)
    before = run.parts()
    average = averager.average()
    assert average["last.weight"].dtype == torch.float32
    with averager.applied():
        run.evaluate()
        require_same(run.parts(), {n: to_local(t).to(before[n]) for n, t in average.items()})
    require_same(run.parts(), before)


def equal_parts_are_rounded_alike(sharded: Sharded) -> None:
    """At random, on whichever ranks they are."""
    run = Training(sharded, torch.float32)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "rounding": "stochastic"}
    averager = polyak.Averager(run.model, "exponential(0.99)", **options)
    run.train(6, averager)
    read: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(read, whole(averager.average()))
    for each in read:
        require_same(each, read[0])
    again = polyak.Averager(run.model, "exponential(0.99)", **options)
    again.load_state_dict(averager.state_dict())
    run.train(3, averager, again)
    require_same(whole(again.average()), whole(averager.average()))
    plain_one = polyak.Averager(run.model, "exponential(0.99)", dtype=torch.bfloat16)
    plain_one.load_state_dict(averager.state_dict())
    run.train(1, averager, plain_one)
    got, nearest = whole(averager.average()), whole(plain_one.average())
    assert not all(torch.equal(nearest[name], tensor) for name, tensor in got.items())


def an_exception_restores(sharded: Sharded) -> None:
    """On one rank after its forward pass, on all in the midst of it."""
    undisturbed = Training(sharded)
    undisturbed.train(6)
    for in_forward in (False, True):
        run = Training(sharded)
        averager = polyak.Averager(run.model, "exponential(0.5)")
        run.train(3, averager)
        before, average = run.parts(), whole(averager.average())
        run.model.fails = in_forward
        try:
            with averager.applied():
                run.evaluate()
                if dist.get_rank() == 1:
                    raise KeyError("on one rank")
        except KeyError as error:
            assert in_forward or dist.get_rank() == 1
            assert not hasattr(error, "__notes__"), error.__notes__
        run.model.fails = False
        require_same(run.parts(), before)
        require_same(whole(averager.average()), average)
        run.train(3, averager)
        require_same(run.parts(), undisturbed.parts())


def weights_gathered_ahead_are_not_taken_for_others(sharded: Sharded) -> None:
    """What is on its way when contents are exchanged is of before, and the next pass must not use it."""
    run = Training(sharded)
    block = run.model.block
    if not isinstance(block, FSDPModule) or not isinstance(run.model, FSDPModule):
        return
    averager = polyak.Averager(run.model, "exponential(0.5)")
    run.train(5, averager)
    live = run.evaluate()
    with averager.applied():
        average = run.evaluate()
    assert not torch.equal(live, average)
    for module in (block, run.model):
        module.unshard(async_op=True)
        with averager.applied():
            assert torch.equal(run.evaluate(), average)
            module.unshard(async_op=True)
        assert torch.equal(run.evaluate(), live)
    run.model.set_modules_to_forward_prefetch([block])
    for applied in (False, True):
        try:
            with averager.applied() if applied else nullcontext():
                failing_forward(run)
        except KeyError:
            pass
        if applied:
            assert torch.equal(run.evaluate(), live)
        else:
            with averager.applied():
                assert torch.equal(run.evaluate(), average)


def failing_forward(run: Training) -> None:
    """A forward pass that ends before the block, whose weights are on their way by then."""

    def fail(*_: object) -> None:
        raise KeyError("in the first layer")

    hook = run.model.first.register_forward_pre_hook(fail)
    try:
        run.evaluate()
    finally:
        hook.remove()


def a_part_of_a_model_is_resharded_with_it(sharded: Sharded) -> None:
    """Weights given by name, and a module whose weights are of its parent's group."""
    run = Training(sharded)
    if not isinstance(run.model, FSDPModule):
        return
    named = dict(run.model.named_parameters())
    of_first = {name: each for name, each in named.items() if name.startswith("first.")}
    parts = [
        polyak.Averager(each, "exponential(0.5)") for each in (named, of_first, run.model.first)
    ]
    whole_one = polyak.Averager(run.model, "exponential(0.5)")
    first = polyak.Averager(run.model, "exponential(0.5)", select="first.*")
    run.train(4, *parts, whole_one, first)
    for averager, like in zip(parts, [whole_one, first, first], strict=True):
        with like.applied():
            wanted = run.evaluate()
        live = run.evaluate()
        assert not torch.equal(wanted, live)
        with averager.applied():
            assert torch.equal(run.evaluate(), wanted)
        assert torch.equal(run.evaluate(), live)
    gathered = dict(run.model.named_parameters())
    with raises(ValueError, "is a weight that FSDP2 has gathered", "reshard()"):
        polyak.Averager(gathered, "uniform()")


def a_block_refuses_what_it_must(sharded: Sharded) -> None:
    run = Training(sharded)
    averager = polyak.Averager(run.model, RULES)
    run.train(3, averager)
    before = run.parts()
    with averager.applied("ema"):
        inside = run.parts()
        for call in (averager.update, averager.state_dict, lambda: averager.average("all")):
            with raises(RuntimeError, "inside applied('ema')"):
                call()
        with raises(RuntimeError, "applied('all') inside applied('ema')"), averager.applied("all"):
            pass
        with averager.applied("ema"):
            require_same(run.parts(), inside)
        require_same(run.parts(), inside)
    require_same(run.parts(), before)


def what_was_sharded_later_is_refused(sharded: Sharded) -> None:
    model = plain()
    averager = polyak.Averager(model, "uniform()")
    sharded(model)
    with raises(RuntimeError, "first.weight", "Shard(", "shard the model before"):
        averager.update()
    with torch.device("meta"):
        model = Net()
    sharded(model)
    with raises(ValueError, "scale", "meta device"):
        polyak.Averager(model, "uniform()")


def flat_parameters_are_refused(sharded: Sharded) -> None:
    """Within whatever else."""
    model = sharded(plain())
    device = torch.device("cpu")
    flat = FullyShardedDataParallel(nn.Linear(2, 2), device_id=device)
    model.add_module("flat", flat)
    with raises(ValueError, "flat is sharded by FullyShardedDataParallel", "fully_shard"):
        polyak.Averager(model, "uniform()")


def replaced_weights_are_followed(sharded: Sharded) -> None:
    """New parameters, and parameters whose parts alone are new, also when they were never filled."""
    with torch.device("meta"):
        model = Net()
    sharded(model)
    model.to_empty(device="cpu")
    begun = polyak.Averager(model, "window(1)")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for item in begun.tracked:
            item.local().fill_(3)
    begun.update()
    assert all((to_local(tensor) == 3).all() for tensor in begun.average().values())
    run = Training(sharded, torch.float32)
    averager = polyak.Averager(run.model, "window(1)")
    run.train(1, averager)
    seen = averager.tracked[0].held()
    run.model.load_state_dict({n: t * 2 for n, t in run.model.state_dict().items()}, assign=True)
    assert averager.tracked[0].held() is not seen
    averager.update()
    require_same(whole(averager.average()), whole(run.model.state_dict()))
    run.model.double()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(4)
    averager.update()
    parts = run.parts()
    require_same(parts, {n: to_local(t).to(parts[n]) for n, t in averager.average().items()})


def states_hold_the_slots_and_are_loaded_back(sharded: Sharded) -> None:
    run = Training(sharded)
    averager = polyak.Averager(run.model, RULES, rounding="compensated")
    run.train(4, averager)
    state = averager.state_dict()
    slot = state["averages"]["ema"]["slots"]["average"]
    held = run.model.state_dict()
    for name, tensor in slot.items():
        if isinstance(held[name], DTensor):
            assert (tensor.placements, tensor.shape) == (held[name].placements, held[name].shape)
            assert tensor.stride() == held[name].stride()
    average = {n: whole(averager.average(n)) for n in RULES}
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    save({"average": state}, checkpoint_id=folder[0])
    twin = Training(sharded)
    other = polyak.Averager(twin.model, RULES, rounding="compensated")
    twin.train(1)
    twin.train(3, other)
    read = {"average": other.state_dict()}
    load(read, checkpoint_id=folder[0])
    other.load_state_dict(read["average"])
    assert other.count == 4
    for name in RULES:
        require_same(whole(other.average(name)), average[name])
    to_local(slot["first.weight"]).fill_(7)
    assert (whole(averager.average("ema"))["first.weight"] == 7).all()
    refuse_other_layouts(other)


def refuse_other_layouts(averager: polyak.Averager) -> None:
    before = whole(averager.average("ema"))
    for spoil in (whole, replicated):
        state = averager.state_dict()
        slots = state["averages"]["ema"]["slots"]
        slots["average"] = spoil(slots["average"])
        with raises(ValueError, "first.weight", "Shard("):
            averager.load_state_dict(state)
    require_same(whole(averager.average("ema")), before)


def replicated(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {n: distribute_tensor(t, mesh, [Replicate()]) for n, t in whole(weights).items()}


def copy_to_writes_parts(sharded: Sharded) -> None:
    run, other = Training(sharded), Training(sharded)
    averager = polyak.Averager(run.model, "uniform()")
    run.train(3, averager)
    other.evaluate()
    averager.copy_to(other.model)
    require_same(whole(other.model.state_dict()), whole(averager.average()))
    run.evaluate()
    averager.copy_to(run.model)
    require_same(whole(run.model.state_dict()), whole(averager.average()))
    assert torch.equal(run.evaluate(), other.evaluate())
    with raises(ValueError, "first.weight", "Shard("):
        averager.copy_to(plain())


def a_pull_moves_parts(sharded: Sharded) -> None:
    """Every rank pulls its own shards, also where FSDP2 has left the root whole; none communicates."""
    run = Training(sharded)
    averager = polyak.Averager(run.model, RULES)
    run.train(4, averager)
    run.evaluate()
    for name in RULES:
        before = {key: t.clone() for key, t in whole(run.model.state_dict()).items()}
        average = whole(averager.average(name))
        with CommDebugMode() as communication:
            averager.pull(0.3, name)
        assert communication.get_total_counts() == 0
        copied = {i.name for i in averager.tracked if i.policy == "copy"}
        for key, tensor in whole(run.model.state_dict()).items():
            moved = before[key] if key in copied else torch.lerp(before[key], average[key], 0.3)
            assert torch.equal(tensor, moved), key
    run.train(1, averager)


def the_summary_tells_parts(sharded: Sharded) -> None:
    run = Training(sharded)
    averager = polyak.Averager(run.model, "uniform()")
    row = next(row for row in averager.summary().rows if row.name == "first.weight")
    assert row.shape == tuple(run.parts()["first.weight"].shape) != (8, 5)
    assert "part of (8, 5)" in row.reason
    mesh = run.model.first.weight.device_mesh  # type: ignore[attr-defined]
    groups = [dist.get_process_group_ranks(group) for group in mesh.get_all_groups()]
    assert f"on ranks {' x '.join(map(str, groups))}" in row.reason


def what_a_rank_would_decide_alone_is_refused(sharded: Sharded) -> None:
    run = Training(sharded)
    with raises(ValueError, 'nonfinite is "skip"', "sharded"):
        polyak.Averager(run.model, "uniform()", nonfinite="skip")
    with raises(ValueError, "device is cuda", "sharded"):
        polyak.Averager(run.model, "uniform()", device="cuda")


LAWS: list[Callable[[Sharded], None]] = [
    the_average_is_that_of_one_process,
    adapters_alone_are_averaged,
    an_update_neither_communicates_nor_dispatches,
    memory_stays_flat_while_the_decay_changes,
    names_are_those_of_the_plain_model,
    applied_leaves_the_trajectory_as_it_was,
    narrow_weights_come_back_bit_for_bit,
    equal_parts_are_rounded_alike,
    an_exception_restores,
    weights_gathered_ahead_are_not_taken_for_others,
    a_part_of_a_model_is_resharded_with_it,
    a_block_refuses_what_it_must,
    what_was_sharded_later_is_refused,
    flat_parameters_are_refused,
    replaced_weights_are_followed,
    states_hold_the_slots_and_are_loaded_back,
    copy_to_writes_parts,
    a_pull_moves_parts,
    the_summary_tells_parts,
    what_a_rank_would_decide_alone_is_refused,
]


def run_laws(folder: Path, rank: int, world: int, laws: Sequence[Callable[[], None]]) -> NoReturn:
    """Prints a line a law that holds; ends at the first that does not, as other ranks may wait."""
    code = 0
    try:
        dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=world)
        for law in laws:
            law()
            print(law.__name__, flush=True)
            dist.barrier()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may not let go


def of(sharded: Sharded) -> list[Callable[[], None]]:
    """All laws of models sharded so, with names that tell it."""
    held: list[Callable[[], None]] = []
    for law in LAWS:
        bound = partial(law, sharded)
        bound.__name__ = f"{sharded.__name__}: {law.__name__}"  # type: ignore[attr-defined]
        held.append(bound)
    return held


def laws_on(world: int) -> list[Callable[[], None]]:
    more = [grid, hybrid] if world == 4 else [offloaded]
    return [law for sharded in [fsdp, tensor_parallel, *more] for law in of(sharded)]


if __name__ == "__main__":
    run_laws(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), laws_on(int(sys.argv[3])))
