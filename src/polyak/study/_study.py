"""An experiment as data, from the model to the claims.

A recipe is a Python file of about a screen with one module-level `study = Study(...)`.
docs/own-study.md writes one from the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak._checks import is_integer, is_number, require
from polyak.rules import LIVE, Rule
from polyak.specs import parse
from polyak.study._claims import Claim, Published
from polyak.study._fields import as_rates, as_tuple, require_function, require_named
from polyak.study._schedules import Plateau, Schedule, constant, require_factors

Part = tuple[Tensor, ...]


@dataclass(frozen=True)
class Data:
    """The three parts of a data set. A part is a tuple of tensors, e.g. (inputs, targets).

    The tensors of a part have the same number of rows; a batch is the same rows of each. Training uses
    `train`, every choice uses `validation`, and only the reported values use `test`.

    Raises `ValueError` for a part without tensors or rows, or whose tensors differ in rows.
    """

    train: Part
    validation: Part
    test: Part

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            part = as_tuple(name, getattr(self, name), Tensor)
            object.__setattr__(self, name, part)
            rows = [len(tensor) if tensor.ndim else 0 for tensor in part]
            one_length = len(set(rows)) == 1 and rows[0] > 0
            require(one_length, f"rows of {name}", rows, "the same number >= 1 in each tensor")


@dataclass(frozen=True)
class Metric:
    """`function(model, *part)` -> a scalar tensor or float, computed in eval mode without gradients.

    The function must not draw from torch's global generator; give it a generator of its own.
    """

    function: Callable[..., Tensor]
    lower_is_better: bool = True
    title: str = ""

    def __post_init__(self) -> None:
        require_function("a metric's function", self.function)


@dataclass(frozen=True)
class Arm:
    """An average that every run tracks.

    Args:
        rule: the rule or its spec.
        every: optimizer steps per update, which follows the last of them. A window counts updates.
        start: the share of the run after which averaging begins. Until then the arm is a copy of the
            live weights.
        recalibrate: whether BatchNorm's statistics are estimated again, from training batches, each
            time before the arm is judged.
        swept: if True, runs do not track it; it is computed from the means of weights between evaluations.
            All swept arms together cost one addition a step, and a copy of the weights for each
            evaluation. A mean over whole stretches between evaluations is exact; the report says
            which share of another average's weight is misplaced.

    Raises `ValueError` for a bad rule, every < 1, and a start outside [0, 1).
    """

    rule: Rule
    every: int = 1
    start: float = 0.0
    recalibrate: bool = False
    swept: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "rule", parse(self.rule) if isinstance(self.rule, str) else self.rule
        )
        if not isinstance(self.rule, Rule):
            raise TypeError(f"rule is {type(self.rule).__name__}, wanted a polyak.Rule or its spec")
        require(is_integer(self.every, 1), "every", self.every, "an integer >= 1")
        require(
            is_number(self.start) and 0 <= self.start < 1, "start", self.start, "a share in [0, 1)"
        )


def _mean(outputs: Tensor) -> Tensor:
    return outputs.mean(0)


@dataclass(frozen=True)
class Ensemble:
    """The mean prediction of the networks of the last `size` snapshots, one every `every` steps.

    `combine` makes one output of the stacked outputs (size, ...): by default their mean. For logits
    give `polyak.study.mean_probability`.

    Raises `ValueError` for size or every < 1.
    """

    size: int
    every: int = 1
    combine: Callable[[Tensor], Tensor] = _mean

    def __post_init__(self) -> None:
        for name in ("size", "every"):
            require(
                is_integer(getattr(self, name), 1), name, getattr(self, name), "an integer >= 1"
            )


def mean_probability(logits: Tensor) -> Tensor:
    """Return the log of the mean softmax of stacked logits (size, ..., classes): an ensemble's logits."""
    return torch.logsumexp(logits.log_softmax(-1), 0) - math.log(len(logits))


def _adam(parameters: Any, learning_rate: float) -> Optimizer:
    return torch.optim.Adam(parameters, lr=learning_rate)


@dataclass(frozen=True, kw_only=True)
class Study:
    """An experiment: what is trained, which averages are compared, and what is claimed.

    A run is one (seed, schedule, learning rate), and tracks all arms. Every function must be callable
    in another process.

    Args:
        name: the name of its folder and its command: a word of letters, digits, "-" and "_".
        title: one line for the report.
        model: called without arguments; torch's global generator is seeded for it.
        data: called with the seed of the split. Calls with one seed give equal data.
        loss: `loss(model, *batch)` -> the scalar mean loss of a batch, in train mode.
        metrics: name -> `Metric`. The first is the main one: it selects and tunes. Default: the loss.
        optimizer: called with the parameters and a learning rate. Default: Adam.
        learning_rates: each is run; every arm is evaluated at its own best one.
        schedules: name -> `Schedule`. The first is the default of all helpers.
        arms: name -> `Arm`, `Ensemble`, a rule or its spec. "live" is always there.
        claims: sentences that the report judges.
        published: figures of others that the report compares.
        caveats: sentences that the report adds to its own.
        steps: optimizer steps of a run.
        batch_size: rows of a batch; the last batch of an epoch may be smaller.
        evaluations: evenly spaced evaluations of all arms; the last is at the last step.
        seeds: runs of each schedule and learning rate.
        stacked: runs of a small model that are trained at once in one process, as one batched
            computation; 0 trains one after another. The results are the same up to rounding, with
            dropout in distribution.
        quick: the fields that a quick run replaces, e.g. {"steps": 200, "seeds": 4}.
        source: where the data come from, and their licence.

    Raises `ValueError` for a bad field, with its name.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[int], Data]
    loss: Callable[..., Tensor]
    arms: Mapping[str, Any]
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    title: str = ""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    optimizer: Callable[[Any, float], Optimizer] = _adam
    schedules: Mapping[str, Schedule] = field(default_factory=lambda: {"constant": constant})
    claims: tuple[Claim, ...] = ()
    published: tuple[Published, ...] = ()
    caveats: tuple[str, ...] = ()
    evaluations: int = 20
    seeds: int = 16
    stacked: int = 0
    quick: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "data", "loss", "optimizer"):
            require_function(name, getattr(self, name))
        for name in ("arms", "metrics", "schedules", "quick"):
            require_named(name, getattr(self, name))
        arms = {name: _as_arm(name, arm) for name, arm in self.arms.items()}
        object.__setattr__(self, "arms", arms)
        object.__setattr__(self, "metrics", dict(self.metrics) or {"loss": Metric(self.loss)})
        object.__setattr__(self, "learning_rates", as_rates(self.learning_rates))
        for name, kind in (("claims", Claim), ("published", Published), ("caveats", str)):
            object.__setattr__(self, name, as_tuple(name, getattr(self, name), kind))
        self._require_fields()

    def _require_fields(self) -> None:
        plain = isinstance(self.name, str) and self.name.replace("-", "_").isidentifier()
        require(plain, "name", self.name, "a word of letters, digits, - and _")
        for name in ("steps", "batch_size", "evaluations", "seeds"):
            value = getattr(self, name)
            require(is_integer(value, 1), name, value, "an integer >= 1")
        require(is_integer(self.stacked, 0), "stacked", self.stacked, "an integer >= 0")
        few = self.evaluations <= self.steps
        require(few, "evaluations", self.evaluations, f"at most the {self.steps} steps")
        require(bool(self.schedules), "schedules", self.schedules, "at least one")
        for name, each in self.metrics.items():
            fit = isinstance(each, Metric)
            require(fit, f"metric {name!r}", each, "a Metric, such as Metric(function)")
        for name, schedule in self.schedules.items():
            if isinstance(schedule, Plateau):
                self.require_arm(schedule.arm, f"schedule {name!r}")
            else:
                require_factors(name, schedule)
        if unknown := set(self.quick) - set(self.__dataclass_fields__):
            raise ValueError(f"quick has {sorted(unknown)}, wanted fields of Study")
        try:
            _ = self.quickly() if self.quick else self
        except (TypeError, ValueError) as error:
            raise type(error)(f"quick: {error}") from None

    def require_arm(self, arm: str, where: str = "") -> None:
        """Raise `ValueError` unless an arm of this name exists."""
        if arm not in self.arm_names:
            wanted = f"there is no arm {arm!r}, wanted {', '.join(self.arm_names)}"
            raise ValueError(f"{where}: {wanted}" if where else wanted)

    def require_metric(self, metric: str | None) -> str:
        """The metric, or the main one for None. Raise `ValueError` if there is no such metric."""
        metric = self.main if metric is None else metric
        require(metric in self.metrics, "metric", metric, ", ".join(self.metrics))
        return metric

    def require_schedule(self, schedule: str | None) -> str:
        """The schedule, or the first one for None. Raise `ValueError` if there is no such schedule."""
        schedule = next(iter(self.schedules)) if schedule is None else schedule
        require(schedule in self.schedules, "schedule", schedule, ", ".join(self.schedules))
        return schedule

    @property
    def arm_names(self) -> tuple[str, ...]:
        """The names of all arms, "live" first."""
        return (LIVE, *self.arms)

    @property
    def main(self) -> str:
        """The name of the main metric."""
        return next(iter(self.metrics))

    def quickly(self) -> Study:
        """The study with the fields of `quick`."""
        return replace(self, **{**self.quick, "quick": {}})


def _as_arm(name: str, arm: Any) -> Arm | Ensemble:
    require(name != LIVE, "an arm's name", name, "another name: the live weights are always there")
    try:
        return arm if isinstance(arm, Arm | Ensemble) else Arm(arm)
    except (TypeError, ValueError) as error:
        raise type(error)(f"arm {name!r}: {error}") from None
