"""torch's modes stay as they were, wherever a signal handler raises in a call of polyak.

A new call joins `CALLS` by one line. A signal comes once at each place of the code at which Python lets a
handler run.
"""

from __future__ import annotations

import gc
import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch
from torch import nn

import polyak
from polyak import EMA, Averager, Bema, Exponential, Uniform, norms


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
