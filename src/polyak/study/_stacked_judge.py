"""The judge of stacked runs: the metrics of all of them in one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from polyak.rules import LIVE
from polyak.study._ensembles import MeanPrediction, Outputs, of_ensemble, remember
from polyak.study._flat import Weights, called_with
from polyak.study._judge import Geometry, Values, finite, geometry, metrics_of
from polyak.study._result import PartName
from polyak.study._stacked_data import Rows, rows_of
from polyak.study._study import Data, Ensemble, Part, Study
from polyak.study._tracking import Tracking

PARTS = ("validation", "test")
ROWS = 8192


class Call(nn.Module):
    """`function(model, *part)` as a module, so that torch.func can exchange the model's tensors."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *part: Tensor) -> Any:
        """The value of the function."""
        return self._function(self.model, *part)

    def stacked(self, weights: Weights, part: Rows) -> Any:
        """The values for stacked weights, with one more dimension."""
        return of_each(self.exchanged, part)(weights, part.tensors)

    def exchanged(self, weights: Weights, part: Part) -> Any:
        """The value of the function for other tensors of the model."""
        named = {f"model.{name}": tensor for name, tensor in weights.items()}
        return called_with(self, named, part)


def of_each(function: Callable[..., Any], part: Rows, before: tuple[int, ...] = (0,)) -> Any:
    """The function for every run at once, or for as many as have `ROWS` rows; a processor's cache holds no more."""
    dims, few = (*before, part.dims), max(ROWS // part.length, 1)
    return vmap(function, in_dims=dims, randomness="different", chunk_size=few)


class StackedJudge:
    """The metrics of the arms of all runs, computed at once and kept until `forget`."""

    def __init__(
        self, study: Study, model: nn.Module, data: Sequence[Data], arms: Tracking
    ) -> None:
        self._study, self._arms, self._runs = study, arms, len(data)
        self._parts = {name: rows_of([getattr(d, name) for d in data]) for name in PARTS}
        self._one_part = all([*map(id, d.validation)] == [*map(id, d.test)] for d in data)
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._initial = arms.vector(arms.networks(LIVE)[0])
        self._values: dict[tuple[str, str], list[Values]] = {}
        self._geometry: dict[str, list[Geometry]] = {}

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the runs."""
        self._parts = {name: part.keep(rows) for name, part in self._parts.items()}
        self._initial, self._runs = self._initial[rows], len(rows)
        self.forget()

    def forget(self) -> None:
        """Compute everything again: the weights have changed."""
        self._values.clear()
        self._geometry.clear()

    def values(self, part: str, arm: str) -> list[Values]:
        """The metrics of an arm, for each run."""
        part = "validation" if self._one_part else part
        if (part, arm) not in self._values:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                columns = self._columns(part, arm)
            rows = zip(*columns.values(), strict=True)
            self._values[part, arm] = [dict(zip(columns, row, strict=True)) for row in rows]
        return self._values[part, arm]

    def _columns(self, part: str, arm: str) -> dict[str, list[float | None]]:
        """Each metric's values over the runs."""
        networks, spec, rows = (
            self._arms.networks(arm),
            self._study.arms.get(arm),
            self._parts[part],
        )
        if not networks:
            return {name: [None] * self._runs for name in self._study.metrics}
        if isinstance(spec, Ensemble):
            one = partial(self._ensemble, spec)
            batched = of_each(one, rows, (0, 0))
            values, outputs = batched(*of_ensemble(networks, part), rows.tensors)
            remember(networks, part, outputs)
        else:
            judged = Call(self._model, lambda model, *part: metrics_of(self._study, model, part))
            values = judged.stacked(networks[0].weights, rows)
        return {name: [finite(v) for v in column.tolist()] for name, column in values.items()}

    def _ensemble(
        self, ensemble: Ensemble, networks: list[Weights], known: Outputs, part: Part
    ) -> tuple[dict[str, Tensor], Outputs]:
        """The metrics of the ensemble of one run, and its networks' outputs."""
        mean = MeanPrediction(self._model, ensemble.combine, networks, known, part)
        return metrics_of(self._study, mean, part), mean.outputs

    def geometry(self, arm: str) -> list[Geometry]:
        """Distance and cosine of an arm, for each run."""
        if arm not in self._geometry:
            found = geometry(self._study, self._arms, arm, self._initial)
            if found is None:
                self._geometry[arm] = [(None, None)] * self._runs
            else:
                pairs = zip(*(column.tolist() for column in found), strict=True)
                self._geometry[arm] = [(finite(a), finite(b)) for a, b in pairs]
        return self._geometry[arm]


@dataclass
class OneOfStack:
    """The judge of one run of a stack."""

    judge: StackedJudge
    run: int

    def values(self, part: PartName, arm: str) -> Values:
        """The metrics on a part."""
        return self.judge.values(part, arm)[self.run]

    def geometry(self, arm: str) -> Geometry:
        """Distance and cosine."""
        return self.judge.geometry(arm)[self.run]
