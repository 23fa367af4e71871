"""polyak beside ignite's own EMAHandler, in the same training: prints a table.

    python benchmarks/ignite_averages.py

Time is the processor's, in rounds that take turns, as a ratio to the training without an average.
"""

from __future__ import annotations

import math
import time
import warnings
from itertools import pairwise
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
from ignite.engine import Engine, Events  # noqa: E402
from ignite.handlers import EMAHandler  # noqa: E402
from torch import nn  # noqa: E402

import polyak  # noqa: E402
from in_training import State, furthest, held, in_turns  # noqa: E402

DECAY, STEPS, ROUNDS, SKIPPED = 0.9, 16, 5, 7


class Nothing:
    """A training without an average."""

    count = 0

    def __init__(self, run: Run) -> None:
        self.net = run.net

    def state(self) -> dict[str, Any]:
        return {}

    def average(self) -> State:
        return dict(self.net.state_dict())


class Ours(Nothing):
    """polyak."""

    def __init__(self, run: Run) -> None:
        self.averager = polyak.Averager(run.net, f"exponential({DECAY})")
        self.averager.attach(run.optimizer, run.scaler)

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.averager.count

    def state(self) -> dict[str, Any]:
        return {"average": self.averager}

    def average(self) -> State:
        return self.averager.average()


class Theirs(Nothing):
    """`EMAHandler`, attached as its documentation does, and its model in the checkpoint."""

    def __init__(self, run: Run) -> None:
        self.handler = EMAHandler(run.net, momentum=1 - DECAY)
        self.handler.attach(run.engine)
        run.engine.add_event_handler(Events.ITERATION_COMPLETED, self._counted)

    def _counted(self) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"average": self.handler.ema_model}

    def average(self) -> State:
        return dict(self.handler.ema_model.state_dict())


MAKE: dict[str, type[Nothing]] = {"no average": Nothing, "polyak": Ours, "`EMAHandler`": Theirs}


class Run:
    """A network of 1.1 M weights with BatchNorm, always from the same weights and batches."""

    def __init__(self, make: type[Nothing], *, accumulate: int = 1, skips: bool = False) -> None:
        torch.manual_seed(0)
        blocks = [(nn.Linear(512, 512), nn.BatchNorm1d(512)) for _ in range(4)]
        self.net = nn.Sequential(*(layer for block in blocks for layer in block))
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)
        self.scaler = torch.amp.GradScaler("cpu", enabled=skips)
        self.accumulate, self.skips, self.marks = accumulate, skips, [0.0]
        self.engine = Engine(self.step)
        self.averaged = make(self)
        self.engine.add_event_handler(Events.ITERATION_COMPLETED, self.mark)

    def step(self, engine: Engine, seed: int) -> None:
        inputs = torch.randn(32, 512, generator=torch.Generator().manual_seed(seed))
        factor = math.inf if self.skips and seed == SKIPPED else 1.0
        self.scaler.scale(self.net(inputs).square().mean() * factor).backward()
        if engine.state.iteration % self.accumulate == 0:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()

    def mark(self) -> None:
        self.marks.append(time.process_time())

    def train(self, first: int = 0, last: int = STEPS) -> Run:
        self.engine.run(list(range(first, last)))
        return self

    def parts(self) -> dict[str, Any]:
        return {"net": self.net, "optimizer": self.optimizer, **self.averaged.state()}


def resumed(make: type[Nothing]) -> float:
    """How far the average of a resumed run is from that of one without a stop, at most."""
    whole, half, run = Run(make).train(), Run(make).train(0, STEPS // 2), Run(make)
    for name, part in run.parts().items():
        part.load_state_dict(half.parts()[name].state_dict())
    return furthest(run.train(STEPS // 2).averaged.average(), whole.averaged.average())


def follows_live_statistics(make: type[Nothing]) -> str:
    """Whether the average changes when a batch goes through the live network alone."""
    run = Run(make).train()
    before = {name: tensor.clone() for name, tensor in run.averaged.average().items()}
    run.net(torch.ones(32, 512))
    return "yes" if furthest(run.averaged.average(), before) else "no"


def steps(make: type[Nothing]) -> list[float]:
    """The processor's seconds of the steps of a training, but the first."""
    return [b - a for a, b in pairwise(Run(make).train().marks[4:])]


def main() -> None:
    torch.set_num_threads(1)
    clocks = in_turns(MAKE, ROUNDS, steps)
    memory = {name: held(Run(make).train) for name, make in MAKE.items()}
    base, *names = MAKE
    one = sum(tensor.nbytes for tensor in Run(Nothing).averaged.average().values())
    rows = {
        "time of a step, to that without an average": [clocks[n] / clocks[base] for n in names],
        "copies of the weights held": [(memory[n] - memory[base]) / one for n in names],
    }
    print(f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for title, values in rows.items():
        print(f"| {title} | {' | '.join(f'{value:.2f}' for value in values)} |")
    makes = [MAKE[name] for name in names]
    cells = {
        "the average of a resumed run differs by at most": [f"{resumed(m):.1g}" for m in makes],
        f"updates in {STEPS // 4} steps of 4 accumulated batches": [
            str(Run(m, accumulate=4).train().averaged.count) for m in makes
        ],
        f"updates in {STEPS} steps, of which AMP skips one": [
            str(Run(m, skips=True).train().averaged.count) for m in makes
        ],
        "a batch through the live network changes the average": [
            follows_live_statistics(m) for m in makes
        ],
    }
    for title, texts in cells.items():
        print(f"| {title} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
