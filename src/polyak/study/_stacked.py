"""Stacked: many runs of a small model trained at once, as one batched computation.

Every parameter has one more dimension, the run. `torch.func.vmap` computes all losses in one pass, one
optimizer steps all runs, and the arms average the stacked weights. Each run has its own data, order of
batches, learning rate and stop. Without random layers it equals the plain loop up to rounding; with
dropout it equals it in distribution, since one generator draws the masks of all runs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.study._course import Course, Rate, due
from polyak.study._logbook import Logbook
from polyak.study._loop import SOURCES, Run, alone, source_seed
from polyak.study._result import Record
from polyak.study._stacked_data import Batches
from polyak.study._stacked_judge import Call, OneOfStack, StackedJudge
from polyak.study._study import Study
from polyak.study._tracking import Tracking, Weights, policies, size_of, tensors_of

LEAST_GOING = 0.75


def train_stacked(
    study: Study, runs: Sequence[Run], vary: Collection[str] = SOURCES
) -> list[Record]:
    """Train several runs at once; their records are as `train` gives them, in order.

    The study must pass `require_stackable`.
    """
    with alone():
        stack = Stack(study, runs, vary)
        courses = list(stack.courses)
        for evaluation in itertools.count(1):
            while stack.count < due(study, evaluation):
                stack.step()
            stack.evaluate()
            if not stack.courses:
                return [course.record() for course in courses]
    raise AssertionError("the course of a run ends")


class Stack:
    """The weights, batches, optimizer and arms of several runs."""

    def __init__(self, study: Study, runs: Sequence[Run], vary: Collection[str]) -> None:
        self._study = study
        models = [self._seeded(study.model, run, "init", vary).train() for run in runs]
        data = [study.data(source_seed(run.seed, "split", vary)) for run in runs]
        orders = [torch.Generator().manual_seed(source_seed(r.seed, "order", vary)) for r in runs]
        torch.manual_seed(source_seed(runs[0].seed, "dropout", vary))
        self._weights = stack(models)
        self._names = [name for name, _ in models[0].named_parameters()]
        self._loss = Call(models[0], study.loss)
        self._optimizer = study.optimizer(self._parameters, 1.0)
        self._batches = Batches([d.train for d in data], study.batch_size, orders)
        self._arms = Tracking(study, self._weights, policies(models[0]))
        self._judge = StackedJudge(study, models[0], data, self._arms)
        self._views = [OneOfStack(self._judge, number) for number in range(len(runs))]
        size = size_of(self._weights) // len(runs)
        self._logs = [Logbook(study, view, size) for view in self._views]
        # A stand-in has the learning rate of each run; the one optimizer of all has 1.
        stand_ins = [torch.optim.SGD([torch.zeros(1)], run.learning_rate) for run in runs]
        self._rates = [Rate(study, r.schedule, o) for r, o in zip(runs, stand_ins, strict=True)]
        pairs = zip(self._rates, self._logs, strict=True)
        self.courses = [Course(study, rate, log) for rate, log in pairs]
        self.count = 0

    @property
    def _parameters(self) -> list[Tensor]:
        return [self._weights[name] for name in self._names]

    @staticmethod
    def _seeded(
        make: Callable[[], nn.Module], run: Run, source: str, vary: Collection[str]
    ) -> nn.Module:
        torch.manual_seed(source_seed(run.seed, source, vary))
        return make()

    def step(self) -> None:
        """One step of all runs."""
        began = time.perf_counter()
        for rate in self._rates:
            rate.at(self.count)
        self._optimizer.zero_grad()
        losses = self._loss.stacked(self._weights, self._batches.next())
        losses.sum().backward()
        rates = torch.tensor([rate.now for rate in self._rates], dtype=torch.float64)
        move_(self._optimizer, self._parameters, rates)
        trained = time.perf_counter()
        self._arms.update()
        self.count += 1
        now, runs = time.perf_counter(), len(self._logs)
        for log, loss in zip(self._logs, losses.detach(), strict=True):
            log.step(loss, (trained - began) / runs, (now - trained) / runs)

    def evaluate(self) -> None:
        """Evaluate all runs. When a quarter of them is over, go on with the others alone."""
        began = time.perf_counter()
        self._judge.forget()
        for arm in self._study.arm_names:
            self._judge.values("validation", arm)
        # All runs are judged at once, so each has its share of the time.
        share = (time.perf_counter() - began) / len(self._logs)
        for log in self._logs:
            log.judged(share)
        for course in self.courses:
            if not course.done:
                course.evaluate()
        going = [number for number, course in enumerate(self.courses) if not course.done]
        if len(going) <= LEAST_GOING * len(self.courses):
            self._keep(going)

    def _keep(self, going: list[int]) -> None:
        """Drop the runs that are over."""
        self.courses = [self.courses[number] for number in going]
        self._logs = [self._logs[number] for number in going]
        self._rates = [self._rates[number] for number in going]
        self._views = [self._views[number] for number in going]
        if not going:
            return
        rows, old = torch.tensor(going), self._weights
        self._weights = {
            name: tensor.detach()[rows].requires_grad_(tensor.requires_grad)
            for name, tensor in old.items()
        }
        states = [self._optimizer.state.get(old[name], {}) for name in self._names]
        self._optimizer = self._study.optimizer(self._parameters, 1.0)
        for name, parameter, state in zip(self._names, self._parameters, states, strict=True):
            whole = old[name].shape
            self._optimizer.state[parameter] = {
                key: value[rows] if isinstance(value, Tensor) and value.shape == whole else value
                for key, value in state.items()
            }
        self._batches.keep(rows)
        self._arms = self._arms.keep(self._weights, rows)
        self._judge.keep(self._arms, rows)
        for number, view in enumerate(self._views):
            view.run = number


@torch.no_grad()
def move_(optimizer: Optimizer, parameters: Sequence[Tensor], rates: Tensor) -> None:
    """Step with learning rate 1, and keep of each run's step the share that is its learning rate."""
    before = [parameter.clone() for parameter in parameters]
    optimizer.step()
    for old, new in zip(before, parameters, strict=True):
        scale = rates.to(new.dtype).view(-1, *(1 for _ in new.shape[1:]))
        new.sub_(old).mul_(scale).add_(old)


def stack(models: Sequence[nn.Module]) -> Weights:
    """The tensors of several models by name, with one more dimension; parameters require gradients."""
    weights = {}
    for name in tensors_of(models[0]):
        weights[name] = torch.stack([tensors_of(model)[name] for model in models])
    for name, parameter in models[0].named_parameters():
        weights[name].requires_grad_(parameter.requires_grad)
    return weights
