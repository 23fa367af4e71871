"""The live weights: a model's tensors, found again at every use, in groups for one foreach call."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from polyak._checks import difference, report
from polyak._engine.tracking import Buffers, Policy, Select, Source, Tracked, holders, track
from polyak._ranks.sharding import Shape, Shards, is_distributed, reshard
from polyak._tensors import Groups, Kind, Stages, kind

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_END = {None: None}.values()  # what was added behind the last would not be seen without it


class ModelTensors:
    """What of a model is averaged or copied, and where it is now.

    Tensors keep the order of the first look, or that of `order`, however a model orders them later:
    lists in parallel to `averaged` and `copied` stay right. `indices` are those of `averaged` that
    one foreach call can take, group by group; `streams` tell the parts of groups apart, and are the
    same on ranks that have the same parts. `generation` counts how often tensors were found to be
    replaced or moved, so that what was grouped before can be grouped anew.
    """

    def __init__(
        self,
        model: Source,
        buffers: Buffers,
        select: Select,
        order: Sequence[str] | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self._model = model
        self._options = (buffers, select, mesh)
        self.generation = 0
        tracked = self._look()
        self._forms = _forms(tracked)
        self._order = list(order or self._forms)
        self._adopt(tracked)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: all that is not found again by looking."""
        kept = ("_model", "_options", "_forms", "_order", "generation")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._adopt(self._look())

    def groups(self) -> Groups:
        """The averaged weights in groups of one dtype and device: the hot path.

        Replaced tensors and modules are noticed here. A tensor that was moved in place (`.to`) is
        noticed by the first of its group, since models move as a whole; any other is still averaged
        rightly.
        """
        now = chain.from_iterable(self._views)
        kinds = zip(self._groups, self._kinds, strict=True)
        if (
            not all(map(operator.is_, now, self._seen))
            or any(kind(group[0]) != was for group, was in kinds)
            or not self._shards.unmoved()
        ):
            self.check("update")
        return self._groups

    def group(self, flat: Sequence[Tensor]) -> Groups:
        """Tensors in the order of `averaged`, in the groups of the live weights."""
        return [[flat[i] for i in indices] for indices in self.indices]

    def check(self, call: str) -> None:
        """Looks all tensors up anew; raises `RuntimeError` if names, shapes or policies differ."""
        tracked = self._look()
        if lines := difference(self._forms, _forms(tracked)):
            if any(is_distributed(item.found()) for item in tracked):
                lines.append("shard the model (fully_shard, parallelize_module) before")
            raise RuntimeError(
                report(f"{call}: not the tensors that the averager was made with", lines)
            )
        self._adopt(tracked)

    def reshard(self) -> None:
        """Lets a sharded model carry its shards, which a forward pass may have put aside."""
        reshard(self._model)

    def stored(self) -> list[Tracked]:
        """All that is averaged or copied, in order."""
        return [item for item in self.tracked if item.policy != "skip"]

    def _look(self) -> list[Tracked]:
        self.reshard()
        return track(self._model, *self._options)

    def _adopt(self, tracked: list[Tracked]) -> None:
        by_name = {item.name: item for item in tracked}
        self.tracked = [by_name[name] for name in self._order]
        self.averaged = [item for item in self.tracked if item.policy == "average"]
        self.copied = [item for item in self.tracked if item.policy == "copy"]
        self._views = [*holders(self._model, self.averaged), _END]
        self._shards = Shards(
            [item.found() for item in self.averaged],
            [item.found() for item in self.averaged if item.mesh is not None],
        )
        self._seen = list(chain.from_iterable(self._views))
        indices: dict[tuple[Kind, str], list[int]] = {}
        for i, item in enumerate(self.averaged):
            indices.setdefault((kind(item.local()), item.stream()), []).append(i)
        self._kinds = [each for each, _ in indices]
        self.streams = [f"{dtype} {each}" for (dtype, _), each in indices]
        self.indices = list(indices.values())
        self.stages: list[Stages] = [{} for _ in indices]
        self._groups = self.group([item.local() for item in self.averaged])
        self.generation += 1


def _forms(tracked: Sequence[Tracked]) -> dict[str, tuple[Shape, Policy]]:
    """name -> shape and policy of every tensor, those left to the model by their name alone."""
    return {
        item.name: (() if item.policy == "skip" else item.shape(), item.policy) for item in tracked
    }
