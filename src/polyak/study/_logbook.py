"""Collect what one run measures, and make its record."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from polyak.rules import LIVE
from polyak.study._judge import Judging, Values, finite
from polyak.study._record_format import Record
from polyak.study._study import Ensemble, Study
from polyak.study._tracking import copies


class Logbook:
    """Losses, curves, selections, distances and times of a run; `size` is the bytes of its weights."""

    def __init__(self, study: Study, judge: Judging, size: int) -> None:
        self._study, self._judge, self._size = study, judge, size
        self._losses: list[Tensor] = []
        self._seconds = {"train": 0.0, "average": 0.0, "evaluate": 0.0}
        self._selected: dict[str, Values] = {}
        self._least: dict[str, float] = {}
        """arm -> its best main value so far, as a loss"""
        self.steps: list[int] = []
        self.count = 0
        self.train_loss: list[float | None] = []
        self.curves = curves(study.arm_names, study)
        self.rates: list[float] = []
        self._geometry: dict[str, dict[str, list[float | None]]] = {
            name: {arm: [] for arm in study.arms} for name in ("distance", "cosine")
        }

    def trained(self, losses: Tensor, train: float, average: float) -> None:
        """Take the losses of some steps, and the seconds of their training and of their averages."""
        self._losses.append(losses)
        self.count += len(losses)
        self._seconds["train"] += train
        self._seconds["average"] += average

    def judged(self, seconds: float) -> None:
        """Take the seconds of an evaluation that was made for several runs at once."""
        self._seconds["evaluate"] += seconds

    def evaluate(self) -> dict[str, Values]:
        """Evaluate all arms on the validation part, and those that are better than before on the test part."""
        began = time.perf_counter()
        self.steps.append(self.count)
        losses, self._losses = torch.cat(self._losses).tolist(), []
        self.train_loss.append(finite(sum(losses) / len(losses)))
        now = {arm: self._evaluate(arm) for arm in self._study.arm_names}
        self._seconds["evaluate"] += time.perf_counter() - began
        return now

    def glance(self, arms: Iterable[str]) -> dict[str, Values]:
        """The validation values of some arms now; the record does not have them."""
        return {arm: self._judge.values("validation", arm) for arm in arms}

    def _evaluate(self, arm: str) -> Values:
        values = self._judge.values("validation", arm)
        add(self.curves[arm], values)
        if self._is_best(arm, values[self._study.main]):
            self._selected[arm] = {"step": self.count, **self._judge.values("test", arm)}
        if arm != LIVE:
            for name, value in zip(self._geometry, self._judge.geometry(arm), strict=True):
                self._geometry[name][arm].append(value)
        return values

    def _is_best(self, arm: str, value: float | None) -> bool:
        """Whether a value of an arm is better than all before."""
        if value is None:
            return False
        lower = self._study.metrics[self._study.main].lower_is_better
        loss = value if lower else -value
        better = arm not in self._least or loss < self._least[arm]
        if better:
            self._least[arm] = loss
        return better

    def record(self) -> Record:
        """The measurements of the run so far; every arm is judged on the test part as it is now."""
        arms, nothing = self._study.arms, {"step": None, **dict.fromkeys(self._study.metrics)}
        names, evaluations = self._study.arm_names, len(self.steps)
        units = {"train": self.count, "average": self.count, "evaluate": evaluations}
        return {
            "steps": self.steps,
            "train_loss": self.train_loss,
            "rates": self.rates,
            "curves": self.curves,
            "test": {
                arm: {
                    "last": self._judge.values("test", arm),
                    "selected": self._selected.get(arm, nothing),
                }
                for arm in names
            },
            **self._geometry,
            "seconds": {name: self._seconds[name] / count for name, count in units.items()},
            "bytes": {LIVE: 0, **{name: copies(arm) * self._size for name, arm in arms.items()}},
            "forward_passes": {LIVE: 1, **{name: passes(arm) for name, arm in arms.items()}},
        }


def passes(arm: object) -> int:
    """The forward passes of a prediction."""
    return arm.size if isinstance(arm, Ensemble) else 1


def curves(arms: Iterable[str], study: Study) -> dict[str, dict[str, list[float | None]]]:
    """Empty curves of every metric for arms."""
    return {arm: {metric: [] for metric in study.metrics} for arm in arms}


def add(curve: Mapping[str, list[float | None]], values: Values) -> None:
    """Append the values of an evaluation to an arm's curves."""
    for metric, value in values.items():
        curve[metric].append(value)
