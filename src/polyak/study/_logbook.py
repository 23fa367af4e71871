"""Logbook: what one run measures, on its way to a record."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from polyak import theory
from polyak.rules import LIVE, Rule
from polyak.study._judge import Judge, Values, finite
from polyak.study._result import Record
from polyak.study._study import Data, Ensemble, Study
from polyak.study._tracking import Tracking, Weights, copies, rule_of


class Logbook:
    """Losses, curves, selections, distances and times of a run."""

    def __init__(self, study: Study, arms: Tracking, judge: Judge, data: Data) -> None:
        self._study, self._arms, self._judge, self._data = study, arms, judge, data
        self._losses: list[Tensor] = []
        self._seconds = {"train": 0.0, "average": 0.0, "evaluate": 0.0}
        self._initial = flat(arms.networks(LIVE)[0], arms.trained)
        self._selected: dict[str, Values] = {}
        self.steps: list[int] = []
        self.count = 0
        self.train_loss: list[float | None] = []
        self.curves = curves(study.arm_names, study)
        self.rates: list[float] = []
        self._geometry: dict[str, dict[str, list[float | None]]] = {
            name: {arm: [] for arm in study.arms} for name in ("distance", "cosine")
        }

    def step(self, loss: Tensor, train: float, average: float) -> None:
        """Take the loss of a step, and the seconds of its training and of its averages."""
        self._losses.append(loss)
        self.count += 1
        self._seconds["train"] += train
        self._seconds["average"] += average

    def evaluate(self) -> dict[str, Values]:
        """Evaluate all arms on the validation part, and on the test part those that are better than before."""
        began = time.perf_counter()
        self.steps.append(self.count)
        self.train_loss.append(self.mean_loss())
        now = {arm: self._evaluate(arm) for arm in self._study.arm_names}
        self._seconds["evaluate"] += time.perf_counter() - began
        return now

    def mean_loss(self) -> float | None:
        """The mean training loss of the batches since the last evaluation."""
        losses, self._losses = torch.stack(self._losses).tolist(), []
        return finite(sum(losses) / len(losses))

    def glance(self, arm: str) -> Values:
        """The validation values of an arm now, which the record does not have."""
        return self._judge.evaluate(arm, self._arms.networks(arm), self._data.validation)[0]

    def _evaluate(self, arm: str) -> Values:
        networks = self._arms.networks(arm)
        (values,) = self._judge.evaluate(arm, networks, self._data.validation)
        add(self.curves[arm], values)
        if self._is_best(arm, values[self._study.main]):
            (test,) = self._judge.evaluate(arm, networks, self._data.test)
            self._selected[arm] = {"step": self.count, **test}
        if arm != LIVE:
            self._measure(arm, networks)
        return values

    def _is_best(self, arm: str, value: float | None) -> bool:
        """Whether the last value of an arm is the first of the best ones."""
        main = self._study.main
        before = [v for v in self.curves[arm][main][:-1] if v is not None]
        if value is None or not before:
            return value is not None
        lower = self._study.metrics[main].lower_is_better
        return value < min(before) if lower else value > max(before)

    def _measure(self, arm: str, networks: list[Weights]) -> None:
        """Distance and cosine between an average and the live weights."""
        distance = cosine = None
        if networks and not isinstance(self._study.arms[arm], Ensemble):
            live = flat(self._arms.networks(LIVE)[0], self._arms.trained)
            average = flat(networks[0], self._arms.trained)
            distance = finite((average - live).norm() / live.norm())
            ways = average - self._initial, live - self._initial
            cosine = finite(torch.cosine_similarity(*ways, dim=0))
        self._geometry["distance"][arm].append(distance)
        self._geometry["cosine"][arm].append(cosine)

    def record(self) -> Record:
        """The measurements of the run so far; every arm is judged on the test part as it is now."""
        study, nothing = self._study, {"step": None, **dict.fromkeys(self._study.metrics)}
        networks = {arm: self._arms.networks(arm) for arm in study.arm_names}
        last = {a: self._judge.evaluate(a, networks[a], self._data.test)[0] for a in networks}
        size = sum(t.nbytes for t in networks[LIVE][0].values())
        kept = {arm: copies(study.arms[arm]) for arm in study.arms}
        evaluations = max(len(self.steps), 1)
        return {
            "steps": self.steps,
            "train_loss": self.train_loss,
            "rates": self.rates,
            "curves": self.curves,
            "test": {
                a: {"last": last[a], "selected": self._selected.get(a, nothing)} for a in networks
            },
            **self._geometry,
            "mean_age": {arm: self._mean_age(arm) for arm in study.arms},
            "seconds": {
                "train": self._seconds["train"] / self.count,
                "average": self._seconds["average"] / self.count,
                "evaluate": self._seconds["evaluate"] / evaluations,
            },
            "bytes": {LIVE: 0, **{arm: count * size for arm, count in kept.items()}},
            "forward_passes": {arm: max(len(n), 1) for arm, n in networks.items()},
        }

    def _mean_age(self, arm: str) -> float | None:
        spec = self._study.arms[arm]
        if isinstance(spec, Ensemble):
            return None
        return mean_age(rule_of(spec, self._study.steps), self.count, spec.every)


@lru_cache(maxsize=1024)
def mean_age(rule: Rule, steps: int, every: int) -> float | None:
    """The mean age in steps of the weights in an average after `steps`; None before its first update."""
    return theory.mean_age(theory.profile(rule, steps, every=every)) if steps >= every else None


def curves(arms: Iterable[str], study: Study) -> dict[str, dict[str, list[float | None]]]:
    """Empty curves of every metric for arms."""
    return {arm: {metric: [] for metric in study.metrics} for arm in arms}


def add(curve: dict[str, list[float | None]], values: Values) -> None:
    """Append the values of an evaluation to an arm's curves."""
    for metric, value in values.items():
        curve[metric].append(value)


def flat(weights: Weights, names: Iterable[str]) -> Tensor:
    """Some tensors as one vector."""
    return torch.cat([weights[name].reshape(-1) for name in names])
