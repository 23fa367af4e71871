"""torch's modes: no call changes one, wherever a signal handler raises in it, and none changes an average.

A new call joins `CALLS` by one line, a new mode `MODES`. A signal comes once at each place of the code at
which Python lets a handler run.
"""

from __future__ import annotations

import gc
import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import polyak
from models import assert_same, snapshot, wander
from polyak import EMA, Averager, Bema, Exponential, Uniform, norms
from quick import some_quick


class LateError(Exception):
    """What the handler raises."""


def late(*_: object) -> None:
    raise LateError


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, late)
    gc.collect()
    gc.disable()  # Python swallows what is raised while it collects
    yield
    gc.enable()
    signal.signal(signal.SIGUSR1, before)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1).bfloat16())


def averager(rule: polyak.Rule | None = None, **options: object) -> Averager:
    """An averager after two updates."""
    made = Averager(network(), rule or Exponential(0.5), **options)  # type: ignore[arg-type]
    made.update()
    made.update()
    return made


def block(averager: Averager) -> None:
    with averager.applied():
        pass


def ema() -> EMA:
    made = EMA(network(), update_after_step=0)
    made.update()
    return made


CALLS: dict[str, tuple[Callable[[], object], Callable[..., object]]] = {
    "update": (averager, Averager.update),
    "update, guarded": (lambda: averager(nonfinite="error"), Averager.update),
    "update, stochastic": (lambda: averager(dtype=torch.bfloat16, rounding="stochastic"), Averager.update),
    "update, compensated": (lambda: averager(rounding="compensated"), Averager.update),
    "average": (averager, Averager.average),
    "average of two terms": (lambda: averager(Bema()), Averager.average),
    "weights": (averager, lambda a: dict(a.weights())),
    "summary": (averager, Averager.summary),
    "state_dict": (averager, Averager.state_dict),
    "load_state_dict": (averager, lambda a: a.load_state_dict(a.state_dict())),
    "begin": (averager, lambda a: a.begin(dict(a.average()))),
    "pull": (averager, lambda a: a.pull(0.5)),
    "change_rule": (averager, lambda a: a.change_rule(Uniform())),
    "to": (averager, lambda a: a.to(dtype=torch.float64)),
    "copy_to": (averager, lambda a: a.copy_to(a.average())),
    "module": (averager, lambda a: a.module(copy=True)),
    "applied": (averager, block),
    "EMA": (network, EMA),
    "EMA, update": (ema, EMA.update),
    "recalibrate": (network, lambda m: norms.recalibrate(m[:2], [torch.ones(3, 2)])),
}  # fmt: skip


WATCHED = tuple(str(Path(m.__file__).parent) for m in (polyak, torch.autograd, torch.utils))  # type: ignore[arg-type]
"""Where modes are set and set back."""


class SignalAt:
    """A profile function that counts the moments at which Python runs handlers, and sends a signal at one."""

    def __init__(self, moment: int = 0) -> None:
        self.moment, self.count = moment, 0
        self.places: dict[tuple[CodeType, int, str], int] = {}

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event not in ("call", "c_return") or not code.co_filename.startswith(WATCHED):
            return
        if code.co_flags & inspect.CO_GENERATOR:
            return  # Python swallows what is raised while it closes a generator
        self.count += 1
        self.places.setdefault((code, frame.f_lasti, event), self.count)
        if self.count == self.moment:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGUSR1)

    def run(self, call: Callable[[object], object], subject: object) -> None:
        sys.setprofile(self)
        try:
            call(subject)
        finally:
            sys.setprofile(None)


def modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CALLS)
def test_a_signal_leaves_torchs_modes_as_they_were(name: str) -> None:
    make, call = CALLS[name]
    call(make())  # the first call imports modules
    looks = SignalAt()
    looks.run(call, make())
    stopped = 0
    for moment in looks.places.values():
        try:
            SignalAt(moment).run(call, make())
        except Exception as error:  # a copy that was stopped says so by an error of its own
            stopped += isinstance(error, LateError)
            left = modes()  # while the frames of the call are still there
            torch.set_grad_enabled(True)
            assert left == (True, False), moment
    assert stopped > len(looks.places) / 2


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "without gradients": torch.no_grad,
    "another default device": lambda: torch.device("meta"),
    "another default dtype": default_dtype,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two slots": {"rule": Bema()},
    "stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
    "compensated": {"rounding": "compensated"},
    "guarded": {"nonfinite": "skip"},
}


def under(
    mode: Callable[[], AbstractContextManager[Any]], **options: Any
) -> list[dict[str, Tensor]]:
    """An average, the model inside and after a block, a resumed average and a copied module."""
    model, rule = network(), options.pop("rule", Exponential(0.5))
    averager = Averager(model, rule, **options)
    for step in range(5):
        wander(model, step)
        with mode():
            averager.update()
    with mode(), averager.applied():
        seen = [snapshot(model)]
    seen += [snapshot(model), averager.average()]
    with mode():
        other = Averager(model, rule, **options)
        other.load_state_dict(averager.state_dict())
        other.update()
        module = averager.module(copy=True)
    assert not any(tensor.is_inference() for tensor in module.parameters())
    return [*seen, other.average(), snapshot(module)]


@pytest.mark.parametrize(
    ("mode", "options"),
    some_quick(product(MODES, OPTIONS), lambda each: each[1] == "plain" or each[0] == "inference"),
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_an_average_is_the_same_under_every_mode(mode: str, options: str) -> None:
    plain, seen = under(nullcontext, **OPTIONS[options]), under(MODES[mode], **OPTIONS[options])
    for wanted, held in zip(plain, seen, strict=True):
        assert_same(held, wanted)


class Same(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1


KEEPING: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "cached parametrizations": parametrize.cached,
}


@pytest.mark.parametrize("kept", KEEPING)
def test_no_weight_is_read_as_torch_kept_it_from_before(kept: str) -> None:
    """Casts and parametrizations that a forward pass has computed are computed again."""
    model = nn.Linear(4, 1, bias=False)
    if kept == "cached parametrizations":  # autocast keeps casts of parameters only
        parametrize.register_parametrization(model, "weight", Same())
    averager = Averager(model, polyak.Uniform())

    def forward() -> Any:
        return model(torch.ones(1, 4)).item()

    for value in (0.0, 2.0):
        nn.init.constant_(next(model.parameters()), value)
        averager.update()
    with KEEPING[kept]():
        assert forward() == 8
        with averager.applied():
            assert forward() == 4
        assert forward() == 8
        averager.pull(0.5)
        assert forward() == 6
        averager.copy_to(model)
        assert forward() == 4
