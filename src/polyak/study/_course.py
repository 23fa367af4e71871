"""The learning rate of a run, its evaluations, its stop, and what comes after the stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from polyak.rules import LIVE
from polyak.study._judge import Values
from polyak.study._logbook import Logbook, add, curves
from polyak.study._record_format import Record
from polyak.study._schedules import Plateau, factor_at
from polyak.study._study import Study


class Course:
    """One run at its evaluations: until its stop all arms are evaluated, after it a plateau's arm."""

    def __init__(self, study: Study, rate: Rate, log: Logbook) -> None:
        self._study, self._rate, self._log = study, rate, log
        self._left = rate.plateau.after if rate.plateau else 0
        self._arms = tuple(dict.fromkeys((LIVE, rate.plateau.arm if rate.plateau else LIVE)))
        self._after: Record = {}
        self._record: Record | None = None

    @property
    def done(self) -> bool:
        """Whether the run is over."""
        return self._record is not None and not self._left

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that the next evaluation asks for."""
        return self._study.arm_names if self._record is None else self._arms

    def evaluate(self) -> None:
        """Evaluate, and adapt the learning rate."""
        if self._record is None:
            self._rate.judged(self._log.evaluate())
            self._log.rates.append(self._rate.now)
            if self._rate.stopped or self._log.count >= self._study.steps:
                self._record = {**self._log.record(), "stopped_early": self._rate.stopped}
                if self._left:
                    self._after = {"steps": [], "curves": curves(self._arms, self._study)}
            return
        values = self._log.glance(self._arms)
        self._rate.judged(values)
        self._left -= 1
        self._after["steps"].append(self._log.count)
        for arm, curve in self._after["curves"].items():
            add(curve, values[arm])

    def record(self) -> Record:
        """The record of the run when it is over."""
        assert self._record is not None
        return {**self._record, "after_stop": self._after}


class Rate:
    """The learning rate of a run: set before each step, or lowered after an evaluation."""

    def __init__(self, study: Study, schedule: str, optimizer: Optimizer) -> None:
        given = study.schedules[schedule]
        self.plateau = given if isinstance(given, Plateau) else None
        self._factor = None if isinstance(given, Plateau) else given
        self._study, self._schedule, self._optimizer = study, schedule, optimizer
        self._initial = [group["lr"] for group in optimizer.param_groups]
        self._lower = study.metrics[study.main].lower_is_better
        self._best, self._waited = math.inf, 0
        self.stopped = False
        if self.plateau:
            mode: Literal["min", "max"] = "min" if self._lower else "max"
            self._lowering = ReduceLROnPlateau(
                optimizer, mode, factor=self.plateau.factor, patience=self.plateau.patience
            )

    @property
    def now(self) -> float:
        """The learning rate of the next step, of the first group."""
        return float(self._optimizer.param_groups[0]["lr"])

    def at(self, step: int) -> None:
        """Set the learning rate of a step, counted from 0."""
        if self._factor:
            factor = factor_at(self._schedule, self._factor, step / self._study.steps)
            for group, initial in zip(self._optimizer.param_groups, self._initial, strict=True):
                group["lr"] = initial * factor

    def judged(self, values: Mapping[str, Values]) -> None:
        """Take the validation values of an evaluation; a value that is not a number counts as the worst."""
        if self.plateau is None:
            return
        value = values[self.plateau.arm][self._study.main]
        sign = 1 if self._lower else -1
        loss = math.inf if value is None else sign * value
        self._lowering.step(sign * loss)
        self._waited = 0 if loss < self._best else self._waited + 1
        self._best = min(self._best, loss)
        self.stopped = self.stopped or self._waited == self.plateau.stop
