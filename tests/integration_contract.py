"""The contract of every integration: what a framework's training gives, against a plain loop.

A `Host` trains the network of this file with its framework. Every test in `LAWS` takes a host and an
empty folder. The test of an integration runs them all:

    @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
    def test_contract(law, tmp_path):
        law(host, tmp_path)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from polyak import Averager, Pull

State = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]

RULES = {"fast": "exponential(0.6)", "slow": "uniform()"}
STEPS, EVERY = 12, 3
"""The training has so many steps of one batch each; an evaluation follows every `EVERY` steps."""
LR, MOMENTUM = 0.05, 0.5
HALF = 6
"""Where a run stops that is resumed: at an evaluation."""
SKIPPED = 4
"""The step, counted from 0, that a GradScaler skips because `batches(skip=True)` overflows there."""
MONITORED = "fast"
PULL = Pull(0.5, every=4, name="fast")
"""A pull after updates 4, 8 and 12: a run that stops at `HALF` stops between two of them."""


class EvaluationError(RuntimeError):
    """What the network raises when it is told to."""


class Net(nn.Module):
    """A network with running statistics that can fail in the n-th forward pass of its evaluations."""

    def __init__(self, fails_at: float = math.inf) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
        self._left = fails_at

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            self._left -= 1
            if self._left == 0:
                raise EvaluationError("in the evaluation of an average")
        out: Tensor = self.body(inputs)
        return out


IN_AN_AVERAGE = 3
"""`Net(fails_at=IN_AN_AVERAGE)` fails in the second of the three passes of the first evaluation: an average's."""


def net(*, fails: bool = False) -> Net:
    """The network with its first weights."""
    torch.manual_seed(3)
    return Net(IN_AN_AVERAGE if fails else math.inf)


def optimizer(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def _batch(seed: int, size: int, sign: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 3, generator=generator)
    noise = torch.randn(size, 1, generator=generator)
    return inputs, sign * inputs.sum(1, keepdim=True) + 0.5 * noise


def batches(*, skip: bool = False) -> list[Batch]:
    """The batch of each step, in order. The last ones mislead: the best average is not the last one."""
    found = [_batch(step, 8, float(step < 8)) for step in range(STEPS)]
    if skip:
        found[SKIPPED] = found[SKIPPED][0], found[SKIPPED][1] * math.inf
    return found


def held_out() -> list[Batch]:
    """The two batches of every evaluation."""
    return [_batch(100 + i, 16) for i in range(2)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


@torch.no_grad()
def evaluate(state: Mapping[str, Tensor]) -> float:
    """The mean loss over the held-out batches of a network with these weights."""
    model = Net()
    model.load_state_dict(dict(state))
    model.eval()
    return mean_loss(model)


def mean_loss(model: Any) -> float:
    """The mean loss over the held-out batches of a network as it is, in its mode."""
    return sum(loss(model, batch).item() for batch in held_out()) / len(held_out())


@dataclass
class Outcome:
    """What a training leaves.

    `metrics` has one mapping for each evaluation: "live" and the name of each average -> loss. `best`
    is the exported file of the average `MONITORED` at the evaluation at which it was best.
    """

    live: State
    averages: dict[str, State]
    count: int
    metrics: list[dict[str, float]] = field(default_factory=list)
    best: Path | None = None


class Host(Protocol):
    """A training of `net(fails=fails)` on `batches(skip=skip)` by a framework, averaged by `RULES`.

    It uses `optimizer`, takes the batches in order, evaluates after every `EVERY` steps, and keeps what it
    needs to go on, and what was best by the average `MONITORED`, in the folder. It stops after
    `until` steps. With `resume` it goes on from what an earlier call left in the folder. With `skip` it
    trains with a GradScaler. With `fails` it catches `EvaluationError` and returns what is there then.
    `pull` is an option of the averager.
    """

    def __call__(
        self,
        folder: Path,
        *,
        until: int = STEPS,
        resume: bool = False,
        skip: bool = False,
        fails: bool = False,
        pull: Pull | None = None,
    ) -> Outcome: ...


@cache
def plain(until: int = STEPS, *, skip: bool = False, pull: Pull | None = None) -> Outcome:
    """The training by a plain loop. Every metric is that of a fresh network with the weights."""
    model = net()
    steps, averager = optimizer(model), Averager(model, RULES)
    out = Outcome({}, {}, 0)
    for step, batch in enumerate(batches(skip=skip)[:until]):
        loss(model, batch).backward()
        if not (skip and step == SKIPPED):
            steps.step()
            averager.update()
            if pull is not None and averager.count % pull.every == 0:
                averager.pull(pull.fraction, pull.name)
        steps.zero_grad()
        if (step + 1) % EVERY == 0:
            weights = {"live": model.state_dict()} | {n: averager.average(n) for n in RULES}
            out.metrics.append({name: evaluate(each) for name, each in weights.items()})
    out.live = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out.averages = {name: averager.average(name) for name in RULES}
    out.count = averager.count
    return out


def require_equal(got: Outcome, wanted: Outcome) -> None:
    """Live weights and all averages are equal bit for bit."""
    assert got.count == wanted.count
    assert got.averages.keys() == wanted.averages.keys()
    states = [("live", got.live, wanted.live)]
    states += [(name, got.averages[name], wanted.averages[name]) for name in wanted.averages]
    for label, ours, theirs in states:
        assert ours.keys() == theirs.keys(), label
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), f"{label}: {name}"


def trains_as_a_plain_loop(host: Host, folder: Path) -> None:
    """Live weights and averages are those of the plain loop, bit for bit, in spite of evaluations."""
    require_equal(host(folder), plain())


def evaluates_live_and_every_average(host: Host, folder: Path) -> None:
    """Each evaluation has the metric of the live weights and of every average."""
    got, wanted = host(folder).metrics, plain().metrics
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def exports_the_average_that_was_best(host: Host, folder: Path) -> None:
    """The best file holds the average of the step at which an independent evaluation is best."""
    metrics = [each[MONITORED] for each in plain().metrics]
    where = min(range(len(metrics)), key=metrics.__getitem__)
    live = [each["live"] for each in plain().metrics]
    assert where not in (0, len(metrics) - 1, live.index(min(live))), "the choice must be visible"
    best = host(folder).best
    assert best is not None
    wanted = plain((where + 1) * EVERY).averages[MONITORED]
    got = load_file(best)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    assert evaluate(got) == pytest.approx(metrics[where], rel=1e-6)


def resumes_bit_for_bit(host: Host, folder: Path) -> None:
    """A run that stops and is resumed ends as one that was not interrupted."""
    require_equal(host(folder, until=HALF), plain(HALF))
    require_equal(host(folder, resume=True), plain())


def keeps_live_weights_when_an_evaluation_fails(host: Host, folder: Path) -> None:
    """An exception while the model carries an average leaves the live weights and averages."""
    require_equal(host(folder, fails=True), plain(EVERY))


def counts_no_skipped_step(host: Host, folder: Path) -> None:
    """A step that a GradScaler skips makes no update."""
    got = host(folder, skip=True)
    assert got.count == STEPS - 1
    require_equal(got, plain(skip=True))


def pulls_as_a_plain_loop(host: Host, folder: Path) -> None:
    """The pulls are those of the plain loop, bit for bit, also after a stop between two of them.

    A resumed run that forgets them is refused.
    """
    require_equal(host(folder, until=HALF, pull=PULL), plain(HALF, pull=PULL))
    with pytest.raises(ValueError, match=r"saved with pull=.*pull=None: make it with the same"):
        host(folder, resume=True)
    require_equal(host(folder, resume=True, pull=PULL), plain(pull=PULL))
    assert not torch.equal(plain().live["body.0.weight"], plain(pull=PULL).live["body.0.weight"])


LAWS: list[Callable[[Host, Path], None]] = [
    trains_as_a_plain_loop,
    evaluates_live_and_every_average,
    exports_the_average_that_was_best,
    resumes_bit_for_bit,
    keeps_live_weights_when_an_evaluation_fails,
    counts_no_skipped_step,
    pulls_as_a_plain_loop,
]
