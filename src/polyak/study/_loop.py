"""Loop: one run of a study, as an ordinary training script has it.

A run is one (seed, schedule, learning rate). Four sources of variance have a seed each, so that one can
vary while the others stay: `source_seed` says which. Averages and evaluations draw no random numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from polyak.rules import LIVE
from polyak.study._judge import Judge, Values
from polyak.study._logbook import Logbook, add, curves
from polyak.study._result import Record
from polyak.study._schedules import Plateau
from polyak.study._study import Part, Study
from polyak.study._tracking import Tracking

SOURCES = ("init", "order", "dropout", "split")


class Run(NamedTuple):
    """One unit of a study's work."""

    seed: int
    schedule: str
    learning_rate: float


def source_seed(seed: int, source: str, vary: Collection[str] = SOURCES) -> int:
    """`4 seed + place of the source in SOURCES`; a source that does not vary has the seed of run 0."""
    return 4 * (seed if source in vary else 0) + SOURCES.index(source)


def train(study: Study, run: Run, vary: Collection[str] = SOURCES) -> Record:
    """Train once while all arms are tracked and evaluated, and return the measurements.

    It uses one thread and its own random numbers; the caller's are restored.
    """
    with alone():
        torch.manual_seed(source_seed(run.seed, "init", vary))
        model = study.model().train()
        data = study.data(source_seed(run.seed, "split", vary))
        batches = endless(data.train, study.batch_size, source_seed(run.seed, "order", vary))
        torch.manual_seed(source_seed(run.seed, "dropout", vary))
        optimizer = study.optimizer(model.parameters(), run.learning_rate)
        rate = Rate(study, run.schedule, optimizer)
        arms = Tracking(study, model)
        log = Logbook(study, arms, Judge(study, model, data), data)

        def step() -> None:
            began = time.perf_counter()
            optimizer.zero_grad()
            loss = study.loss(model, *next(batches))
            loss.backward()
            optimizer.step()
            trained = time.perf_counter()
            arms.update()
            log.step(loss.detach(), trained - began, time.perf_counter() - trained)

        for due in evaluated_steps(study):
            while log.count < due:
                rate.at(log.count)
                step()
            rate.judged(log.evaluate())
            log.rates.append(rate.now)
            if rate.stopped:
                break
        record = log.record()
        after = _after(study, rate, log, step)
    return {**record, "stopped_early": rate.stopped, "after_stop": after}


def _after(study: Study, rate: Rate, log: Logbook, step: Callable[[], None]) -> Record:
    """Go on after the stop as the plateau wants it; only the live weights and its arm are evaluated."""
    plateau = rate.plateau
    if plateau is None or not plateau.after:
        return {}
    arms = tuple(dict.fromkeys((LIVE, plateau.arm)))
    seen: Record = {"steps": [], "curves": curves(arms, study)}
    for _ in range(plateau.after):
        for _ in range(study.steps // study.evaluations):
            step()
        values = {arm: log.glance(arm) for arm in arms}
        rate.judged(values)
        seen["steps"].append(log.count)
        for arm in arms:
            add(seen["curves"][arm], values[arm])
    return seen


class Rate:
    """The learning rate of a run: set before each step, or lowered after an evaluation."""

    def __init__(self, study: Study, schedule: str, optimizer: Optimizer) -> None:
        given = study.schedules[schedule]
        self.plateau = given if isinstance(given, Plateau) else None
        self._factor = None if isinstance(given, Plateau) else given
        self._study, self._optimizer = study, optimizer
        self._initial = [group["lr"] for group in optimizer.param_groups]
        self._best, self._waited = math.inf, 0
        self.stopped = False
        if self.plateau:
            self._lowering = ReduceLROnPlateau(
                optimizer, factor=self.plateau.factor, patience=self.plateau.patience
            )

    @property
    def now(self) -> float:
        """The learning rate of the next step, of the first group."""
        return float(self._optimizer.param_groups[0]["lr"])

    def at(self, step: int) -> None:
        """Set the learning rate of a step, counted from 0."""
        if self._factor:
            factor = self._factor(step / self._study.steps)
            for group, initial in zip(self._optimizer.param_groups, self._initial, strict=True):
                group["lr"] = initial * factor

    def judged(self, values: Mapping[str, Values]) -> None:
        """Take the validation values of an evaluation; without a number the plateau sees infinity."""
        if self.plateau is None:
            return
        value = values[self.plateau.arm][self._study.main]
        lower = self._study.metrics[self._study.main].lower_is_better
        loss = math.inf if value is None else value if lower else -value
        self._lowering.step(loss)
        self._waited = 0 if loss < self._best else self._waited + 1
        self._best = min(self._best, loss)
        self.stopped = self.stopped or self._waited == self.plateau.stop


def evaluated_steps(study: Study) -> list[int]:
    """The steps after which all arms are evaluated, evenly spaced; the last is the last of the run."""
    count = study.evaluations
    return [round(study.steps * number / count) for number in range(1, count + 1)]


def endless(part: Part, batch_size: int, seed: int) -> Iterator[Part]:
    """Batches of one epoch after another, each epoch in a new order.

    The order is that of `DataLoader(shuffle=True, generator=torch.Generator().manual_seed(seed))`.
    """
    order = torch.Generator().manual_seed(seed)
    while True:
        # At each epoch a DataLoader draws a seed for its workers, even without workers, and its
        # sampler draws a second order, which it does not use.
        torch.empty((), dtype=torch.int64).random_(generator=order)
        rows, _ = (torch.randperm(len(part[0]), generator=order) for _ in range(2))
        yield from zip(*(tensor[rows].split(batch_size) for tensor in part), strict=True)


@contextmanager
def alone() -> Iterator[None]:
    """Use one thread, since runs are parallel, and restore the caller's threads and generator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
