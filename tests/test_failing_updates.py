"""Updates that fail: nothing has moved, or the average is marked and cannot be read as one.

A new way to resize a tensor joins `RESIZED` by one line, a new kind of averager joins `SETUPS`.
"""

from __future__ import annotations

import copy
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from models import assert_same, snapshot, wander
from polyak import EMA, Averager, Exponential, Tail, Uniform, Window
from polyak import _tensors as tensors
from polyak._engine import watch
from polyak._engine.offload import Courier
from quick import first_quick, slow_if, some_quick
from test_offload import Device

ROOT = str(Path(polyak.__file__).parent)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 4))


def data(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Any], None]:
    """Sets `.data` of a tensor to ones of another shape or dtype."""

    def resize(model: Any) -> None:
        tensor = model.get_parameter(name) if "running" not in name else model.get_buffer(name)
        tensor.data = torch.ones(shape, dtype=dtype)

    return resize


@torch.no_grad()
def resized(model: Any) -> None:
    model[1].running_mean.resize_(5)


@torch.no_grad()
def set_to_another(model: Any) -> None:
    model[2].weight.set_(torch.ones(1, 2))


RESIZED: dict[str, tuple[Callable[[Any], None], str]] = {
    "one row": (data("2.weight", 1, 2), "2.weight"),
    "one column": (data("2.weight", 4, 1), "2.weight"),
    "one dimension less": (data("2.weight", 2), "2.weight"),
    "a number": (data("2.weight"), "2.weight"),
    "one element": (data("0.weight", 1), "0.weight"),
    "more rows": (data("2.weight", 8, 2), "2.weight"),
    "fewer rows": (data("2.weight", 3, 2), "2.weight"),
    "more dimensions": (data("2.weight", 2, 4, 2), "2.weight"),
    "empty": (data("2.weight", 0), "2.weight"),
    "a bias": (data("2.bias", 1), "2.bias"),
    "a running statistic": (data("1.running_mean", 1), "1.running_mean"),
    "a copied buffer": (lambda m: m[1].num_batches_tracked.resize_(3), "1.num_batches_tracked"),
    "a copied buffer set": (lambda m: m[1].num_batches_tracked.set_(torch.ones(2).long()), "1.num_"),
    "a copied buffer, complex": (lambda m: setattr(m[1].num_batches_tracked, "data", torch.ones((), dtype=torch.complex64)), "1.num_"),
    "resize_": (resized, "1.running_mean"),
    "set_": (set_to_another, "2.weight"),
    "transposed": (data("0.weight", 3, 2), "0.weight"),
    "flat": (data("0.weight", 6), "0.weight"),
    "complex": (data("0.weight", 2, 3, dtype=torch.complex64), "0.weight"),
    "complex, not the first": (data("2.weight", 4, 2, dtype=torch.complex64), "2.weight"),
    "integer": (lambda m: setattr(m[1].running_var, "data", torch.ones(2).long()), "1.running_var"),
}  # fmt: skip

SETUPS: dict[str, dict[str, Any]] = {
    "plain": {"rule": Exponential(0.9)},
    "uniform": {"rule": Uniform()},
    "two": {"rule": {"ema": Exponential(0.9), "window": Window(2)}},
    "bema": {"rule": "bema()"},
    "float64 slots": {"rule": Exponential(0.9), "dtype": torch.float64},
    "compensated": {"rule": Exponential(0.9), "rounding": "compensated"},
    "stochastic": {"rule": Exponential(0.9), "rounding": "stochastic", "dtype": torch.bfloat16},
    "tail": {"rule": Tail(Uniform(), 100)},
    "every 2": {"rule": Exponential(0.9), "every": 2},
    "guarded": {"rule": Exponential(0.9), "nonfinite": "skip"},
}


def begun(setup: str, calls: int = 4) -> tuple[nn.Sequential, Averager]:
    model = network()
    averager = Averager(model, **SETUPS[setup])
    for step in range(calls):
        wander(model, step)
        averager.update()
    return model, averager


def state(averager: Averager) -> dict[str, Any]:
    return copy.deepcopy(averager.state_dict())


def flat(data: Any, path: str = "") -> dict[str, Any]:
    """path -> number, text or tensor in a state."""
    if not isinstance(data, dict):
        return {path: data}
    return {k: v for key, each in data.items() for k, v in flat(each, f"{path}/{key}").items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    one, other = flat(a), flat(b)
    return one.keys() == other.keys() and all(
        torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k] for k, v in one.items()
    )


@pytest.mark.parametrize(
    ("setup", "way"),
    [slow_if((s, w), (i + j) % 3) for i, s in enumerate(SETUPS) for j, w in enumerate(RESIZED)],
)
def test_another_shape_is_refused_before_anything_moves(way: str, setup: str) -> None:
    change, name = RESIZED[way]
    (model, averager), (twin, undisturbed) = begun(setup), begun(setup)
    before, kept = state(averager), [t.data for t in (*model.parameters(), *model.buffers())]
    kept_buffers = [buffer.clone() for buffer in model.buffers()]
    change(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"different: .*{name}|{name} "):
            for _ in range(averager.every):
                averager.update()
    for tensor, content in zip((*model.parameters(), *model.buffers()), kept, strict=True):
        tensor.data = content
    model[1].running_mean, model[1].running_var, model[1].num_batches_tracked = kept_buffers
    after = state(averager)
    after["calls"], after["elapsed"] = before["calls"], before["elapsed"]
    assert same(after, before)
    if averager.every > 1:
        return
    for moved, updated in ((model, averager), (twin, undisturbed)):
        wander(moved, 9)
        updated.update()
    assert same(state(averager), state(undisturbed))


@pytest.mark.parametrize("nonfinite", ["allow", "skip", "error"])
@pytest.mark.parametrize("shape", [(), (3,), (1, 1)])
def test_a_copied_buffer_of_another_shape_is_refused_at_the_first_update(
    shape: tuple[int, ...], nonfinite: Any
) -> None:
    """Also where the update would be left out."""
    model = network()
    averager = Averager(model, Uniform(), buffers="copy", nonfinite=nonfinite)
    model.get_buffer("1.running_var").data = torch.ones(shape)
    bias = model.get_parameter("0.bias").data
    bias.fill_(torch.inf)
    with pytest.raises(RuntimeError, match=r"different: 1.running_var"):
        averager.update()
    assert averager.count == 0
    model.get_buffer("1.running_var").data = torch.ones(2)
    bias.zero_()
    averager.update()
    assert (averager.count, averager.skipped) == (1, 0)
    assert averager.average()["1.running_var"].shape == (2,)


def test_the_law_fails_where_shapes_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one row is stretched over all rows of its slot."""
    model, averager = begun("plain")
    monkeypatch.setattr("polyak._engine.live.ModelTensors.unchanged", lambda _: True)
    RESIZED["one row"][0](model)
    averager.update()
    assert averager.clock.n == 5


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("way", ["one row", "a number", "one column", "complex, not the first"])
def test_a_shape_that_updates_have_overlooked_marks_the_average(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LEAST_LOOKS", 1)
    model, averager = begun("plain")
    good = state(averager)
    kept = model[2].weight.data
    RESIZED[way][0](model)
    noticed = 0
    for _ in range(20):
        try:
            averager.update()
        except RuntimeError as error:
            assert "2.weight" in str(error)
            noticed += 1
    assert noticed >= 2
    model[2].weight.data = kept
    averager.update()
    for call in (averager.average, averager.state_dict, averager.applied().__enter__):
        with pytest.raises(
            RuntimeError, match=r"load a saved state first. 2.weight got another shape or"
        ):
            call()
    averager.load_state_dict(good)
    assert same(state(averager), good)
    model[2].weight.data = torch.ones(1, 2)
    with pytest.raises(RuntimeError, match=r"average: not the tensors .*\n  different: 2.weight"):
        averager.average()


@pytest.mark.parametrize("mend", ["load_state_dict", "copy_params_from_model_to_ema"])
@pytest.mark.parametrize("way", ["one row", "a number", "one column"])
def test_a_shape_that_the_articles_class_has_overlooked_stops_it(
    way: str, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its average is read without a call, so the next call says it."""
    monkeypatch.setattr(watch, "LEAST_LOOKS", 1)
    model = network()
    ema = EMA(model, beta=0.9, update_after_step=0, update_every=1)
    for step in range(4):
        wander(model, step)
        ema.update()
    good = copy.deepcopy(ema.state_dict())
    weight = model.get_parameter("2.weight")
    kept = weight.data
    RESIZED[way][0](model)
    refused = r"2.weight got another shape .* earlier updates may\s+have averaged"
    with pytest.raises(RuntimeError, match=refused):
        for _ in range(20):
            ema.update()
    with pytest.raises(RuntimeError, match=r"2\.weight"):
        ema.copy_params_from_model_to_ema()
    weight.data = kept
    for online in (model, copy.deepcopy(model), model):
        ema.online_model = online
        for call in (ema.update, ema.update_moving_average):
            with pytest.raises(
                RuntimeError, match=rf"EMA: load a saved state, .* first. {refused}"
            ):
                call()
    if mend == "load_state_dict":
        ema.load_state_dict(good)
        assert same(ema.state_dict(), good)
    else:
        ema.copy_params_from_model_to_ema()
        assert torch.equal(ema.ema_model.get_parameter("2.weight"), kept)
    ema.update()


def test_large_models_are_looked_at_whole() -> None:
    model = nn.Sequential(*(nn.Linear(200, 200) for _ in range(20)))
    averager = Averager(model, Uniform())
    averager.update()
    model[19].weight.data = torch.ones(1, 200)
    with pytest.raises(RuntimeError, match=r"different: 19.weight"):
        averager.update()
    tiny = nn.Sequential(*(nn.Linear(1, 1) for _ in range(100)))
    assert Averager(tiny, Uniform())._live._watch._looks == watch.LEAST_LOOKS


def test_freed_memory_is_refused() -> None:
    model, averager = begun("plain")
    model.get_parameter("2.weight").untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"2.weight has no memory: its storage was freed"):
        averager.average()
    with pytest.raises(ValueError, match=r"2.weight has no memory: its storage was freed"):
        Averager(model, Uniform())


def test_a_copied_buffer_of_another_dtype_is_copied_as_it_is() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.tensor([0.1, 3.0]))
    averager = Averager(model, Uniform())
    averager.update()
    model.double()
    averager.load_state_dict(averager.state_dict())
    model.get_buffer("scale").fill_(0.1)
    averager.update()
    assert averager.average()["scale"].tolist() == [0.1, 0.1]
    averager.load_state_dict(averager.state_dict())
    model.register_buffer("scale", torch.tensor([7, 8]))
    averager.update()
    assert averager.average()["scale"].tolist() == [7, 8]
    assert averager.average()["scale"].dtype == torch.int64


# Updates that stop halfway


class Failing:
    """torch's foreach lerp, which fails from its second call on."""

    def __init__(self) -> None:
        self.calls, self._lerp = 0, torch._foreach_lerp_

    def __call__(self, *arguments: Any) -> None:
        self.calls += 1
        if self.calls >= 2:
            raise torch.OutOfMemoryError("no room")
        self._lerp(*arguments)


def mixed() -> dict[str, Tensor]:
    return {"v": torch.ones(3), "w": torch.ones(3, dtype=torch.float64)}


@pytest.mark.parametrize("rule", [Exponential(0.9), Uniform(), "bema()"], ids=str)
def test_an_update_that_stops_halfway_marks_the_average(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = mixed()
    averager = Averager(weights, rule)
    averager.update()
    averager.update()
    good = state(averager)
    monkeypatch.setattr(torch, "_foreach_lerp_", Failing())
    with pytest.raises(torch.OutOfMemoryError):
        averager.update()
    monkeypatch.undo()
    assert averager.count == 2
    averager.update()
    for call in (averager.average, averager.state_dict, averager.applied().__enter__):
        with pytest.raises(
            RuntimeError, match=r"load a saved state first. An update stopped halfway \(OutOfMem"
        ):
            call()
    averager.load_state_dict(good)
    assert same(state(averager), good)


@pytest.mark.parametrize("rule", [Window(2), Tail(Uniform(), 100), Exponential(0.9)], ids=str)
def test_slots_that_are_copied_again_are_an_average_again(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = mixed()
    averager = Averager(weights, rule)
    copies = torch._foreach_copy_
    first_time = isinstance(rule, Exponential)
    for _ in range(0 if first_time else 3):
        averager.update()
    calls = 0

    def fails(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls >= 2:
            raise torch.OutOfMemoryError("no room")
        copies(*arguments)

    weights["v"] += 1
    monkeypatch.setattr(torch, "_foreach_copy_", fails)
    with pytest.raises(torch.OutOfMemoryError):
        averager.update()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"stopped halfway|before the first update"):
        averager.average()
    averager.update()
    expected = 2.0 if first_time or isinstance(rule, Tail) else 1.5
    assert averager.average()["v"].tolist() == [expected] * 3


def test_an_average_whose_courier_fails_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    courier = Courier(Device("compute"))
    monkeypatch.setattr("polyak._engine.updating.courier_for", lambda *_: courier)
    averager = Averager(mixed(), Exponential(0.9), device="cpu")
    averager.update()
    good = state(averager)
    monkeypatch.setattr(torch, "_foreach_lerp_", Failing())
    averager.update()
    with pytest.raises(torch.OutOfMemoryError):
        averager.average()
    with pytest.raises(RuntimeError, match="An update stopped halfway"):
        averager.average()
    averager.load_state_dict(good)
    assert same(state(averager), good)


# Signals


class Interruption:
    """Sends one signal at the so-manieth moment in polyak at which Python lets a handler run."""

    def __init__(self, moment: int, handler: Callable[[], None]) -> None:
        self.moment, self.handler, self.count = moment, handler, 0

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGUSR1, lambda *_: self.handler())
        self._hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        signal.signal(signal.SIGUSR1, self._before)
        sys.unraisablehook = self._hook  # Python drops what is raised while it deletes an object

    def _look(self, frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(ROOT):
            self.count += 1
            if self.count == self.moment:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGUSR1)


def interrupted(
    action: Callable[[], object], moment: int, error: type[BaseException] = KeyboardInterrupt
) -> bool:
    """Whether a signal came, and its handler raised, while an action ran."""
    came = False

    def handler() -> None:
        nonlocal came
        came = True
        raise error

    with Interruption(moment, handler), suppress(error):
        action()
    return came


@pytest.mark.parametrize(
    ("setup", "calls"),
    some_quick(product(SETUPS, [0, 5]), [("plain", 5), ("compensated", 5), ("bema", 5)]),
)
def test_an_update_that_a_signal_stops_was_made_or_not(
    setup: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment at which a handler can run, and whether the handler's error is one of torch's."""
    monkeypatch.setattr("polyak._parts.CHUNK_BYTES", 512)
    monkeypatch.setattr(tensors, "SHARED_BYTES", 64)
    model, averager = begun(setup, calls)
    before = state(averager)
    wander(model, 9)
    averager.update()
    after = state(averager)
    moment, came, stopped = 0, True, []
    while came:
        moment += 1
        averager.load_state_dict(before)
        error = RuntimeError if moment % 2 else KeyboardInterrupt
        came = interrupted(averager.update, moment, error)
        now = state(averager)
        stopped.append(same(now, after))
        assert stopped[-1] or same(now, before), moment
        if not stopped[-1]:
            averager.update()
            assert same(state(averager), after), moment
    assert not stopped[0]
    assert averager.every > 1 or sum(stopped) > 3


def test_a_module_that_has_the_slots_follows_an_update_that_a_signal_stops() -> None:
    model, averager = begun("plain")
    module = averager.module()
    moment, came = 0, True
    while came:
        moment += 1
        wander(model, moment)
        came = interrupted(averager.update, moment)
        assert_same(snapshot(module), averager.average())
    assert moment > 20


MOVES: dict[str, Callable[[Averager], object]] = {
    "pull": lambda a: a.pull(0.5),
    "pull to the average": lambda a: a.pull(1.0),
    "copy_to": lambda a: a.copy_to(a._live.model),
    "an update and its pull": Averager.update,
}
"""Calls that write to the live weights."""


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES)
def test_a_call_that_moves_live_weights_is_made_or_not_whatever_signal_comes(move: str) -> None:
    def begun() -> tuple[nn.Module, Averager]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).bfloat16())
        averager = Averager(model, Exponential(0.5), pull=polyak.Pull(0.5, every=2))
        averager.update()
        wander(model, 1)
        return model, averager

    def now(model: nn.Module, averager: Averager) -> dict[str, Any]:
        return {**state(averager), "model": snapshot(model)}

    model, averager = begun()
    before = now(model, averager)
    MOVES[move](averager)
    after, moment, came = now(model, averager), 0, True
    while came:
        moment += 1
        model, averager = begun()
        came = interrupted(lambda held=averager: MOVES[move](held), moment)  # type: ignore[misc]
        seen = now(model, averager)
        assert same(seen, after) or (came and same(seen, before)), moment
    assert moment > 20


@pytest.mark.parametrize("calls", [0, 1, 4])
@pytest.mark.parametrize("dtype", first_quick([torch.float32, torch.bfloat16]))
def test_a_call_of_the_articles_class_that_a_signal_stops_was_made_or_not(
    calls: int, dtype: torch.dtype
) -> None:
    model = network().to(dtype)
    model.register_buffer("scale", torch.ones(2, dtype=torch.int64))
    ema = EMA(model, beta=0.9, update_after_step=1, update_every=2, ignore_names={"2.bias"})
    for step in range(calls):
        wander(model, step)
        ema.update()

    def held() -> dict[str, Any]:
        return {**copy.deepcopy(ema.state_dict()), "decay": ema.get_current_decay()}

    before, state = held(), copy.deepcopy(ema.state_dict())
    wander(model, 9)
    state |= {name: t.clone() for name, t in ema.state_dict().items() if "online" in name}
    ema.update()
    after, moment, came = held(), 0, True
    while came:
        moment += 1
        ema.load_state_dict(state)
        came = interrupted(ema.update, moment)
        now = {n: v for n, v in held().items() if "online" not in n}
        if not same(now, {n: after[n] for n in now}):
            assert same(now, {n: before[n] for n in now}), moment
            ema.update()
        assert same(held(), after), moment
    assert moment > 5


@pytest.mark.parametrize("setup", first_quick(["plain", "two", "compensated"]))
def test_a_state_is_taken_over_or_not_whatever_signal_comes(setup: str) -> None:
    _, averager = begun(setup)
    before = state(averager)
    averager.update()
    after = state(averager)
    moment, came = 0, True
    while came:
        moment += 1
        averager.load_state_dict(before)
        came = interrupted(lambda: averager.load_state_dict(after), moment)
        now = state(averager)
        assert same(now, before) or same(now, after), moment
    assert same(now, after)
    assert moment > 50


@pytest.mark.parametrize("setup", ["plain", "two", "compensated", "bema"])
def test_a_handler_reads_the_average_before_or_after_the_update(setup: str) -> None:
    _, averager = begun(setup)
    name = next(iter(averager.rules))
    before = state(averager)
    first = averager.average(name)
    averager.update()
    second = averager.average(name)
    moment, read = 0, True
    seen: list[dict[str, Tensor]] = []

    def handler() -> None:
        nonlocal read
        read = True
        with suppress(RuntimeError):
            seen.append(averager.average(name))

    while read:
        moment += 1
        averager.load_state_dict(before)
        read = False
        seen.clear()

        with Interruption(moment, handler):
            averager.update()
        for average in seen:
            assert any(
                all(torch.equal(average[n], other[n]) for n in average) for other in (first, second)
            ), moment


@pytest.mark.parametrize(
    "options", [{"param_or_buffer_names_no_ema": {"2.bias"}}, {"ignore_names": {"2.bias"}}]
)
@pytest.mark.parametrize("shape", [(1,), (), (4, 4), (2,)])
def test_the_articles_class_copies_no_other_shape(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    ema = EMA(network(), update_after_step=0, update_every=1, **options)
    before = {n: t.clone() for n, t in ema.state_dict().items() if "online" not in n}
    wander(ema.model, 1)
    ema.model.get_parameter("2.bias").data = torch.ones(shape)
    for call in (ema.update, ema.copy_params_from_model_to_ema):
        with pytest.raises(RuntimeError, match=r"2.bias"):
            call()
    now = {n: t for n, t in ema.state_dict().items() if "online" not in n}
    assert_same(now, before)
    assert ema._calls == 0


def test_the_articles_class_counts_no_call_that_was_refused() -> None:
    ema = EMA(network(), beta=0.9, update_after_step=0, update_every=1)
    for step in range(3):
        wander(ema.model, step)
        ema.update()
    before = {
        name: tensor.clone() for name, tensor in ema.state_dict().items() if "online" not in name
    }
    kept = ema.model.get_parameter("2.weight").data
    ema.model.get_parameter("2.weight").data = torch.ones(1, 2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"different: 2.weight"):
            ema.update()
    ema.model.get_parameter("2.weight").data = kept
    now = {name: tensor for name, tensor in ema.state_dict().items() if "online" not in name}
    assert_same(now, before)
    assert ema.get_current_decay() == ema.rule.decay(3)
    assert snapshot(ema.model)["2.weight"].shape == (4, 2)


BROKEN = """
import torch

def copy_(journal, copies):
    journal._at += 1
    if journal._at > journal._done:
        for tensors, contents in copies:
            torch._foreach_copy_(tensors, contents)
        journal.end()

def sequentially(changes):
    for owner, attributes in changes:
        for name, value in attributes.items():
            setattr(owner, name, value)
"""
"""What takes a state over attribute by attribute, or copies without a note; run as sources of polyak's."""

scope: dict[str, Any] = {}
exec(compile(BROKEN, f"{ROOT}/broken.py", "exec"), scope)


FAULTS: dict[str, tuple[str, Any, Callable[[pytest.MonkeyPatch], None]]] = {
    "no mark": (
        "polyak._engine.slots.Average.tear",
        lambda *_: None,
        lambda m: test_an_update_that_stops_halfway_marks_the_average(Uniform(), m),
    ),
    "what is written is written again": (
        "polyak._tensors.Journal.again",
        lambda journal: setattr(journal, "_at", 0),
        lambda m: test_an_update_that_a_signal_stops_was_made_or_not("plain", 5, m),
    ),
    "a copy that was broken off is forgotten": (
        "polyak._tensors.Journal.copy_",
        scope["copy_"],
        lambda m: test_an_update_that_a_signal_stops_was_made_or_not("compensated", 5, m),
    ),
    "an update that goes no further": (
        "polyak._engine.updating.Motion.finish",
        lambda *_: None,
        lambda m: test_an_update_that_a_signal_stops_was_made_or_not("two", 5, m),
    ),
    "slots that are kept": (
        "polyak._engine.slots.Average.back_to",
        lambda average, tick: setattr(average, "tick", tick),
        lambda m: test_an_update_that_a_signal_stops_was_made_or_not("two", 0, m),
    ),
    "a call that is half made": (
        "polyak.ema.undisturbed",
        lambda *_: None,
        lambda _: test_a_call_of_the_articles_class_that_a_signal_stops_was_made_or_not(
            4, torch.float32
        ),
    ),
    "no word that an update is under way": (
        "polyak._engine.slots.Average.moving",
        property(lambda _: False, lambda *_: None),
        lambda _: test_a_handler_reads_the_average_before_or_after_the_update("bema"),
    ),
    "a state is taken over bit by bit": (
        "polyak._engine.resumable.set_together",
        scope["sequentially"],
        lambda _: test_a_state_is_taken_over_or_not_whatever_signal_comes("plain"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_laws_of_signals_fail_with_the_fault_put_back(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controls."""
    name, broken, law = FAULTS[fault]
    monkeypatch.setattr(name, broken, raising=False)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        law(monkeypatch)
