"""Evaluate arms on a copy of the model, so that evaluation does not change the training."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyak._modes import no_grad
from polyak._tensors import versions
from polyak.norms import recalibrate
from polyak.rules import LIVE
from polyak.study._ensembles import MeanPrediction, apart, of_ensemble, remember, steady
from polyak.study._result import PartName
from polyak.study._study import Arm, Data, Ensemble, Metric, Part, Study
from polyak.study._tracking import Network, Tracking, tensors_of

Values = dict[str, float | None]
Geometry = tuple[float | None, float | None]

RECALIBRATION_BATCHES = 16


class Judging(Protocol):
    """The questions of a logbook about the arms as they are now."""

    def values(self, part: PartName, arm: str) -> Values:
        """name -> value of every metric on a part; None where it is not a finite number."""

    def geometry(self, arm: str) -> Geometry:
        """(relative distance to the live weights, cosine with their way from the start)."""


class Judge:
    """The metrics of the arms of one run.

    It restores torch's global generator after each evaluation, whatever a metric draws.
    """

    def __init__(self, study: Study, model: nn.Module, data: Data, arms: Tracking) -> None:
        self._study, self._data, self._arms = study, data, arms
        self._model = copy.deepcopy(model).eval()
        self._tensors = tensors_of(self._model)
        self._initial = arms.vector(arms.networks(LIVE)[0])

    def geometry(self, arm: str) -> Geometry:
        """The place of an average between the start and the live weights; None for an ensemble."""
        found = geometry(self._study, self._arms, arm, self._initial)
        if found is None:
            return None, None
        distance, cosine = found
        return finite(distance), finite(cosine)

    @no_grad
    def values(self, part: PartName, arm: str) -> Values:
        """The metrics on a part."""
        networks, spec = self._arms.networks(arm), self._study.arms.get(arm)
        if not networks:
            return dict.fromkeys(self._study.metrics)
        rows: Part = getattr(self._data, part)
        with torch.random.fork_rng(devices=[]):
            if isinstance(spec, Ensemble):
                members, known = of_ensemble(networks, part)
                mean = MeanPrediction(self._model, spec.combine, members, known, rows)
                values = metrics_of(self._study, mean, rows)
                remember(networks, part, mean.outputs)
            else:
                values = metrics_of(self._study, self._network(spec, networks[0]), rows)
            return {name: finite(value) for name, value in values.items()}

    def _network(self, arm: Any, network: Network) -> nn.Module:
        for name, tensor in self._tensors.items():
            tensor.copy_(network.weights[name])
        if isinstance(arm, Arm) and arm.recalibrate:
            batches = [tensor.split(self._study.batch_size) for tensor in self._data.train]
            chosen = list(zip(*batches, strict=True))[:RECALIBRATION_BATCHES]
            recalibrate(self._model, chosen, call=self._loss)
        return self._model

    def _loss(self, model: nn.Module, batch: Part) -> Tensor:
        """The loss of rows of the training data; it gets copies, as in the training."""
        return self._study.loss(model, *(tensor.clone() for tensor in batch))


def metrics_of(study: Study, model: nn.Module, part: Part) -> dict[str, Tensor]:
    """Every metric of a model on a part. Metrics that call the model on equal tensors share one pass."""
    with remembering(model):
        return {name: _value_of(metric, model, part) for name, metric in study.metrics.items()}


def _value_of(metric: Metric, model: nn.Module, part: Part) -> Tensor:
    """A metric that may use train mode: it leaves the next one eval mode and the running statistics."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    value = metric.function(model.eval(), *part)
    for buffer, kept in before:
        buffer.copy_(kept)
    return value


class _Remembering:
    """The forward pass of a model, which keeps its last output. A deep copy of the model has one of its own."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._compute = model, model.forward
        self._inputs: tuple[Any, ...] = ()
        self._versions: list[int] = []
        self._output: Tensor | None = None

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        again = not (options or torch.is_grad_enabled()) and steady(self._model)
        weights = list(self._model.parameters())
        seen, now = (*inputs, *weights), versions(weights)
        same = len(seen) == len(self._inputs) and all(map(operator.is_, seen, self._inputs))
        if again and same and now == self._versions and self._output is not None:
            return self._output.clone()  # the caller may write into it
        given, named = apart(inputs, options)
        output = self._compute(*given, **named)
        if again and isinstance(output, Tensor):
            self._inputs, self._versions, self._output = seen, now, output.clone()
        return output


@contextmanager
def remembering(model: nn.Module) -> Iterator[None]:
    """Let a model, in eval mode, return its last output again for the very same tensors and weights.

    It gets copies of them, as the networks of an ensemble do, which remembers on its own.
    """
    if isinstance(model, MeanPrediction):
        yield
        return
    model.forward = _Remembering(model)
    try:
        yield
    finally:
        del model.forward


def geometry(
    study: Study, arms: Tracking, arm: str, initial: Tensor
) -> tuple[Tensor, Tensor] | None:
    """`|average - live| / |live|`, and the cosine of `average - initial` and `live - initial`.

    None for an ensemble, and before the first update.
    """
    networks = arms.networks(arm)
    if not networks or isinstance(study.arms[arm], Ensemble):
        return None
    live, average = arms.vector(arms.networks(LIVE)[0]), arms.vector(networks[0])
    distance = (average - live).norm(dim=-1) / live.norm(dim=-1)
    return distance, torch.cosine_similarity(average - initial, live - initial, dim=-1)


def finite(value: Any) -> float | None:
    """A scalar as a float; None for NaN and infinity, which JSON has no numbers for.

    Raises `TypeError` for a value that is not a scalar.
    """
    given: Any = None if isinstance(value, str) else value  # float reads texts, too
    try:
        number = float(given)
    except OverflowError:  # an integer above the largest float
        return None
    except (TypeError, ValueError, RuntimeError):
        shaped = isinstance(value, Tensor)
        of = " of complex numbers" if shaped and value.is_complex() else ""
        kind = f"a tensor {tuple(value.shape)}{of}" if shaped else type(value).__name__
        raise TypeError(f"the value is {kind}, wanted a scalar") from None
    return number if number - number == 0 else None
