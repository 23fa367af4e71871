"""`applied`: the model carries the average, and the live weights come back whatever happens."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from models import Everything, assert_same, everything, pointers, snapshot, wander
from patience import HANG
from polyak import Averager, Exponential, Uniform, Window
from polyak._engine import open_swaps
from polyak._engine.exchange import Exchange
from polyak.rules import Rule
from rule_examples import RULE_EXAMPLES, each_rule

EXAMPLES = [rule for rules in RULE_EXAMPLES.values() for rule in rules]


def moved(
    rule: Rule, dtype: torch.dtype = torch.float32, slots: torch.dtype | None = None
) -> tuple[Everything, Averager]:
    """A model and its averager after a few steps of a random walk."""
    torch.manual_seed(0)
    model = everything(dtype)
    averager = Averager(model, rule, dtype=slots)
    for step in range(9):
        wander(model, step)
        averager.update()
    wander(model, 100)
    return model, averager


@pytest.mark.parametrize("rule", each_rule(EXAMPLES), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_model_carries_the_average_and_gets_its_weights_back(
    rule: Rule, dtype: torch.dtype
) -> None:
    model, averager = moved(rule, dtype)
    live, average, where = snapshot(model), averager.average(), pointers(model)
    with averager.applied():
        inside = snapshot(model)
        assert pointers(model) == where
    rounded = {name: tensor.to(live[name].dtype) for name, tensor in average.items()}
    assert_same({name: inside[name] for name in average}, rounded)
    assert torch.equal(inside["cache"], live["cache"])
    assert_same(snapshot(model), live)
    assert pointers(model) == where
    assert_same(averager.average(), average)


def test_slots_of_another_dtype_leave_no_trace() -> None:
    model, averager = moved(Exponential(0.9), slots=torch.float64)
    live, average = snapshot(model), averager.average()
    with averager.applied():
        assert torch.equal(model.body.weight, average["body.weight"].float())
    assert_same(snapshot(model), live)
    assert_same(averager.average(), average)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_restores(error: type[BaseException]) -> None:
    model, averager = moved(Exponential(0.9))
    live, average = snapshot(model), averager.average()
    with pytest.raises(error), averager.applied():
        raise error
    assert_same(snapshot(model), live)
    assert_same(averager.average(), average)
    averager.update()


def test_an_exception_on_the_way_in_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    model, averager = moved(Exponential(0.9))
    live, average = snapshot(model), averager.average()
    exchange, entered = Exchange.to, 0

    def fails_at_the_second(self: Exchange, exchanged: bool) -> None:
        nonlocal entered
        entered += exchanged
        if exchanged and entered == 2:
            raise MemoryError("no room")
        exchange(self, exchanged)

    monkeypatch.setattr(Exchange, "to", fails_at_the_second)
    with pytest.raises(MemoryError, match="no room"), averager.applied():
        pass
    monkeypatch.undo()
    assert_same(snapshot(model), live)
    assert_same(averager.average(), average)


def test_an_inner_block_of_the_same_average_is_harmless() -> None:
    model, averager = moved(Exponential(0.9))
    live = snapshot(model)
    with averager.applied():
        outer = snapshot(model)
        with averager.applied():
            assert_same(snapshot(model), outer)
        assert_same(snapshot(model), outer)
    assert_same(snapshot(model), live)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda a: a.update(), "update"),
        (lambda a: a.average("fast"), "average"),
        (lambda a: a.state_dict(), "state_dict"),
        (lambda a: a.load_state_dict({}), "load_state_dict"),
        (lambda a: a.summary(), "summary"),
        (lambda a: a.copy_to(nn.Linear(2, 2), "fast"), "copy_to"),
        (lambda a: a.applied("slow").__enter__(), "applied('slow')"),
    ],
)
def test_calls_inside_are_errors(call: Callable[[Averager], object], name: str) -> None:
    model = nn.Linear(2, 2)
    averager = Averager(model, {"fast": Exponential(0.5), "slow": Exponential(0.9)})
    averager.update()
    live = snapshot(model)
    with averager.applied("fast"):
        with pytest.raises(RuntimeError) as raised:
            call(averager)
        expected = f"{name} inside applied('fast'): the model has the average's weights there"
        assert str(raised.value).startswith(expected)
    assert_same(snapshot(model), live)


def test_weights_written_to_inside_are_reported_and_the_live_ones_are_back() -> None:
    model, averager = moved(Exponential(0.9))
    live = snapshot(model)
    with (
        pytest.raises(
            RuntimeError, match=r"body.weight was written to. .* and the average is damaged"
        ),
        averager.applied(),
        torch.no_grad(),
    ):
        model.body.weight.add_(1.0)
    assert_same(snapshot(model), live)


def test_a_forward_in_train_mode_inside_does_not_touch_the_average() -> None:
    model, averager = moved(Exponential(0.9))
    live, average = snapshot(model), averager.average()
    model.train()
    with averager.applied():
        model(torch.tensor([0, 1, 2]))
    assert_same(snapshot(model), live)
    assert_same(averager.average(), average)


def test_weights_replaced_inside_come_back_and_the_average_stays() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averager = Averager(model, Exponential(0.9))
    averager.update()
    wander(model, 0)
    live, average = snapshot(model), averager.average()
    state = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
    with (
        pytest.raises(
            RuntimeError, match=r"0.weight was replaced; .* what was put there is dropped"
        ),
        averager.applied(),
    ):
        model.load_state_dict(state, assign=True)
    assert_same(snapshot(model), live)
    assert_same(averager.average(), average)


def test_weights_moved_inside_come_back_and_the_average_is_spoilt() -> None:
    model = nn.Linear(3, 4)
    averager = Averager(model, Exponential(0.9))
    averager.update()
    saved = copy.deepcopy(averager.state_dict())
    average = averager.average()
    wander(model, 0)
    live = snapshot(model)
    with pytest.raises(RuntimeError, match=r"weight was moved; bias was moved"), averager.applied():
        model.bfloat16().float()
    assert_same(snapshot(model), live)
    for call in (averager.average, averager.state_dict, lambda: averager.applied().__enter__()):
        with pytest.raises(RuntimeError, match=r"load a saved state first.*the average is damaged"):
            call()
    averager.load_state_dict(saved)
    assert_same(averager.average(), average)


@pytest.mark.parametrize("size", [3, 16, 64])
def test_weights_that_move_twice_do_not_come_to_lie_where_they_were(size: int) -> None:
    """Else the average would be rounded, and nothing would be told."""
    for _ in range(20):
        model = nn.Linear(size, size, bias=False)
        averager = Averager(model, Exponential(0.9))
        averager.update()
        with pytest.raises(RuntimeError, match="weight was moved"), averager.applied():
            model.bfloat16().float()


def test_a_block_that_ended_keeps_no_memory_of_weights() -> None:
    model = nn.Linear(16, 16, bias=False)
    averager = Averager(model, Exponential(0.9))
    averager.update()
    block = averager.applied()
    with block:
        pass
    before = StorageWeakRef(model.weight.untyped_storage())
    model.bfloat16()
    assert before.expired()


def test_an_exception_after_a_write_says_so_in_a_note() -> None:
    model = nn.Linear(3, 4)
    averager = Averager(model, Exponential(0.9))
    averager.update()
    live = snapshot(model)
    with pytest.raises(ValueError, match="mine") as raised, averager.applied(), torch.no_grad():
        model.weight.fill_(9.0)
        raise ValueError("mine")
    assert "weight was written to" in raised.value.__notes__[0]
    assert_same(snapshot(model), live)
    with pytest.raises(RuntimeError, match="average: load a saved state first"):
        averager.average()


def test_writes_to_weights_kept_aside_are_reported_and_dropped() -> None:
    model = nn.Linear(3, 4)
    averager = Averager(model, Window(2))
    averager.update()
    averager.update()
    average = averager.average()
    with (
        pytest.raises(
            RuntimeError, match=r"weight was written to. .* what was put there is dropped"
        ),
        averager.applied(),
        torch.no_grad(),
    ):
        model.weight.fill_(9.0)
    assert_same(averager.average(), average)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_tensor_removed_inside_does_not_keep_the_others() -> None:
    plain, normed = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(plain, torch.nn.utils.weight_norm(normed))
    averager = Averager(model, Exponential(0.5))
    averager.update()
    wander(model, 0)
    live = plain.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"1.weight_g was removed"), averager.applied():
        torch.nn.utils.remove_weight_norm(normed)
    assert torch.equal(plain.weight, live)
    with pytest.raises(RuntimeError, match=r"missing: 1.weight_g"):
        averager.update()


CTRL_C = """
import os, signal, sys, threading, time
import torch, polyak
torch.set_num_threads(1)
kinds = {"large": [4_000_000], "small": [8] * 2000}
weights = {str(i): torch.full((n,), 3.0) for i, n in enumerate(kinds[sys.argv[1]])}
averager = polyak.Averager(weights, "exponential(0.5)")
for tensor in weights.values():
    tensor.fill_(1.0)
averager.update()
for tensor in weights.values():
    tensor.fill_(3.0)
averager.update()
with averager.applied():
    pass
began = time.perf_counter()
with averager.applied():
    pass
span = time.perf_counter() - began
hits = 0
for trial in range(60):
    def interrupt():
        time.sleep(1.2 * span * trial / 60)
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        with averager.applied():
            pass
        thread.join()
        time.sleep(0.01)
    except KeyboardInterrupt:
        hits += 1
    thread.join()
    assert all(bool((tensor == 3.0).all()) for tensor in weights.values()), trial
    assert all(bool((tensor == 2.0).all()) for tensor in averager.average().values()), trial
assert hits == 60, hits
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["large", "small"])
def test_ctrl_c_at_any_moment_loses_nothing(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C, kind], capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stderr


# Each process leaves the block; the one that is named leaves it first.
FORKED = """
import mmap, os, sys, torch, numpy
from polyak import Averager
def in_file(size, shared):
    os.truncate(os.open(path, os.O_RDWR | os.O_CREAT), size * 4)
    return torch.from_file(path, shared=shared, size=size)
MEMORY = {
    "share_memory": lambda size: torch.zeros(size).share_memory_(),
    "an anonymous map": lambda size: torch.frombuffer(mmap.mmap(-1, size * 4), dtype=torch.float32),
    "a map of numpy": lambda size: torch.from_numpy(numpy.memmap(path, numpy.float32, "w+", shape=(size,))),
    "a file": lambda size: in_file(size, True),
    "a private map of a file": lambda size: in_file(size, False),
    "slots": torch.zeros,
    "a slot of a state": torch.zeros,
    "a slot shared in the block": torch.zeros,
}
def held(value, *tensors):
    return all(bool((tensor == value).all()) for tensor in tensors)
def tried(kind, first):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(600, 600))
    flat = MEMORY[kind](sum(parameter.numel() for parameter in model.parameters()))
    for parameter in model.parameters():
        parameter.data, flat = flat[: parameter.numel()].view(parameter.shape), flat[parameter.numel() :]
    model[0].weight = torch.nn.Parameter(torch.zeros(2, 3))  # in memory of its own
    averager = Averager(model, "uniform()")
    for value in (1.0, 3.0):
        for parameter in model.parameters():
            parameter.data.fill_(value)
        averager.update()
    with averager.applied():  # what a block finds out is kept for the next one
        pass
    if kind == "slots":
        averager.module().share_memory()
    slot = averager.state_dict()["averages"]["average"]["slots"]["average"]["1.weight"]
    if kind == "a slot of a state":
        slot.share_memory_()
    forked, child_is_there = os.pipe()
    waits, parent_has_left = os.pipe()
    child = False
    try:
        with averager.applied():
            if kind == "a slot shared in the block":
                slot.share_memory_()
            child = os.fork() == 0
            if child:
                os.write(child_is_there, b"1")
                first == "parent" and os.read(waits, 1)
                raise SystemExit
            os.read(forked, 1)
            if first == "child":
                assert os.wait()[1] == 0, kind
            assert held(2.0, *model.parameters()), kind
    except SystemExit:
        private = kind == "a private map of a file" or "slot" in kind
        there = held(3.0, model[0].weight)
        live = 3.0 if private or first == "parent" else 2.0
        there &= held(live, model[0].bias, *model[1].parameters())
        try:
            said = str(held(2.0, *averager.average().values()))
        except RuntimeError as error:
            said = str(error)
        print(kind, said, file=sys.stderr)
        wanted = "average: load a saved state first. The process was forked"
        os._exit(not there or ("True" if private else wanted) not in said)
    os.write(parent_has_left, b"1")
    assert first == "child" or os.wait()[1] == 0, kind
    assert held(3.0, *model.parameters()) and held(2.0, *averager.average().values()), kind
for kind in MEMORY:
    path = f"{sys.argv[1]}/{kind}"
    tried(kind, "child")
    tried(kind, "parent")
"""


def test_a_block_on_shared_memory_is_that_of_the_process_that_entered_it(tmp_path: Path) -> None:
    """Of every kind of memory, one after the other in one process."""
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


def test_another_process_that_shares_the_slots_has_the_average_in_a_block_too() -> None:
    """A forked process would see it as this view does, which has the memory after its module is gone."""
    model = nn.Linear(3, 2)
    averager = Averager(model, Exponential(0.5))
    averager.update()
    teacher = averager.module().get_parameter("weight").detach()
    teacher.share_memory_()
    average = teacher.clone()
    wander(model, 1)
    with averager.applied():
        assert torch.equal(teacher, average) and torch.equal(model.weight, average)


def test_a_graph_recorded_before_is_still_valid() -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, Exponential(0.5))
    averager.update()
    wander(model, 1)
    inputs = torch.randn(4, 3, requires_grad=True)
    loss = model(inputs).square().sum()
    (expected,) = torch.autograd.grad(loss, inputs, retain_graph=True)
    with averager.applied(), torch.no_grad():
        model(inputs)
    (gradient,) = torch.autograd.grad(loss, inputs)
    assert torch.equal(gradient, expected)


def test_training_goes_on_along_the_very_same_path() -> None:
    def train(evaluate: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = Everything()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        averager = Averager(model, Exponential(0.9))
        for step in range(6):
            model(torch.randint(5, (8,))).logsumexp(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            averager.update()
            if evaluate and step % 2:
                with averager.applied(), torch.no_grad():
                    model.eval()(torch.tensor([0, 1]))
                model.train()
        return snapshot(model)

    assert_same(train(evaluate=True), train(evaluate=False))


MAKES_TENSORS = {
    torch.ops.aten.clone.default,
    torch.ops.aten.empty_like.default,
}
if hasattr(torch.ops.aten, "_foreach_clone"):  # since torch 2.8
    MAKES_TENSORS.add(torch.ops.aten._foreach_clone.default)


def test_a_single_slot_needs_no_third_copy() -> None:
    model = nn.Linear(3000, 1000)
    averager = Averager(model, Uniform())
    averager.update()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if func in MAKES_TENSORS:
                made = out if isinstance(out, (list, tuple)) else [out]
                largest = max(largest, sum(t.numel() * t.element_size() for t in made))
            return out

    with Watch(), averager.applied():
        pass
    assert 0 < largest <= 1 << 20


def test_compiled_code_sees_the_average_without_a_recompile() -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, Exponential(0.5))
    averager.update()
    wander(model, 0)
    inputs = torch.randn(4, 3)
    expected = torch.func.functional_call(model, averager.average(), (inputs,))
    calls = 0

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        nonlocal calls
        calls += 1
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=count)
    live = compiled(inputs)
    with averager.applied():
        torch.testing.assert_close(compiled(inputs), expected)
    assert torch.equal(compiled(inputs), live)
    assert calls == 1


def test_a_decorated_function_runs_in_a_block() -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, Exponential(0.5))
    averager.update()
    average, _ = snapshot(model), wander(model, 1)
    live = snapshot(model)
    seen = averager.applied()(lambda: snapshot(model))()
    assert_same(seen, average)
    assert_same(snapshot(model), live)


def generator() -> Iterator[int]:
    yield 1


async def coroutine() -> int:
    return 1


async def both() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    "function",
    [generator, coroutine, both, partial(generator)],
    ids=["generator", "coroutine", "both", "partial"],
)
def test_a_function_whose_body_runs_after_its_call_is_not_decorated(function: Any) -> None:
    averager = Averager(nn.Linear(3, 2), Exponential(0.5))
    averager.update()
    with pytest.raises(TypeError, match="a generator or coroutine function: its body runs after"):
        averager.applied()(function)


HELD: dict[str, Callable[[Averager], object]] = {
    "nothing": lambda _: None,
    "the handle": lambda averager: averager._swapper.kept[-1].block,
    "the averager": lambda averager: averager,
}


@pytest.mark.parametrize("slots", [None, torch.float64], ids=["exchanged", "aside"])
@pytest.mark.parametrize("held", HELD)
def test_a_block_between_hooks_lasts_as_long_as_someone_can_leave_it(held: str, slots: Any) -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, Exponential(0.5), dtype=slots)
    averager.update()
    wander(model, 1)
    live = snapshot(model)
    averager.applied().enter()
    kept = HELD[held](averager)
    del averager
    gc.collect()
    assert (held == "nothing") == torch.equal(model.weight, live["weight"])
    if isinstance(kept, Averager):
        kept = kept.applied()
    if kept is not None:
        cast(Any, kept).leave()
    assert_same(snapshot(model), live)
    assert open_swaps.OPEN == []
