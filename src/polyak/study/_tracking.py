"""All arms of one run, or of a stack of runs: updated after every step, read at evaluations.

The averaged tensors are copied into a few long ones, which all arms read. A rule is an average of an
`Averager`, and arms with the same rule share it. A window is the difference of two running sums: it costs
one addition a step, whatever its size. Swept arms are read from such sums too. Ensembles keep snapshots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from polyak.averager import Averager
from polyak.rules import LIVE, Uniform, Window
from polyak.study._flat import Flat, Weights, first_names, joined, some_runs
from polyak.study._study import Arm, Ensemble, Study
from polyak.study._weighting import evaluated, rule_of, shared


class Tracking:
    """The arms of a run of a model. They draw no random numbers and write nothing to the model.

    `stacked` are the tensors of several such models by name, with one more dimension, the run.
    """

    def __init__(self, study: Study, model: nn.Module, stacked: Weights | None = None) -> None:
        self._steps, self._dimensions = 0, 0 if stacked is None else 1
        tracked = Averager(model, Uniform()).tracked
        self._averaged = [item.name for item in tracked if item.policy == "average"]
        self._trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._bind(tensors_of(model) if stacked is None else stacked)
        kinds: dict[tuple[type[Kept], int], dict[str, Any]] = {}
        for name, arm in study.arms.items():
            kind, key = kept_as(arm, study.steps)
            kinds.setdefault((kind, arm.every), {})[name] = key
        self._places: dict[str, tuple[Kept, Any]] = {}
        """arm -> what keeps it, and under which key"""
        for (kind, every), keys in kinds.items():
            distinct, ends = tuple(dict.fromkeys(keys.values())), evaluated(study, every)
            kept = kind(every, distinct, self._flat.tensors, ends)
            self._places |= {name: (kept, key) for name, key in keys.items()}
        self._kept = list(dict.fromkeys(kept for kept, _ in self._places.values()))

    def _bind(self, live: Weights) -> None:
        self._live = {name: tensor.detach() for name, tensor in live.items()}
        self._flat = Flat({name: self._live[name] for name in self._averaged}, self._dimensions)

    def update(self) -> None:
        """Count one step in every arm."""
        self._steps += 1
        due = [kept for kept in self._kept if self._steps % kept.every == 0]
        if due:
            self._flat.take()
        for kept in due:
            kept.update()

    def keep(self, live: Weights, rows: Tensor) -> None:
        """Go on with some of the runs of a stack; `live` are their tensors from now on."""
        self._bind(live)
        for kept in self._kept:
            kept.keep(self._flat.tensors, rows)

    def networks(self, arm: str) -> list[Network]:
        """One network, those of an ensemble with the oldest first, or none before the first update."""
        if arm == LIVE:
            return [Network(self._live)]
        self._flat.take()  # some averages have a share of the live weights
        kept, key = self._places[arm]
        return [
            Network(self._live | self._flat.split(n.weights), n.outputs) for n in kept.read(key)
        ]

    def vector(self, network: Network) -> Tensor:
        """The trained parameters of a network as one vector of real numbers, or one of each run."""
        trained = (network.weights[name].detach() for name in self._trained)
        real = (torch.view_as_real(t) if t.is_complex() else t for t in trained)
        return joined(real, self._dimensions)


@dataclass
class Network:
    """The tensors of a network, and the outputs that it gave: part of the data -> inputs -> output."""

    weights: Weights
    outputs: dict[str, dict[tuple[int, ...], Tensor]] = field(default_factory=dict)


class Kept(ABC):
    """The tensors kept for several arms that are updated every `every` steps.

    `keys` tell the arms apart, `live` are the joined tensors as they are at each update, and `ends` the
    numbers of updates at which a window is read.
    """

    def __init__(self, every: int, keys: Sequence[Any], live: Weights, ends: set[int]) -> None:
        self.every, self._keys, self._live, self._ends = every, keys, live, ends

    @abstractmethod
    def update(self) -> None:
        """Count an update."""

    @abstractmethod
    def read(self, key: Any) -> list[Network]:
        """The networks of an arm, as joined tensors."""

    def keep(self, live: Weights, rows: Tensor) -> None:
        """Go on with some of the runs of a stack."""
        self._live = live
        self._keep(rows)

    @abstractmethod
    def _keep(self, rows: Tensor) -> None: ...


class AveragerArms(Kept):
    """Averages of an `Averager`; a key is a rule."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._names = {rule: f"average {number}" for number, rule in enumerate(self._keys)}
        self._averager = self._new()

    def _new(self) -> Averager:
        return Averager(self._live, {name: rule for rule, name in self._names.items()})

    def update(self) -> None:
        self._averager.update(self.every)

    def read(self, key: Any) -> list[Network]:
        averager = self._averager
        return [Network(averager.average(self._names[key]))] if averager.count else []

    def _keep(self, rows: Tensor) -> None:
        state = _some(self._averager.state_dict(), rows)
        self._averager = self._new()
        self._averager.load_state_dict(state)


class Sums(Kept):
    """Windows, read at evaluations; a key is a size.

    The sums are in float64, where the difference of two of them is as good as the sum of a window.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._sum = {
            name: torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float64))
            for name, tensor in self._live.items()
        }
        self._count, self._starts = 0, {0: self._copy()}
        """The sums before the first snapshots of the windows that are still to be read."""

    def _copy(self) -> Weights:
        return {name: tensor.clone() for name, tensor in self._sum.items()}

    def update(self) -> None:
        self._count += 1
        for name, total in self._sum.items():
            total.add_(self._live[name])
        self._mark()

    def _mark(self) -> None:
        """Copy the sums where a window begins that is still to be read."""
        if any(self._count + size in self._ends for size in self._keys):
            self._starts[self._count] = self._copy()
            oldest = self._count - max(self._keys)
            self._starts = {n: sums for n, sums in self._starts.items() if n >= oldest}

    def read(self, key: Any) -> list[Network]:
        if not self._count:
            return []
        start = max(self._count - key, 0)
        before, share = self._starts[start], 1 / (self._count - start)
        return [Network({name: (t - before[name]) * share for name, t in self._sum.items()})]

    def _keep(self, rows: Tensor) -> None:
        self._sum = some_runs(self._sum, rows)
        self._starts = {start: some_runs(sums, rows) for start, sums in self._starts.items()}


class Stretches(Sums):
    """Averages that are read from the sums at all evaluations; a key is a rule.

    The updates from one evaluation to the next share the weight that the rule gives to all of them. The
    first update, which copies, has its own.
    """

    def _mark(self) -> None:
        if self._count == 1 or self._count in self._ends:
            self._starts[self._count] = self._copy()

    def read(self, key: Any) -> list[Network]:
        if not self._count:
            return []
        sums = self._starts | {self._count: self._sum}
        mean = {}
        for name, total in self._sum.items():
            shares = shared(key, self.every, tuple(sums), name.endswith("running_var"))
            pairs = zip(shares, pairwise(each[name] for each in sums.values()), strict=True)
            mean[name] = torch.zeros_like(total)
            for share, (before, after) in pairs:
                mean[name] += share * (after - before)
        return [Network(mean)]


class Snapshots(Kept):
    """The last networks of ensembles; a key is a size."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._networks: deque[Network] = deque(maxlen=max(self._keys))

    def update(self) -> None:
        self._networks.append(Network({name: t.clone() for name, t in self._live.items()}))

    def read(self, key: Any) -> list[Network]:
        return list(self._networks)[-key:]

    def _keep(self, rows: Tensor) -> None:
        for network in self._networks:
            network.weights = some_runs(network.weights, rows)
            for part, outputs in network.outputs.items():
                network.outputs[part] = some_runs(outputs, rows)


def kept_as(arm: Arm | Ensemble, steps: int) -> tuple[type[Kept], Any]:
    """How an arm is kept in a run of this many steps, and its key."""
    if isinstance(arm, Ensemble):
        return Snapshots, arm.size
    if arm.swept:
        return Stretches, rule_of(arm, steps)
    if isinstance(arm.rule, Window) and not arm.start:
        return Sums, arm.rule.size
    return AveragerArms, rule_of(arm, steps)


def tensors_of(model: nn.Module) -> Weights:
    """The parameters and buffers of a model by first name; detached, with shared memory."""
    first, tensors = first_names(model), (*model.named_parameters(), *model.named_buffers())
    return {name: t.detach() for name, t in tensors if first[id(t)] == name}


def size_of(weights: Weights) -> int:
    """The bytes of a network."""
    return sum(tensor.nbytes for tensor in weights.values())


def copies(arm: Arm | Ensemble) -> int:
    """The copies of the weights that an arm keeps on its own."""
    return arm.size if isinstance(arm, Ensemble) else len(arm.rule.slots)


def _some(state: Any, rows: Tensor) -> Any:
    """Some runs of a state of stacked tensors."""
    if isinstance(state, dict):
        return {name: _some(value, rows) for name, value in state.items()}
    return state[rows] if isinstance(state, Tensor) else state
