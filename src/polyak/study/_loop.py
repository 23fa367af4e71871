"""One run of a study, as an ordinary training script has it.

A run is one (seed, schedule, learning rate). Four sources of variance have a seed each, so that one can
vary while the others stay: `source_seed` says which. Averages and evaluations draw no random numbers.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.study._course import Course, Rate
from polyak.study._judge import Judge
from polyak.study._logbook import Logbook
from polyak.study._record_format import Record
from polyak.study._study import Data, Part, Study
from polyak.study._tracking import Tracking, size_of, tensors_of
from polyak.study._weighting import due

SOURCES = ("init", "order", "dropout", "split")


class Run(NamedTuple):
    """One unit of a study's work."""

    seed: int
    schedule: str
    learning_rate: float

    def __str__(self) -> str:
        return f"seed {self.seed}, schedule {self.schedule}, learning rate {self.learning_rate:g}"


def source_seed(seed: int, source: str, vary: Collection[str] = SOURCES) -> int:
    """`4 seed + place of the source in SOURCES`; a source that does not vary has the seed of run 0."""
    return 4 * (seed if source in vary else 0) + SOURCES.index(source)


def train(study: Study, run: Run, vary: Collection[str] = SOURCES) -> Record:
    """Train once while all arms are tracked and evaluated, and return the measurements.

    It uses one thread and its own random numbers; the caller's are restored.
    """
    with alone():
        model, data, batches, optimizer = prepared(study, run, vary)
        rate = Rate(study, run.schedule, optimizer)
        arms = Tracking(study, model)
        log = Logbook(study, Judge(study, model, data, arms), size_of(tensors_of(model)))
        course = Course(study, rate, log)
        for evaluation in itertools.count(1):
            while log.count < due(study, evaluation):
                began = time.perf_counter()
                rate.at(log.count)
                optimizer.zero_grad()
                loss = study.loss(model, *next(batches))
                loss.backward()
                optimizer.step()
                trained = time.perf_counter()
                arms.update()
                log.trained(
                    loss.detach().reshape(1), trained - began, time.perf_counter() - trained
                )
            course.evaluate()
            if course.done:
                return course.record()
    raise AssertionError("the course of a run ends")


def _plainly(_: str, function: Callable[..., Any], *inputs: Any, **__: Any) -> Any:
    return function(*inputs)


def prepared(
    study: Study, run: Run, vary: Collection[str] = SOURCES, call: Callable[..., Any] = _plainly
) -> tuple[nn.Module, Data, Iterator[Part], Optimizer]:
    """The model, data, batches and optimizer of a run; the global generator is that of its dropout.

    `call(field, function, *inputs, gives=type)` calls a function of the study.
    """
    torch.manual_seed(source_seed(run.seed, "init", vary))
    model = call("model", study.model, gives=nn.Module).train()
    data = call("data", study.data, source_seed(run.seed, "split", vary), gives=Data)
    batches = endless(data.train, study.batch_size, source_seed(run.seed, "order", vary))
    torch.manual_seed(source_seed(run.seed, "dropout", vary))
    inputs = model.parameters(), run.learning_rate
    return model, data, batches, call("optimizer", study.optimizer, *inputs, gives=Optimizer)


def endless(part: Part, batch_size: int, seed: int) -> Iterator[Part]:
    """Batches of one epoch after another, each epoch in a new order."""
    order = torch.Generator().manual_seed(seed)
    while True:
        rows = epoch(len(part[0]), order)
        yield from zip(*(tensor[rows].split(batch_size) for tensor in part), strict=True)


def epoch(rows: int, order: torch.Generator) -> Tensor:
    """The order of the rows in the next epoch, as `DataLoader(shuffle=True, generator=order)` has it.

    A loader draws a seed for its workers at each epoch, even without workers, and its sampler draws a
    second order, which it does not use.
    """
    torch.empty((), dtype=torch.int64).random_(generator=order)
    first, _ = (torch.randperm(rows, generator=order) for _ in range(2))
    return first


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
