"""Tracking: all arms of one run, updated after every step and read at any time.

Windows and ensembles share rings of snapshots: the mean over a ring is one operation a tensor, where a
window of a thousand slots is a sum of a thousand. All other rules are averages of an `Averager`, one for
each cadence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyak.averager import Averager
from polyak.rules import LIVE, Rule, Tail, Uniform, Window
from polyak.study._study import Arm, Ensemble, Study
from polyak.theory import Profile, coefficients

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
                self._rings[every] = Ring(model, size, every, spare(study, every), buffers)
            rules = {n: rule_of(study.arms[n], study.steps) for n in names if not self._sizes[n]}
            if rules:
                self._averagers[every] = Averager(model, rules, buffers=buffers)
        self._steps = 0

    def update(self) -> None:
        """Count one step in every arm."""
        self._steps += 1
        for every, averager in self._averagers.items():
            if self._steps % every == 0:
                averager.update(every)
        for ring in self._rings.values():
            ring.update()

    def keep(self, weights: Weights, rows: Tensor) -> Tracking:
        """The arms of some of the runs of a stack; `weights` are these runs' new tensors."""
        kept = Tracking(self._study, weights, self._buffers)
        kept._steps = self._steps
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
    """The last snapshots of a model's averaged tensors, one every `every` steps.

    It has room for `spare` snapshots more than `size`. So a mean that is read at least every `spare`
    snapshots needs only those that have come and gone since it was read last.
    """

    def __init__(
        self, model: Source, size: int, every: int, spare: int, buffers: Any = "auto"
    ) -> None:
        known = policies(model, buffers)
        self._live = {n: t for n, t in tensors_of(model).items() if known.get(n) == "average"}
        self._room = size + spare
        self._kept = {n: t.new_empty((self._room, *t.shape)) for n, t in self._live.items()}
        self._every, self._spare, self._steps, self._count = every, spare, 0, 0
        self._sums: dict[int, tuple[int, Weights]] = {}
        """size of a window -> (snapshots when it was read last, its float64 sums)"""

    def update(self) -> None:
        """Count a step, and keep a snapshot every `every` steps."""
        self._steps += 1
        if self._steps % self._every == 0:
            for name, tensor in self._live.items():
                self._kept[name][self._count % self._room].copy_(tensor)
            self._count += 1

    def keep_in(self, other: Ring, rows: Tensor) -> None:
        """Copy the snapshots of some runs of a stack to another ring, and its counts."""
        other._steps, other._count = self._steps, self._count
        for name, kept in self._kept.items():
            other._kept[name].copy_(kept[:, rows])

    def last(self, size: int) -> list[Weights]:
        """The last `size` snapshots, or all if there are fewer, the oldest first."""
        first = max(self._count - size, 0)
        places = [number % self._room for number in range(first, self._count)]
        return [{name: kept[place] for name, kept in self._kept.items()} for place in places]

    def mean(self, size: int) -> list[Weights]:
        """The mean of the last `size` snapshots; nothing before the first."""
        if not self._count:
            return []
        sums, share = self._window(size), 1 / min(self._count, size)
        return [{name: (total * share).to(self._live[name].dtype) for name, total in sums.items()}]

    def _window(self, size: int) -> Weights:
        """The sums of a window in float64, where adding and taking away leaves no trace."""
        read, sums = self._sums.get(size, (0, {}))
        if not sums or self._count - read > min(self._spare, size):
            sums = self._sum(max(self._count - size, 0), self._count)
        elif self._count > read:
            came = self._sum(read, self._count)
            gone = self._sum(max(read - size, 0), max(self._count - size, 0))
            sums = {name: total + came[name] - gone[name] for name, total in sums.items()}
        self._sums[size] = self._count, sums
        return sums

    def _sum(self, first: int, last: int) -> Weights:
        """The sums of the snapshots from number `first` to before `last`."""
        places = torch.arange(first, last) % self._room
        return {n: kept[places].sum(0, dtype=torch.float64) for n, kept in self._kept.items()}


def spare(study: Study, every: int) -> int:
    """The most snapshots between two evaluations."""
    return -(-study.steps // (study.evaluations * every)) + 1


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


def profile_of(rule: Rule, steps: int, every: int) -> Profile | None:
    """The profile of an arm, updated at steps `every`, 2 `every`, ...; None before its first update.

    A term in the live weights counts at the last update.
    """
    if steps < every:
        return None
    profile = np.zeros(steps)
    profile[every - 1 :: every] = coefficients(rule, [every] * (steps // every))
    return profile


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
