"""Judge: evaluates arms on a copy of the model, so that nothing it does reaches the training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyak.norms import recalibrate
from polyak.study._study import Arm, Data, Ensemble, Part, Study
from polyak.study._tracking import Weights, tensors_of

Values = dict[str, float | None]

RECALIBRATION_BATCHES = 16


class Judge:
    """The metrics of an arm's networks on the validation or the test part.

    It restores torch's global generator after each evaluation, whatever a metric draws.
    """

    def __init__(self, study: Study, model: nn.Module, data: Data) -> None:
        self._study = study
        self._data = data
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._tensors = tensors_of(self._model)

    @torch.no_grad()
    def evaluate(self, arm: str, networks: Sequence[Weights], *parts: Part) -> list[Values]:
        """name -> value of every metric, for each part; None where it is not a finite number."""
        nothing: Values = dict.fromkeys(self._study.metrics)
        if not networks:
            return [nothing for _ in parts]
        with torch.random.fork_rng(devices=[]):
            model = self._network(self._study.arms.get(arm), networks)
            return [self._values(model, part) for part in parts]

    def _network(self, arm: Any, networks: Sequence[Weights]) -> nn.Module:
        if isinstance(arm, Ensemble):
            return MeanPrediction(self._model, networks, arm.combine)
        weights = networks[0]
        for name, tensor in self._tensors.items():
            if name in weights:
                tensor.copy_(weights[name])
        if isinstance(arm, Arm) and arm.recalibrate:
            batches = [p.split(self._study.batch_size) for p in self._data.train]
            chosen = list(zip(*batches, strict=True))[:RECALIBRATION_BATCHES]
            recalibrate(self._model, chosen, call=lambda m, batch: self._study.loss(m, *batch))
        return self._model

    def _values(self, model: nn.Module, part: Part) -> Values:
        metrics = self._study.metrics.items()
        return {name: finite(metric.function(model, *part)) for name, metric in metrics}


class MeanPrediction(nn.Module):
    """A model whose output combines the outputs of several networks of one structure."""

    def __init__(
        self,
        model: nn.Module,
        networks: Sequence[Weights],
        combine: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self._one = model
        self._networks = networks
        self._combine = combine
        self.eval()

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """The combined output, with one forward pass of each network."""
        outputs = [functional_call(self._one, w, inputs, options) for w in self._networks]
        if not isinstance(outputs[0], Tensor):
            kind = type(outputs[0]).__name__
            raise TypeError(
                f"the model returns {kind}, wanted a tensor: an ensemble combines tensors"
            )
        return self._combine(torch.stack(outputs))


def finite(value: Any) -> float | None:
    """A scalar as a float; None for NaN and infinity, which JSON has no numbers for.

    Raises `TypeError` for a value that is not a scalar.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        kind = (
            f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise TypeError(f"a metric or loss is {kind}, wanted a scalar") from None
    return number if number - number == 0 else None
