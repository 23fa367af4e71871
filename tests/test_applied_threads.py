"""Blocks in threads, asyncio tasks and generators: refused by name, or right, and never mixed up."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

import polyak
from models import assert_same, snapshot, wander
from polyak import EMA, Averager, Exponential, Recorder, Window
from polyak._engine import copying, open_swaps, second
from polyak._engine.exchange import Exchange
from polyak._engine.live import ModelTensors
from polyak._engine.slots import Average
from polyak._engine.updating import Motion
from polyak.checkpoints._safetensors import files
from polyak.rules import ArticleEMA

T = TypeVar("T")


def pair(*rules: Exponential | Window) -> tuple[nn.Linear, list[Averager]]:
    """A model, and an averager of it for each rule, after two updates."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    averagers = [Averager(model, rule) for rule in rules or (Exponential(0.5),)]
    for step in range(2):
        wander(model, step)
        for averager in averagers:
            averager.update()
    wander(model, 5)
    return model, averagers


def in_thread(call: Callable[[], T], name: str = "other") -> T:
    """What a call gives, or raises, in a thread of that name."""
    with ThreadPoolExecutor(1, name) as pool:
        return pool.submit(call).result()


def enter_and_leave(averager: Averager) -> None:
    with averager.applied():
        pass


@pytest.mark.parametrize("same", [True, False], ids=["the same averager", "another averager"])
@pytest.mark.parametrize("rule", [Exponential(0.9), Window(2)], ids=str)
def test_a_block_in_a_second_thread_is_refused_by_name(same: bool, rule: Exponential) -> None:
    model, (first, second) = pair(rule, Exponential(0.5))
    live, average = snapshot(model), first.average()
    with first.applied():
        inside = snapshot(model)
        with pytest.raises(RuntimeError, match="in thread 'other_0': thread 'MainThread' is in a"):
            in_thread(lambda: enter_and_leave(first if same else second))
        assert_same(snapshot(model), inside)
    assert_same(snapshot(model), live)
    assert_same(first.average(), average)
    in_thread(lambda: enter_and_leave(first if same else second))


CALLS: dict[str, tuple[int, Callable[[Averager, nn.Module], object]]] = {
    "its update": (0, lambda averager, _: averager.update()),
    "its average": (0, lambda averager, _: averager.average()),
    "its state": (0, lambda averager, _: averager.state_dict()),
    "its summary": (0, lambda averager, _: averager.summary()),
    "another's update": (1, lambda averager, _: averager.update()),
    "another's copy_to": (1, lambda averager, model: averager.copy_to(model)),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_in_another_thread_is_refused_inside_a_block(call: str) -> None:
    model, averagers = pair(Exponential(0.9), Exponential(0.5))
    first, second = averagers
    averages = first.average(), second.average()
    of, do = CALLS[call]
    with first.applied(), pytest.raises(RuntimeError, match="thread 'MainThread'"):
        in_thread(lambda: do(averagers[of], model))
    assert_same(first.average(), averages[0])
    assert_same(second.average(), averages[1])
    assert first.count == second.count == 2


def test_a_step_of_training_in_another_thread_is_refused_inside_a_block() -> None:
    model, (averager,) = pair()
    model(torch.ones(1, 3)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    live = snapshot(model)
    with averager.applied(), pytest.raises(RuntimeError, match="a step of SGD inside applied"):
        in_thread(optimizer.step)
    assert_same(snapshot(model), live)


def test_an_update_waits_for_an_exchange_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the main thread exchanges contents, an update begins and must not read any of them."""
    _, (first, second) = pair(Exponential(0.9), Exponential(0.5))
    average, began, errors = second.average(), threading.Event(), []
    exchange = Exchange.to

    def update() -> None:
        began.set()
        try:
            second.update()
        except RuntimeError as error:
            errors.append(str(error))

    def slow(self: Exchange, exchanged: bool) -> None:
        exchange(self, exchanged)
        if exchanged:
            thread.start()
            began.wait()
            thread.join(0.05)
            assert thread.is_alive()

    thread = threading.Thread(target=update)
    monkeypatch.setattr(Exchange, "to", slow)
    with first.applied():
        thread.join()
    assert "weight has an average" in errors[0]
    assert_same(second.average(), average)


TOUCHES: dict[str, tuple[object, str]] = {
    "slots are read": (Average, "read"),
    "slots move": (Motion, "run"),
    "a file is written": (files, "write"),
    "EMA copies the model": (second, "_copied"),
    "EMA looks for its slots": (second, "addresses"),
    "EMA has other slots": (Average, "adopt"),
    "EMA reads its decay": (ArticleEMA, "decay"),
    "a model is looked at again": (ModelTensors, "check"),
    "a model's places are found": (copying, "places"),
    "contents change places": (Exchange, "to"),
}
"""What reads or moves live weights or slots, and must not meet another thread's doing so."""


class Shared:
    """A model, and what may be called of its averages in any thread."""

    def __init__(self, folder: Path) -> None:
        self.model, (self.averager, self.window) = pair(Exponential(0.5), Window(2))
        self.ema = EMA(self.model, update_every=1, update_after_step=0)
        self.ema.update()
        self.narrow = EMA(nn.Linear(3, 2).bfloat16())
        self.folder = folder
        self.recorder = Recorder(self.averager, folder / "snapshots", every=1)

    def step(self) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.model(torch.ones(1, 3)).sum().backward()
        self.averager.attach(optimizer)
        optimizer.step()

    @torch.no_grad()
    def written(self) -> EMA:
        """An EMA of narrow weights; somebody has written to its second module."""
        self.narrow.ema_model.weight.add_(1)  # type: ignore[operator]
        return self.narrow


IN_TURN: dict[str, Callable[[Shared], object]] = {
    "update": lambda s: s.averager.update(),
    "a step": Shared.step,
    "average": lambda s: s.averager.average(),
    "weights": lambda s: s.window.weights()["weight"],
    "applied": lambda s: enter_and_leave(s.averager),
    "applied, read out": lambda s: enter_and_leave(s.window),
    "copy_to": lambda s: s.window.copy_to(nn.Linear(3, 2)),
    "pull": lambda s: s.averager.pull(0.5),
    "module(copy=True)": lambda s: s.window.module(copy=True),
    "save": lambda s: polyak.save(s.folder / "a", s.averager),
    "save an EMA": lambda s: polyak.save(s.folder / "a", s.ema),
    "record": lambda s: s.recorder.record(),
    "EMA": lambda s: EMA(s.model),
    "EMA.update": lambda s: s.ema.update(),
    "EMA.update_moving_average": lambda s: s.ema.update_moving_average(),
    "EMA.copy_params_from_model_to_ema": lambda s: s.ema.copy_params_from_model_to_ema(),
    "EMA.load_state_dict": lambda s: s.ema.load_state_dict(s.ema.state_dict()),
    "EMA.state_dict": lambda s: s.written().state_dict(),
    "EMA.to": lambda s: s.ema.to(torch.float64),
    "EMA.restore_ema_model_device": lambda s: s.ema.restore_ema_model_device(),
}


@pytest.mark.parametrize("call", IN_TURN)
def test_calls_take_turns(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other thread's call can come in between: whoever reads or moves has the turn."""
    shared = Shared(tmp_path)
    touched: dict[str, bool] = {}

    def watched(touch: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            touched[touch] = open_swaps.TURN._is_owned()  # type: ignore[attr-defined]
            return original(*args, **kwargs)

        return note

    for touch, (owner, name) in TOUCHES.items():
        monkeypatch.setattr(owner, name, watched(touch, getattr(owner, name)))
    IN_TURN[call](shared)
    assert touched and all(touched.values()), touched


def test_copy_to_refuses_a_block_that_began_after_it_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (first, second_one) = pair(Exponential(0.9), Exponential(0.5))
    live, write_, block = snapshot(model), copying.write_, second_one.applied()

    def late(*args: Any) -> None:
        block.__enter__()
        write_(*args)

    monkeypatch.setattr(copying, "write_", late)
    with pytest.raises(RuntimeError, match="copy_to: weight has an average, in a block"):
        first.copy_to(model)
    block.__exit__(None, None, None)
    assert_same(snapshot(model), live)


def test_models_of_their_own_are_averaged_and_applied_in_parallel() -> None:
    def work(_: int) -> None:
        model = nn.Linear(64, 64)
        averager = Averager(model, Exponential(0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _step in range(20):
            model(torch.randn(2, 64)).square().mean().backward()
            optimizer.step()
            averager.update()
            live, average = snapshot(model), averager.average()
            with averager.applied():
                assert_same(snapshot(model), average)
            assert_same(snapshot(model), live)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert open_swaps.OPEN == []


def test_threads_that_share_an_averager_never_mix_contents() -> None:
    """Some update, some apply. Each call is refused, or done whole."""
    model, (averager,) = pair()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    averager = Averager(model, Exponential(0.5))
    averager.update()
    refused = threading.Event()

    def update() -> None:
        for _ in range(300):
            try:
                averager.update()
            except RuntimeError as error:
                assert "inside applied" in str(error)
                refused.set()

    def apply() -> None:
        for _ in range(300):
            try:
                enter_and_leave(averager)
            except RuntimeError as error:
                assert "thread" in str(error)
                refused.set()

    threads = [threading.Thread(target=target) for target in (update, apply, update, apply)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {name: torch.full_like(t, 3.0) for name, t in snapshot(model).items()}
    assert_same(snapshot(model), expected)
    assert_same(averager.average(), expected)


def test_tasks_that_interleave_are_refused_by_name() -> None:
    model, (first, second) = pair(Exponential(0.9), Exponential(0.5))
    live = snapshot(model)

    async def hold(entered: asyncio.Event, done: asyncio.Event) -> None:
        with first.applied():
            inside = snapshot(model)
            entered.set()
            await done.wait()
            assert_same(snapshot(model), inside)

    async def main() -> None:
        entered, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(hold(entered, done), name="evaluation")
        await entered.wait()
        for averager in (first, second):
            with pytest.raises(RuntimeError, match="task 'evaluation' is in a block"):
                enter_and_leave(averager)
        done.set()
        await task
        enter_and_leave(second)

    asyncio.run(main())
    assert_same(snapshot(model), live)


def test_a_task_inside_a_block_of_plain_code_may_enter_it_again() -> None:
    model, (averager,) = pair()
    live, average = snapshot(model), averager.average()

    async def main() -> None:
        enter_and_leave(averager)

    with averager.applied():
        asyncio.run(main())
        assert_same(snapshot(model), average)
    assert_same(snapshot(model), live)


def holds(averager: Averager) -> Generator[int, None, None]:
    """A generator with a block in it."""
    with averager.applied():
        yield from range(3)


def test_a_generator_and_its_consumer_leave_in_any_order() -> None:
    model, (averager,) = pair()
    live, average = snapshot(model), averager.average()
    batches = holds(averager)
    next(batches)
    with averager.applied():
        assert_same(snapshot(model), average)
        batches.close()
        assert_same(snapshot(model), average)
    assert_same(snapshot(model), live)
    with averager.applied():
        batches = holds(averager)
        next(batches)
    assert_same(snapshot(model), average)
    with pytest.raises(RuntimeError, match="update inside applied"):
        averager.update()
    del batches
    assert_same(snapshot(model), live)


def test_a_generator_may_be_collected_in_another_thread() -> None:
    model, (averager,) = pair()
    live, average = snapshot(model), averager.average()
    kept = [holds(averager)]
    next(kept[0])
    assert_same(snapshot(model), average)
    in_thread(kept.clear)
    gc.collect()
    assert_same(snapshot(model), live)
    assert_same(averager.average(), average)


@pytest.mark.parametrize("entering", [True, False], ids=["on the way in", "on the way out"])
def test_a_generator_may_be_collected_amid_an_exchange(
    entering: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector runs at any allocation, and ends a block on the same weights then."""
    model, (first, second) = pair(Exponential(0.9), Exponential(0.5))
    live, averages = snapshot(model), [first.average(), second.average()]
    kept = [holds(first)]
    next(kept[0])
    exchange = Exchange._exchange
    block = second.applied()

    def collects(self: Exchange, *arguments: object) -> None:
        exchange(self, *arguments)  # type: ignore[arg-type]
        kept.clear()

    if not entering:
        block.__enter__()
    monkeypatch.setattr(Exchange, "_exchange", collects)
    if entering:
        block.__enter__()
        assert_same(snapshot(model), averages[1])
    block.__exit__(None, None, None)
    assert_same(snapshot(model), live)
    assert_same(first.average(), averages[0])
    assert_same(second.average(), averages[1])
    assert open_swaps.OPEN == []


def test_a_block_that_no_one_leaves_ends_with_its_object() -> None:
    model, (averager,) = pair()
    live = snapshot(model)
    block = averager.applied()
    block.__enter__()
    with pytest.raises(RuntimeError, match="update inside applied"):
        averager.update()
    del block
    assert_same(snapshot(model), live)
    averager.update()


def test_the_article_s_class_refuses_weights_that_carry_an_average() -> None:
    model, (averager,) = pair()
    ema = EMA(model, update_every=1, update_after_step=0)
    ema.update()
    with averager.applied(), pytest.raises(RuntimeError, match="weight has an average"):
        ema.update()
    ema.update()
