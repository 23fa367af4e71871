"""Laws of averages divided over replicas, run by each rank: `python replicas_ranks.py FOLDER RANK WORLD`."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's own

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import polyak
from polyak import _hold as hold
from polyak import checkpoints
from polyak._engine import applying
from polyak._engine.applying import Swapper
from polyak._ranks import replicas
from polyak._ranks.agreement import chosen
from polyak._ranks.replicas import gather_
from polyak._ranks.sharding import spread
from sharding_ranks import (
    DTensorOperations,
    plain,
    raises,
    require_same,
    resident_bytes,
    run_laws,
    to_local,
    whole,
)

RULES = {"ema": "exponential(0.9)", "last": "window(3)", "bema": "bema()", "all": "uniform()"}


class Net(nn.Module):
    """Rows that divide by neither 2 nor 4, fewer rows than ranks, none, a scalar, buffers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.last = nn.Linear(5, 7)
        self.one = nn.Parameter(torch.ones(1, 7))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.none = nn.Parameter(torch.empty(0, 3), requires_grad=False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x)).tanh().mean((2, 3))
        return self.last(hidden) * self.one * self.scale  # type: ignore[no-any-return]


class Training:
    """A model on every rank, with data of its own there."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.plain = Net().to(dtype)
        self.plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = DistributedDataParallel(self.plain, broadcast_buffers=False)
        self.optimizer = torch.optim.SGD(self.plain.parameters(), lr=0.1, momentum=0.9)
        self.steps = 0

    def train(self, steps: int, *averagers: polyak.Averager) -> None:
        for _ in range(steps):
            self.model.train()
            own = torch.Generator().manual_seed(100 * self.steps + dist.get_rank())
            rows = torch.randn(4, 3, 6, 6, generator=own, dtype=self.dtype)
            (self.model(rows) - 1).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
            for averager in averagers:
                averager.update()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Of the weights alone: the running statistics are each rank's own."""
        self.model.eval()
        rows = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        return self.plain.first(rows.to(self.dtype))  # type: ignore[no-any-return]

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.plain.state_dict().items()}


def world() -> Any:
    return dist.group.WORLD


def rows_are_those_of_the_whole_average() -> None:
    """Bit for bit, of every rule and rounding; each rank holds its rows and no others."""
    roundings: list[dict[str, Any]] = [
        {},
        {"rounding": "compensated"},
        {"dtype": torch.bfloat16},
        {"every": 3},
    ]
    for options in roundings:
        run = Training()
        full = polyak.Averager(run.model, RULES, select="*", **options)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for shard in (world(), mesh):
            divided = polyak.Averager(run.model, RULES, shard=shard, select="*", **options)
            run.train(8, full, divided)
            run.evaluate()
            run.train(4, full, divided)
            for name in RULES:
                average = divided.average(name)
                require_same(whole(average), full.average(name))
                for key, tensor in average.items():
                    rows = isinstance(tensor, DTensor)
                    assert rows == (key.split(".")[0] in ("first", "last", "one", "none") or key in ("norm.weight", "norm.bias")), key  # fmt: skip
                    assert not isinstance(tensor, DTensor) or tensor.placements == (Shard(0),)
            full = polyak.Averager(run.model, RULES, select="*", **options)


def each_rank_holds_its_part() -> None:
    model = nn.Linear(64, 64 * dist.get_world_size())
    weights = sum(p.numel() for p in model.parameters())
    averager = polyak.Averager(model, RULES, shard=world())
    for _ in range(3):
        averager.update()
    held = [
        tensor.to_local().numel()
        for average in averager.state_dict()["averages"].values()
        for slot in average["slots"].values()
        for tensor in slot.values()
    ]
    slots = 1 + 3 + 2 + 1
    assert sum(held) * dist.get_world_size() == slots * weights


def an_update_neither_communicates_nor_dispatches() -> None:
    run = Training()
    averager = polyak.Averager(run.model, {"a": "exponential(0.9, debias=True)"}, shard=world())
    run.train(2, averager)
    with CommDebugMode() as communicated:
        averager.update()
    with DTensorOperations() as dispatched:
        averager.update()
    assert communicated.get_total_counts() == 0
    assert dispatched.seen == []


def applied_carries_the_whole_average_and_leaves_no_trace() -> None:
    undisturbed = Training()
    undisturbed.train(8)
    for rule, dtype in product(("exponential(0.5)", "window(3)"), (None, torch.float32)):
        run = Training()
        full = polyak.Averager(run.model, rule, dtype=dtype)
        divided = polyak.Averager(run.model, rule, dtype=dtype, shard=world())
        run.train(5, full, divided)
        before = run.weights()
        pointers = [p.data_ptr() for p in run.plain.parameters()]
        with full.applied():
            wanted, carried = run.evaluate(), run.weights()
        with divided.applied(), divided.applied():
            assert torch.equal(run.evaluate(), wanted)
            require_same(run.weights(), carried)
            with raises(RuntimeError, "update inside applied"):
                divided.update()
        require_same(run.weights(), before)
        assert pointers == [p.data_ptr() for p in run.plain.parameters()]
        require_same(whole(divided.average()), full.average())
        run.train(3, full, divided)
        require_same(run.weights(), undisturbed.weights())
        require_same(whole(divided.average()), full.average())


def an_exception_on_one_rank_holds_up_no_other() -> None:
    """Leaving needs no other rank: the others finish their block, though one has left it."""
    undisturbed = Training()
    undisturbed.train(6)
    run = Training()
    averager = polyak.Averager(run.model, "exponential(0.5)", shard=world())
    run.train(3, averager)
    before, average = run.weights(), whole(averager.average())
    wanted = None
    try:
        with averager.applied():
            wanted = run.evaluate()
            if dist.get_rank() == 1:
                raise KeyError("on one rank")
            assert torch.equal(run.evaluate(), wanted)
    except KeyError as error:
        assert dist.get_rank() == 1
        assert not hasattr(error, "__notes__"), error.__notes__
    require_same(run.weights(), before)
    require_same(whole(averager.average()), average)
    run.train(3, averager)
    require_same(run.weights(), undisturbed.weights())


def what_fails_on_one_rank_before_the_gather_fails_on_all() -> None:
    run = Training()
    averager = polyak.Averager(run.model, "exponential(0.5)", shard=world())
    with raises(RuntimeError, "before the first update"), averager.applied():
        raise AssertionError
    run.train(2, averager)
    before = run.weights()
    if dist.get_rank() == 1:
        Swapper._plan = _fail
    try:
        wanted = MemoryError if dist.get_rank() == 1 else RuntimeError
        with raises(wanted, "no room"), averager.applied():
            raise AssertionError
    finally:
        Swapper._plan = _plan
    require_same(run.weights(), before)
    with averager.applied():
        pass
    other = Net() if dist.get_rank() == 0 else nn.Linear(2, 2)
    with raises(ValueError if dist.get_rank() else RuntimeError, "copy_to"):
        averager.copy_to(other)
    with raises(ValueError, "pull: with shard= a rank has only its rows; call copy_to(model)"):
        averager.pull(0.5)
    require_same(run.weights(), before)


def _fail(*_: Any) -> Any:
    raise MemoryError("no room")


def what_ranks_would_mix_is_refused() -> None:
    """Other averages, clocks, orders or dtypes: their rows would be put together."""
    run = Training()
    rules = {"a": "exponential(0.5)", "b": "uniform()"}
    averager = polyak.Averager(run.model, rules, shard=world())
    run.train(2, averager)
    before = run.weights()
    mine, others = ("a", "b") if dist.get_rank() == 0 else ("b", "a")
    with (
        raises(RuntimeError, "different arguments or state", f"{mine!r}", f"{others!r}"),
        averager.applied(mine),
    ):
        raise AssertionError
    with raises(RuntimeError, "different arguments or state", "applied 'a'", "copy_to 'a'"):
        if dist.get_rank() == 0:
            averager.copy_to(run.model, "a")
        else:
            with averager.applied("a"):
                raise AssertionError
    dtype = torch.float64 if dist.get_rank() == 0 else torch.float16
    with raises(RuntimeError, "different arguments or state"):
        averager.copy_to(Net().to(dtype), "a")
    require_same(run.weights(), before)
    average = whole(averager.average("a"))
    target = {name: torch.zeros_like(tensor) for name, tensor in average.items()}
    names = list(target) if dist.get_rank() == 0 else list(target)[::-1]
    averager.copy_to({name: target[name] for name in names}, "a")
    require_same(target, average)
    if dist.get_rank() == 0:
        averager.update()
    with raises(RuntimeError, "different arguments or state", "n=2", "n=3"), averager.applied("a"):
        raise AssertionError
    weights = {name: torch.zeros(4) for name in ("x", "y")}
    names = ["x", "y"] if dist.get_rank() == 0 else ["y", "x"]
    with raises(ValueError, "do not agree with rank 0", "rank 1: ", "the order of tensors"):
        polyak.Averager({name: weights[name] for name in names}, "uniform()", shard=world())
    options: list[dict[str, Any]] = [
        {},
        {"every": 2},
        {"dtype": torch.bfloat16},
        {"buffers": "copy"},
    ]
    for option in options[1:]:
        with raises(ValueError, "do not agree with rank 0", "rank 1: ", "made with"):
            given = option if dist.get_rank() else options[0]
            polyak.Averager(run.model, "uniform()", shard=world(), **given)


def what_one_rank_asks_wrongly_holds_up_no_other() -> None:
    run = Training()
    averager = polyak.Averager(run.model, "exponential(0.5)", shard=world())
    run.train(2, averager)
    before = run.weights()
    name = None if dist.get_rank() == 0 else "unknown"
    with raises((KeyError, RuntimeError), "'unknown' is unknown"), averager.applied(name):
        raise AssertionError
    dtype: Any = None if dist.get_rank() == 0 else torch.int8
    with raises((ValueError, RuntimeError), "dtype is torch.int8"):
        polyak.Averager(run.model, "uniform()", shard=world(), dtype=dtype)
    with averager.applied(), raises(RuntimeError, "update inside"):
        averager.update()
    interrupted = False
    if dist.get_rank() == 1:
        Swapper._plan = _interrupted
    try:
        with averager.applied():
            carried = run.weights()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        Swapper._plan = _plan
    assert interrupted == (dist.get_rank() == 1)
    assert interrupted or not torch.equal(carried["last.weight"], before["last.weight"])
    require_same(run.weights(), before)
    applying.gather_ = _broken
    try:
        with raises(ConnectionError, "gone"), averager.applied():
            raise AssertionError
    finally:
        applying.gather_ = gather_
    require_same(run.weights(), before)


_plan = Swapper._plan


def _interrupted(*arguments: Any) -> Any:
    os.kill(os.getpid(), signal.SIGINT)
    return _plan(*arguments)


def _broken(pairs: Sequence[tuple[Tensor, Tensor]], mesh: DeviceMesh) -> None:
    gather_(pairs[:2], mesh)
    raise ConnectionError("gone")


def only_some_of_the_ranks_share() -> None:
    """A group without the first rank; what goes wrong there is nothing to the others."""
    ranks = list(range(1, dist.get_world_size()))
    group = dist.new_group(ranks)
    if dist.get_rank() == 0:
        with raises(ValueError, "is not a member of"):
            polyak.Averager(plain(), "uniform()", shard=group)
        return
    weights = {"w": torch.arange(10.0), "b": torch.ones(3)}
    full = polyak.Averager(weights, "exponential(0.5)")
    divided = polyak.Averager(weights, "exponential(0.5)", shard=group)
    for _ in range(3):
        for tensor in weights.values():
            tensor.mul_(1.5)
        full.update()
        divided.update()
    require_same(whole(divided.average()), full.average())
    with divided.applied():
        require_same(weights, full.average())
    one = dist.get_rank() == ranks[0]
    with raises((KeyError, RuntimeError), "'x' is unknown"), divided.applied("x" if one else None):
        raise AssertionError


def nothing_may_be_left_to_divide() -> None:
    full = polyak.Averager({"w": torch.tensor(3.0)}, "uniform()")
    divided = polyak.Averager({"w": torch.tensor(3.0)}, "uniform()", shard=world())
    for averager in (full, divided):
        averager.update()
        with averager.applied():
            pass
    require_same(divided.average(), full.average())
    with raises(RuntimeError, "diverged, in w:"):
        polyak.Averager({"w": torch.tensor(float(dist.get_rank()))}, "uniform()", shard=world())


def parts_are_rounded_by_numbers_of_their_own() -> None:
    weights = {"w": torch.zeros(64 * dist.get_world_size(), dtype=torch.bfloat16)}
    options: dict[str, Any] = {"dtype": torch.bfloat16, "rounding": "stochastic"}
    rules = {"a": "exponential(0.9)", "b": "exponential(0.9)"}
    averager = polyak.Averager(weights, rules, shard=world(), **options)
    averager.update()
    weights["w"] += 1 / 3
    for _ in range(3):
        averager.update()
    a, b = (whole(averager.average(name))["w"] for name in rules)
    assert len({tuple(part.tolist()) for part in [*a.chunk(dist.get_world_size()), b[:64]]}) > dist.get_world_size()  # fmt: skip


def applying_takes_one_copy_of_the_weights() -> None:
    weights = {"w": torch.zeros(4000, 4000), "b": torch.zeros(7)}
    averager = polyak.Averager(weights, "exponential(0.5)", shard=world())
    averager.update()
    most, replicas.BUCKET_BYTES = replicas.BUCKET_BYTES, 1 << 20
    for _ in range(2):
        before = resident_bytes()
        with averager.applied():
            inside = resident_bytes() - before
    replicas.BUCKET_BYTES = most
    assert 0.9 < inside / weights["w"].nbytes < 1.35, inside


def replicas_that_differ_are_named() -> None:
    run = Training()
    averager = polyak.Averager(run.model, "uniform()", shard=world())
    averager.check_replicas()
    with torch.no_grad():
        if dist.get_rank() == 1:  # a change of order, and of the last bit of one
            run.plain.last.weight.copy_(run.plain.last.weight.flip(0))
            run.plain.state_dict()["first.bias"][4:].view(torch.int64).bitwise_xor_(1)
    nowhere = Path("/nowhere/step-1")
    for call in (
        averager.check_replicas,
        lambda: polyak.Averager(run.model, "uniform()", shard=world()),
        lambda: polyak.save(nowhere, averager),
        lambda: checkpoints.save_distributed(nowhere, {"average": averager}),
        lambda: checkpoints.export(nowhere.with_suffix(".safetensors"), averager),
    ):
        with raises(RuntimeError, "first.bias, last.weight:", "Start all ranks with the same"):
            call()
    rule = "uniform()" if dist.get_rank() else "window(2)"
    with raises(ValueError, "Averager: ranks do not agree with rank 0", "rank 1: ", "window(2)"):
        polyak.Averager(Training().model, rule, shard=world())


def a_full_average_is_one_ranks_to_save() -> None:
    """Each has it whole, so what one writes waits for no other; all together save it with the rest."""
    run = Training()
    averager = polyak.Averager(run.model, RULES)
    run.train(4, averager)
    folder = Path(chosen("folder", tempfile.mkdtemp))
    if dist.get_rank() == 0:
        recorder = polyak.Recorder(averager, folder / "run", every=1)
        assert recorder.update() is not None
        polyak.save(folder / "average", averager)
        checkpoints.export(folder / "model.safetensors", averager, "ema")
        dist.barrier()
    else:
        dist.barrier()
        patience, hold.PATIENCE = hold.PATIENCE, 0.5
        with raises(ValueError, "is in use by another process", "let one of them record"):
            polyak.Recorder(averager, folder / "run", every=1, resume=True)
        hold.PATIENCE = patience
    checkpoints.save_distributed(folder / "step", {"model": run.model, "average": averager})
    for path in ("average", "step/average"):
        fresh = polyak.Averager(run.model, RULES)
        polyak.load(folder / path, fresh)
        for name in RULES:
            require_same(fresh.average(name), averager.average(name))


def copies_are_whole() -> None:
    run, other = Training(), Training(torch.float32)
    full = polyak.Averager(run.model, "window(3)")
    divided = polyak.Averager(run.model, "window(3)", shard=world())
    run.train(4, full, divided)
    divided.copy_to(other.model)
    average = full.average()
    got = other.weights()
    require_same({n: got[n] for n in average}, {n: t.to(got[n].dtype) for n, t in average.items()})
    divided.copy_to(run.model)
    require_same({n: run.weights()[n] for n in average}, average)


def states_go_on() -> None:
    run = Training()
    first = polyak.Averager(run.model, RULES, shard=world())
    run.train(4, first)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data",))
    second = polyak.Averager(run.model, RULES, shard=mesh)
    second.load_state_dict(first.state_dict())
    run.train(4, first, second)
    for name in RULES:
        require_same(whole(second.average(name)), whole(first.average(name)))
    plain_one = polyak.Averager(run.model, RULES)
    with raises(ValueError, "first.weight", "Shard("):
        plain_one.load_state_dict(first.state_dict())


def weights_that_move_are_followed() -> None:
    run = Training(torch.float32)
    full = polyak.Averager(run.model, "window(1)")
    divided = polyak.Averager(run.model, "window(1)", shard=world())
    run.train(1, full, divided)
    for change in (_new_storage, _new_parameters, nn.Module.double):
        change(run.plain)
        with torch.no_grad():
            for parameter in run.plain.parameters():
                parameter.mul_(1.5)
        for averager in (full, divided):
            averager.update()
        require_same(whole(divided.average()), full.average())


def _new_storage(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _new_parameters(model: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def gathered_rows_fill_whole_tensors() -> None:
    """Of any shape, dtype and strides, in buckets that take several tensors or not one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = [(1,), (3,), (4, 5), (9, 2, 3), (0, 3), (2, 0), (7, 1), (64, 33), (8, 4, 3, 3)]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]
    torch.manual_seed(5)
    wanted = [torch.randn(s, dtype=d) for d, s in product(dtypes, shapes)]
    wanted += [torch.randn(6, 4, 5, 5).to(memory_format=torch.channels_last), torch.randn(5, 6).t()]
    most = replicas.BUCKET_BYTES
    for replicas.BUCKET_BYTES in (1, 300, 5000, most):
        parts = [to_local(spread(tensor, mesh)).clone() for tensor in wanted]
        got = [torch.full_like(tensor, -7) for tensor in wanted]
        gather_(list(zip(got, parts, strict=True)), mesh)
        for tensor, like in zip(got, wanted, strict=True):
            assert torch.equal(tensor, like), (tensor.shape, tensor.dtype)


def what_cannot_be_divided_is_refused() -> None:
    model = plain()
    with raises(TypeError, "shard is str", "group.WORLD"):
        polyak.Averager(model, "uniform()", shard="all")  # type: ignore[arg-type]
    with raises(ValueError, 'nonfinite is "skip"'):
        polyak.Averager(model, "uniform()", shard=world(), nonfinite="skip")
    if dist.get_world_size() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        with raises(ValueError, "a mesh of 2 dimensions", 'mesh["data"]'):
            polyak.Averager(model, "uniform()", shard=mesh)
        polyak.Averager(model, "uniform()", shard=mesh["data"])
    alone = dist.new_group([0])
    if dist.get_rank():
        with raises(ValueError, "is not a member of"):
            polyak.Averager(model, "uniform()", shard=alone)
    fully_shard(model)
    with raises(ValueError, " is sharded already", "leave `shard` out"):
        polyak.Averager(model, "uniform()", shard=world())


LAWS: list[Callable[[], None]] = [
    rows_are_those_of_the_whole_average,
    each_rank_holds_its_part,
    an_update_neither_communicates_nor_dispatches,
    applied_carries_the_whole_average_and_leaves_no_trace,
    an_exception_on_one_rank_holds_up_no_other,
    what_fails_on_one_rank_before_the_gather_fails_on_all,
    what_ranks_would_mix_is_refused,
    what_one_rank_asks_wrongly_holds_up_no_other,
    only_some_of_the_ranks_share,
    nothing_may_be_left_to_divide,
    parts_are_rounded_by_numbers_of_their_own,
    applying_takes_one_copy_of_the_weights,
    replicas_that_differ_are_named,
    copies_are_whole,
    states_go_on,
    weights_that_move_are_followed,
    gathered_rows_fill_whole_tensors,
    what_cannot_be_divided_is_refused,
]


if __name__ == "__main__":
    run_laws(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), LAWS)
