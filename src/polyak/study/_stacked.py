"""Train many runs of a small model at once, as one batched computation.

Every parameter has one more dimension, the run. `torch.func.vmap` computes all losses in one pass, one
optimizer steps all runs, and the arms average the stacked weights. Each run has its own data, order of
batches, learning rate and stop. Without random layers it equals the plain loop up to rounding; with
dropout it equals it in distribution, since one generator draws the masks of all runs.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak._modes import no_grad
from polyak.study._course import Course, Rate
from polyak.study._flat import Flat, Weights, some_runs
from polyak.study._logbook import Logbook
from polyak.study._loop import SOURCES, Run, alone, source_seed
from polyak.study._record_format import Record
from polyak.study._stacked_data import Batches
from polyak.study._stacked_judge import Call, OneOfStack, StackedJudge
from polyak.study._study import Study
from polyak.study._tracking import Tracking, size_of, tensors_of
from polyak.study._weighting import due

LEAST_GOING = 0.75


def train_stacked(
    study: Study, runs: Sequence[Run], vary: Collection[str] = SOURCES
) -> list[Record]:
    """Train several runs at once; their records are as `train` gives them, in order.

    The study must pass `require_stackable`.
    """
    # torch says this of operations that vmap computes one by one, to its own developers. All threads
    # share the filters, so this one stays.
    warnings.filterwarnings("ignore", "There is a performance drop because we have not")
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
        self._frozen = stack(models)
        trained = {name: self._frozen.pop(name) for name in trained_in(models[0])}
        self._trained = Flat(trained, batch=1)
        self._optimizer = self._bind()
        self._loss = Call(models[0], study.loss)
        self._batches = Batches([d.train for d in data], study.batch_size, orders)
        self._arms = Tracking(study, models[0], self._weights)
        self._judge = StackedJudge(study, models[0], data, self._arms)
        self._views = [OneOfStack(self._judge, number) for number in range(len(runs))]
        size = size_of(tensors_of(models[0]))
        self._logs = [Logbook(study, view, size) for view in self._views]
        self._losses: list[Tensor] = []
        self._seconds = [0.0, 0.0]
        """What the steps since the last evaluation took: their training, and their averages."""
        # A stand-in has the learning rate of each run; the one optimizer of all has 1.
        stand_ins = [torch.optim.SGD([torch.zeros(1)], run.learning_rate) for run in runs]
        self._rates = [Rate(study, r.schedule, o) for r, o in zip(runs, stand_ins, strict=True)]
        pairs = zip(self._rates, self._logs, strict=True)
        self.courses = [Course(study, rate, log) for rate, log in pairs]
        self.count = 0

    def _bind(self) -> Optimizer:
        """An optimizer of the trained tensors: it steps joined tensors, and the model's are views of them."""
        joined = self._trained.tensors
        self._gradients = Flat(self._trained.views, batch=1)
        for name, tensor in joined.items():
            tensor.grad = self._gradients.tensors[name]
        self._parameters = {n: t.requires_grad_() for n, t in self._trained.views.items()}
        self._weights = self._parameters | self._frozen
        return self._study.optimizer(list(joined.values()), 1.0)

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
        losses = self._loss.stacked(self._weights, self._batches.next())
        gradients = torch.autograd.grad(losses.sum(), list(self._parameters.values()))
        self._gradients.take(gradients)
        rates = torch.tensor([rate.now for rate in self._rates], dtype=torch.float64)
        move_(self._optimizer, list(self._trained.tensors.values()), rates)
        trained = time.perf_counter()
        self._arms.update()
        self.count += 1
        self._losses.append(losses.detach())
        now = time.perf_counter()
        self._seconds = [self._seconds[0] + trained - began, self._seconds[1] + now - trained]

    def evaluate(self) -> None:
        """Evaluate all runs. When a quarter of them is over, continue with the others alone."""
        runs = len(self._logs)
        train, average = (seconds / runs for seconds in self._seconds)
        for log, losses in zip(self._logs, torch.stack(self._losses, 1), strict=True):
            log.trained(losses, train, average)
        self._losses, self._seconds = [], [0.0, 0.0]
        began = time.perf_counter()
        going = [course for course in self.courses if not course.done]
        self._judge.forget()
        for arm in {arm: None for course in going for arm in course.arms}:
            self._judge.values("validation", arm)
        # All runs are judged at once, so each has its share of the time.
        share = (time.perf_counter() - began) / runs
        for log in self._logs:
            log.judged(share)
        for course in going:
            course.evaluate()
        left = [number for number, course in enumerate(self.courses) if not course.done]
        if len(left) <= LEAST_GOING * runs:
            self._keep(left)

    def _keep(self, going: list[int]) -> None:
        """Drop the runs that are over."""
        self.courses = [self.courses[number] for number in going]
        self._logs = [self._logs[number] for number in going]
        self._rates = [self._rates[number] for number in going]
        self._views = [self._views[number] for number in going]
        if not going:
            return
        rows, states = torch.tensor(going), self._optimizer.state
        before = self._trained.tensors
        self._frozen = some_runs(self._frozen, rows)
        self._trained = Flat(some_runs(self._trained.views, rows), batch=1)
        self._optimizer = self._bind()
        for name, joined in self._trained.tensors.items():
            whole = before[name]
            self._optimizer.state[joined] = {
                key: value[rows]
                if isinstance(value, Tensor) and value.shape == whole.shape
                else value
                for key, value in states.get(whole, {}).items()
            }
        self._batches.keep(rows)
        self._arms.keep(self._weights, rows)
        self._judge.keep(rows)
        for number, view in enumerate(self._views):
            view.run = number


@no_grad
def move_(optimizer: Optimizer, parameters: Sequence[Tensor], rates: Tensor) -> None:
    """Step parameters (runs, n) with learning rate 1, and keep of each run's step the share that is its learning rate."""
    before = [parameter.clone() for parameter in parameters]
    optimizer.step()
    for old, new in zip(before, parameters, strict=True):
        torch.lerp(old, new, rates.to(new.dtype)[:, None], out=new)


def stack(models: Sequence[nn.Module]) -> Weights:
    """The tensors of several models by name, with one more dimension."""
    several = [tensors_of(model) for model in models]
    return {name: torch.stack([tensors[name] for tensors in several]) for name in several[0]}


def trained_in(model: nn.Module) -> list[str]:
    """The names of a model's trained parameters."""
    return [name for name, p in model.named_parameters() if p.requires_grad]
