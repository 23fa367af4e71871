"""Stacked: many runs of a small model trained at once, as one batched computation.

Every parameter has one more dimension, the run. `torch.func.vmap` computes all losses in one pass, one
optimizer steps all runs, and the arms average the stacked weights. Each run has its own data, order of
batches, learning rate and stop. Without random layers it equals the plain loop up to rounding; with
dropout it equals it in distribution, since one generator draws the masks of all runs.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Optimizer

from polyak.rules import LIVE
from polyak.study._course import Course, Rate, due
from polyak.study._judge import Geometry, MeanPrediction, Values, finite, flat, geometry, metrics_of
from polyak.study._logbook import Logbook
from polyak.study._loop import SOURCES, Run, alone, epoch, source_seed
from polyak.study._result import Record
from polyak.study._study import Data, Ensemble, Part, Study
from polyak.study._tracking import Tracking, Weights, policies, size_of, tensors_of

PARTS = ("validation", "test")
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
        self._loss = _Call(models[0], study.loss)
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


class _Call(nn.Module):
    """`function(model, *part)` as a module, so that torch.func can exchange the model's tensors."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *part: Tensor) -> Any:
        """The value of the function."""
        return self._function(self.model, *part)

    def stacked(self, weights: Weights, part: Rows) -> Tensor:
        """(runs,) values for stacked weights."""
        batched = vmap(self.exchanged, in_dims=(0, part.dims), randomness="different")
        values: Tensor = batched(weights, part.tensors)
        return values

    def exchanged(self, weights: Weights, part: Part) -> Any:
        """The value of the function for other tensors of the model."""
        named = {f"model.{name}": tensor for name, tensor in weights.items()}
        return functional_call(self, named, part)


class StackedJudge:
    """The metrics of the arms of all runs, computed at once and kept until `forget`."""

    def __init__(
        self, study: Study, model: nn.Module, data: Sequence[Data], arms: Tracking
    ) -> None:
        self._study, self._arms, self._runs = study, arms, len(data)
        self._parts = {name: rows_of([getattr(d, name) for d in data]) for name in PARTS}
        parts = [(*one.validation, *one.test) for one in data]
        pairs = [zip(p[: len(p) // 2], p[len(p) // 2 :], strict=True) for p in parts]
        self._one_part = all(a is b for pair in pairs for a, b in pair)
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._initial = flat(arms.networks(LIVE)[0], arms.trained, 1)
        self._values: dict[tuple[str, str], list[Values]] = {}
        self._geometry: dict[str, list[Geometry]] = {}

    def keep(self, arms: Tracking, rows: Tensor) -> None:
        """Go on with some of the runs."""
        self._parts = {name: part.keep(rows) for name, part in self._parts.items()}
        self._arms, self._initial, self._runs = arms, self._initial[rows], len(rows)
        self.forget()

    def forget(self) -> None:
        """Compute everything anew: the weights have moved."""
        self._values.clear()
        self._geometry.clear()

    def values(self, part: str, arm: str) -> list[Values]:
        """The metrics of an arm, for each run."""
        part = "validation" if self._one_part else part
        if (part, arm) not in self._values:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                columns = self._columns(self._parts[part], arm)
            rows = zip(*columns.values(), strict=True)
            self._values[part, arm] = [dict(zip(columns, row, strict=True)) for row in rows]
        return self._values[part, arm]

    def _columns(self, part: Rows, arm: str) -> dict[str, list[float | None]]:
        """Each metric's values over the runs."""
        live = self._arms.networks(LIVE)[0]
        networks = [{**live, **weights} for weights in self._arms.networks(arm)]
        if not networks:
            return {name: [None] * self._runs for name in self._study.metrics}
        one = partial(self._one, self._study.arms.get(arm))
        batched = vmap(one, in_dims=(0, part.dims), randomness="different")
        values = batched(networks, part.tensors)
        return {name: [finite(v) for v in column.tolist()] for name, column in values.items()}

    def _one(self, spec: object, networks: list[Weights], part: Part) -> dict[str, Tensor]:
        """The metrics of one run."""
        if isinstance(spec, Ensemble):
            return metrics_of(
                self._study, MeanPrediction(self._model, networks, spec.combine), part
            )
        judged = _Call(self._model, lambda model, *part: metrics_of(self._study, model, part))
        values: dict[str, Tensor] = judged.exchanged(networks[0], part)
        return values

    def geometry(self, arm: str) -> list[Geometry]:
        """Distance and cosine of an arm, for each run."""
        if arm not in self._geometry:
            networks = self._arms.networks(arm)
            if not networks or isinstance(self._study.arms[arm], Ensemble):
                self._geometry[arm] = [(None, None)] * self._runs
            else:
                live = flat(self._arms.networks(LIVE)[0], self._arms.trained, 1)
                both = geometry(self._initial, live, flat(networks[0], self._arms.trained, 1))
                pairs = zip(*(column.tolist() for column in both), strict=True)
                self._geometry[arm] = [(finite(a), finite(b)) for a, b in pairs]
        return self._geometry[arm]


@dataclass
class OneOfStack:
    """The judge of one run of a stack."""

    judge: StackedJudge
    run: int

    def validation(self, arm: str) -> Values:
        """The metrics on the validation part."""
        return self.judge.values("validation", arm)[self.run]

    def test(self, arm: str) -> Values:
        """The metrics on the test part."""
        return self.judge.values("test", arm)[self.run]

    def geometry(self, arm: str) -> Geometry:
        """Distance and cosine."""
        return self.judge.geometry(arm)[self.run]


class Rows(NamedTuple):
    """A part of the data of all runs; a dimension of 0 is the run, None is shared by all."""

    tensors: Part
    dims: tuple[int | None, ...]

    def keep(self, rows: Tensor) -> Rows:
        """The part of some of the runs."""
        pairs = zip(self.tensors, self.dims, strict=True)
        return Rows(tuple(t if dim is None else t[rows] for t, dim in pairs), self.dims)


def rows_of(several: Sequence[Part]) -> Rows:
    """The parts of several runs; what is equal in all of them is kept once."""
    tensors, dims = [], []
    for column in zip(*several, strict=True):
        shared = all(torch.equal(column[0], other) for other in column[1:])
        tensors.append(column[0] if shared else torch.stack(column))
        dims.append(None if shared else 0)
    return Rows(tuple(tensors), tuple(dims))


class Batches:
    """Batches (runs, rows, ...) of the training parts, in each run's own order."""

    def __init__(
        self, several: Sequence[Part], batch_size: int, orders: Sequence[torch.Generator]
    ) -> None:
        self._whole, self._rows = rows_of(several), len(several[0][0])
        self._batch_size, self._orders = batch_size, list(orders)
        self._left = torch.empty(len(orders), 0, dtype=torch.int64)

    def next(self) -> Rows:
        """The next batch of every run."""
        if not self._left.numel():
            self._left = torch.stack([epoch(self._rows, order) for order in self._orders])
        rows, self._left = self._left[:, : self._batch_size], self._left[:, self._batch_size :]
        runs = torch.arange(len(rows))[:, None]
        pairs = zip(*self._whole, strict=True)
        batch = tuple(t[rows] if dim is None else t[runs, rows] for t, dim in pairs)
        return Rows(batch, tuple(0 for _ in batch))

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the runs."""
        self._whole, self._left = self._whole.keep(rows), self._left[rows]
        self._orders = [self._orders[number] for number in rows.tolist()]


def stack(models: Sequence[nn.Module]) -> Weights:
    """The tensors of several models by name, with one more dimension; parameters require gradients."""
    weights = {}
    for name in tensors_of(models[0]):
        weights[name] = torch.stack([tensors_of(model)[name] for model in models])
    for name, parameter in models[0].named_parameters():
        weights[name].requires_grad_(parameter.requires_grad)
    return weights
