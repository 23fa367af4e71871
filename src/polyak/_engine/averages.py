"""The parts of an `Averager`, and its properties.

`Averager` is this base, `resumable`, `into_modules`, and training in `polyak.averager`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from polyak._dtypes import require_slot_dtype
from polyak._engine import open_swaps
from polyak._engine.applying import Swapper
from polyak._engine.attachment import Attachment
from polyak._engine.guard import Nonfinite
from polyak._engine.live import ModelTensors
from polyak._engine.policies import Choose
from polyak._engine.pulling import Pull, pull_, require_pull
from polyak._engine.readout import AverageWeights
from polyak._engine.rounding import Rounding, require_rounding
from polyak._engine.slots import Average
from polyak._engine.tracking import Source, Tracked
from polyak._engine.twins import Twins
from polyak._engine.updating import Updating, undisturbed
from polyak._lazy import TensorSpec
from polyak._ranks.agreement import Agreement, digest, together_or_alone
from polyak._ranks.replicas import require_same
from polyak._ranks.sharding import is_distributed, one_mesh, require_beside
from polyak.rules import Rule, Tick
from polyak.specs import ONLY, as_specs, named_rules

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Options(NamedTuple):
    """The options of an averager that a copy of it is made with, beside the choice of tensors."""

    every: int
    dtype: torch.dtype | None
    rounding: Rounding
    device: torch.device | str | None
    nonfinite: Nonfinite
    pull: Pull | None


class Averages:
    """The averages of one model, their options, and the parts that move them and write them into the model."""

    def _make(
        self,
        model: Source,
        rule: Rule | str | Mapping[str, Rule | str],
        choice: Choose,
        options: Options,
        shard: DeviceMesh | ProcessGroup | None = None,
    ) -> None:
        before = set(vars(self))
        self._mesh = None if shard is None else one_mesh(shard, _device(model))
        with self._together("Averager"):
            require_slot_dtype(options.dtype)
            place = as_device(options.device)
            self._choice, self._options = choice, options._replace(device=place)
            self._live = ModelTensors(model, choice, mesh=self._mesh)
            self._make_averages(rule, options, place)
        self.run: str | None = None
        """The id of the run that a `Recorder` stores; it is part of the state."""
        self.mixed = False
        """Whether another rule made a part of the slots (`change_rule`)."""
        self._swapper = Swapper(self._live, self._averages, self._updating, self._mesh)
        self._twins = Twins(self._live, self._averages, self._updating)
        self._call = self._with_pull(self._updating.call)
        self._attachment: Attachment | None = None
        self._parts = {*vars(self), "_parts"} - before
        """The attributes that are not a subclass's own, nor a user's."""
        self._compare_replicas("Averager")

    def _make_averages(
        self,
        rule: Rule | str | Mapping[str, Rule | str],
        options: Options,
        place: torch.device | None,
    ) -> None:
        """The averages of the model's tensors, and their updates; refuses options that do not fit these."""
        rounding = options.rounding
        self._refuse_sharded(place, options.nonfinite)
        self._averages = {
            name: Average(each, dtype=options.dtype, device=place, rounding=rounding, name=name)
            for name, each in named_rules(rule).items()
        }
        require_pull(options.pull, self._averages)
        if options.pull is not None:
            self._refuse_rows("pull")
        first = next(iter(self._averages.values()))
        require_rounding(rounding, {spec.dtype for spec in first.specs(self._live).values()})
        self._updating = Updating(
            self._live,
            list(self._averages.values()),
            every=options.every,
            nonfinite=options.nonfinite,
            device=place,
        )

    @property
    def rule(self) -> Rule | dict[str, Rule]:
        """The rule, or name -> rule if there are several."""
        rules = self.rules
        return rules[ONLY] if list(rules) == [ONLY] else rules

    @property
    def rules(self) -> dict[str, Rule]:
        """name -> rule. A single average is called "average"."""
        return {name: average.rule for name, average in self._averages.items()}

    @property
    def model(self) -> Source:
        """The model, or the mapping, whose weights are averaged."""
        return self._live.model

    @property
    def every(self) -> int:
        """The number of calls of `update` per update."""
        return self._updating.every

    @property
    def tracked(self) -> list[Tracked]:
        """Every tensor of the model as it is now: its name, its policy, and where it is.

        Raises `RuntimeError` if the model's tensors are not those that the averager was made with.
        """
        self._live.check("tracked")
        return list(self._live.tracked)

    def slot_specs(self, name: str | None = None) -> dict[str, dict[str, TensorSpec]]:
        """The tensors that an average may hold: slot -> tensor's name -> shape and dtype.

        Raises `KeyError` for an unknown name.
        """
        average = self._get(name)
        return {slot: average.specs(self._live) for slot in sorted(average.known_slots())}

    @property
    def clock(self) -> Tick:
        """The clock after the last update. Unlike `count`, it does not wait for the device."""
        return next(iter(self._averages.values())).tick

    @property
    def count(self) -> int:
        """The number of updates so far: every `every`-th call of `update`, the first too, and `begin`'s."""
        self._updating.settle()
        return self.clock.n

    @property
    def skipped(self) -> int:
        """The number of updates left out because weights were not finite (`nonfinite="skip"`)."""
        self._updating.settle()
        return self._updating.guard.skipped

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only a part of the weights, or of the averages."""
        self._live.reshard()
        stored = self._live.stored()
        return any(i.mesh is not None or is_distributed(i.entries[0].now()) for i in stored)

    def check_replicas(self) -> None:
        """Compare the weights of all ranks bit for bit (with `shard`). Collective.

        The averager does this when it is made and when it is saved. Raises `RuntimeError` with the
        names of the tensors that differ: their rows would be averages of different models.
        """
        self._compare_replicas("check_replicas")

    @open_swaps.in_turn
    def weights(self, name: str | None = None) -> AverageWeights:
        """Return the average as a mapping that computes each tensor when it is read.

        It needs less memory than `average()` and is valid until the next update. It raises the same
        errors as `average()`.
        """
        return self._weights("average", name)

    def _weights(self, call: str, name: str | None) -> AverageWeights:
        average = self._get(name)
        self._ready(call, average)
        return AverageWeights(self._live, average, self._updating.copies.tensors)

    def _together(self, call: str) -> AbstractContextManager[Agreement]:
        """With `shard`: a block that fails on all ranks if it fails on one."""
        return together_or_alone(call, None if self._mesh is None else self._mesh.get_group())

    def _compare_replicas(self, call: str) -> None:
        if self._mesh is None:
            return
        with self._together(call):
            self._live.check(call)
            alike = {i.name: i.found() for i in self._live.averaged if i.kind != "buffer"}
            stored = [(item.name, item.policy) for item in self._live.stored()]
        slots = f"dtype={self._options.dtype}, {self._options.rounding} rounding"
        made_with = f"{as_specs(self.rules)}, every={self.every}, {slots}, "
        made_with += f"{len(stored)} tensors ({digest(stored)})"
        require_same(call, alike, made_with, self._mesh)

    def _refuse_sharded(self, place: torch.device | None, nonfinite: str) -> None:
        """Raise `ValueError` for options that sharded weights cannot have."""
        stored = self._live.stored()
        require_beside((item.held() for item in stored), place)
        sharded = [item.name for item in stored if is_distributed(item.held())]
        if sharded and nonfinite in ("skip", "error"):
            raise ValueError(
                f'nonfinite is "{nonfinite}" and the weights are sharded ({sharded[0]}): each rank '
                'would decide by its own shards, and the ranks would differ; wanted "allow"'
            )

    def _refuse_rows(self, call: str) -> None:
        if self._mesh is not None:
            raise ValueError(
                f"{call}: with shard= a rank has only its rows; call copy_to(model) instead"
            )

    def _same_model(self, call: str) -> None:
        self._swapper.refuse(call)
        self._updating.settle()
        self._live.check(call)
        for average in self._averages.values():
            average.require_own(self._live, call)

    def _ready(self, call: str, average: Average) -> None:
        self._same_model(call)
        self._twins.check(call)
        average.require_usable(call)

    def _get(self, name: str | None) -> Average:
        return self._averages[self._swapper.label(name)]

    def _with_pull(self, call: Callable[..., None]) -> Callable[..., None]:
        """The function that `update` and `attach` call: one call, and the pull that may follow it."""
        pull = self._options.pull
        return call if pull is None else partial(self._call_and_pull, call, pull)

    def _call_and_pull(
        self,
        call: Callable[..., None],
        pull: Pull,
        elapsed: float,
        found_inf: Sequence[Tensor] = (),
    ) -> None:
        average = self._get(pull.name)
        self._updating.settle()
        due = average.tick.n + 1

        def both() -> None:
            call(elapsed, found_inf)
            self._updating.settle()
            if average.tick.n == due:
                self._pull(pull.fraction, pull.name)

        # An update whose pull a signal has stopped would never be pulled.
        if due % pull.every == 0:
            undisturbed(both)
        else:
            call(elapsed, found_inf)

    def _pull(self, fraction: float, name: str | None) -> None:
        self._refuse_rows("pull")
        self._ready("pull", self._get(name))
        self._live.reshard()
        undisturbed(lambda: pull_(self._live, self.weights(name), fraction))


def as_device(device: torch.device | str | None) -> torch.device | None:
    """A device by its name; None where none is given."""
    return None if device is None else torch.device(device)


def _device(model: object) -> torch.device:
    """The device of a model's first tensor. `track` refuses later what cannot be a model."""
    held: Iterable[object] = model.values() if isinstance(model, Mapping) else ()
    tensors = model.parameters() if isinstance(model, nn.Module) else held
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))
