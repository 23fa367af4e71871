"""Tracking: all arms of one run, updated after every step and read at any time.

Windows and ensembles share rings of snapshots: the mean over a ring is one operation a tensor, where a
window of a thousand slots is a sum of a thousand. All other rules are averages of an `Averager`, one for
each cadence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from polyak.averager import Averager
from polyak.rules import LIVE, Rule, Tail, Uniform, Window
from polyak.study._study import Arm, Ensemble, Study

Weights = dict[str, Tensor]
Source = nn.Module | Mapping[str, Tensor]


class Tracking:
    """The arms of a run on a model. They draw no random numbers and write nothing to the model."""

    def __init__(self, study: Study, model: Source, buffers: Any = "auto") -> None:
        self._study, self._buffers = study, buffers
        self._live = tensors_of(model)
        self.trained = trained(model)
        """The names of the parameters that are trained."""
        self._arms: Mapping[str, Any] = study.arms
        self._sizes = {name: ring_size(arm) for name, arm in study.arms.items()}
        self._averagers: dict[int, Averager] = {}
        self._rings: dict[int, Ring] = {}
        for every in sorted({arm.every for arm in study.arms.values()}):
            names = [name for name, arm in study.arms.items() if arm.every == every]
            if size := max(self._sizes[name] for name in names):
                self._rings[every] = Ring(model, size, every, buffers)
            rules = {n: rule_of(study.arms[n], study.steps) for n in names if not self._sizes[n]}
            if rules:
                self._averagers[every] = Averager(model, rules, every=every, buffers=buffers)
        self._updates: list[Callable[[], None]] = [a.update for a in self._averagers.values()]
        self._updates += [ring.update for ring in self._rings.values()]

    def update(self) -> None:
        """Count one step in every arm."""
        for update in self._updates:
            update()

    def keep(self, weights: Weights, rows: Tensor) -> Tracking:
        """The arms of some of the runs of a stack; `weights` are these runs' new tensors."""
        kept = Tracking(self._study, weights, self._buffers)
        for every, averager in self._averagers.items():
            state = _rows_of(averager.state_dict(), rows)
            kept._averagers[every].load_state_dict(state)
        for every, ring in self._rings.items():
            ring.keep_in(kept._rings[every], rows)
        return kept

    def networks(self, arm: str) -> list[Weights]:
        """The networks of an arm, as tensors by name: one, several of an ensemble, none before an update."""
        if arm == LIVE:
            return [self._live]
        every, size = self._arms[arm].every, self._sizes[arm]
        if isinstance(self._arms[arm], Ensemble):
            return self._rings[every].last(size)
        if size:
            return self._rings[every].mean(size)
        averager = self._averagers[every]
        return [averager.average(arm)] if averager.count else []


class Ring:
    """The last `size` snapshots of a model's averaged tensors, one every `every` steps."""

    def __init__(self, model: Source, size: int, every: int, buffers: Any = "auto") -> None:
        known = policies(model, buffers)
        self._live = {n: t for n, t in tensors_of(model).items() if known.get(n) == "average"}
        self._kept = {n: t.new_empty((size, *t.shape)) for n, t in self._live.items()}
        self._every, self._steps, self._size = every, 0, size

    def update(self) -> None:
        """Count a step, and keep a snapshot every `every` steps."""
        self._steps += 1
        if self._steps % self._every == 0:
            place = (self._steps // self._every - 1) % self._size
            for name, tensor in self._live.items():
                self._kept[name][place].copy_(tensor)

    def keep_in(self, other: Ring, rows: Tensor) -> None:
        """Copy the snapshots of some runs of a stack to another ring, and its count."""
        other._steps = self._steps
        for name, kept in self._kept.items():
            other._kept[name].copy_(kept[:, rows])

    def last(self, size: int) -> list[Weights]:
        """The last `size` snapshots, or all if there are fewer, the oldest first."""
        return [{n: kept[i] for n, kept in self._kept.items()} for i in self._places(size)]

    def mean(self, size: int) -> list[Weights]:
        """The mean of the last `size` snapshots; nothing before the first."""
        places = self._places(size)
        if not places:
            return []
        if len(places) == self._size:  # all of the ring: its mean needs no copy
            return [{n: kept.mean(0) for n, kept in self._kept.items()}]
        return [{n: kept[places].mean(0) for n, kept in self._kept.items()}]

    def _places(self, size: int) -> list[int]:
        count = self._steps // self._every
        return [i % self._size for i in range(max(count - size, 0), count)]


def tensors_of(model: Source) -> Weights:
    """The parameters and buffers of a model, or of a mapping, by name; detached, with shared memory."""
    if isinstance(model, nn.Module):
        model = dict([*model.named_parameters(), *model.named_buffers()])
    return {name: tensor.detach() for name, tensor in model.items()}


def trained(model: Source) -> list[str]:
    """The names of the parameters that are trained."""
    named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    return [name for name, tensor in named if tensor.requires_grad]


def policies(model: Source, buffers: Any = "auto") -> dict[str, Any]:
    """What an averager does with each tensor: name -> "average", "copy" or "skip"."""
    return {item.name: item.policy for item in Averager(model, Uniform(), buffers=buffers).tracked}


def size_of(weights: Weights) -> int:
    """The bytes of a network."""
    return sum(tensor.nbytes for tensor in weights.values())


def rule_of(arm: Arm, steps: int) -> Rule:
    """The rule of an arm in a run of so many steps."""
    return Tail(arm.rule, start=round(arm.start * steps)) if arm.start else arm.rule


def ring_size(arm: Arm | Ensemble) -> int:
    """The snapshots that an arm needs in a ring; 0 if an `Averager` has it."""
    if isinstance(arm, Ensemble):
        return arm.size
    return arm.rule.size if isinstance(arm.rule, Window) and not arm.start else 0


def copies(arm: Arm | Ensemble) -> int:
    """The copies of the weights that an arm keeps."""
    return ring_size(arm) or len(arm.rule.slots)  # type: ignore[union-attr]


def _rows_of(state: Any, rows: Tensor) -> Any:
    """Some runs of a state of stacked tensors."""
    if isinstance(state, dict):
        return {name: _rows_of(value, rows) for name, value in state.items()}
    return state[rows] if isinstance(state, Tensor) else state
