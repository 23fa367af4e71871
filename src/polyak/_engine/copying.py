"""Write an average into a model permanently, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak._checks import difference, report
from polyak._engine import open_swaps
from polyak._engine.live import ModelTensors
from polyak._engine.memory import identity
from polyak._engine.tracking import Choice, Source, Tracked, track
from polyak._engine.updating import undisturbed
from polyak._modes import forget_computed, no_grad
from polyak._ranks.replicas import gather_
from polyak._ranks.sharding import Layout, Shape, reshard, shape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def places(
    model: Source, choice: Choice, live: ModelTensors, average: Mapping[str, Tensor]
) -> list[Tracked]:
    """The tensors of a model that take an average of `live`; raises what `Averager.copy_to` raises."""
    reshard(model)
    found = [item for item in track(model, choice).tracked if item.policy != "skip"]
    _require_fit(live.readable(), found, average)
    open_swaps.refuse_swapped("copy_to", found)
    return found


def gathered_forms(
    live: ModelTensors, found: Sequence[Tracked]
) -> list[tuple[str, torch.Size, torch.dtype]]:
    """Names, shapes and dtypes of the tensors that are gathered from the rows of all ranks."""
    theirs = _by_name(found)
    names = [item.name for item in live.averaged if item.mesh is not None]
    return [(name, theirs[name].shape, theirs[name].dtype) for name in names]


@no_grad
def write_(
    found: Sequence[Tracked],
    average: Mapping[str, Tensor],
    live: ModelTensors,
    mesh: DeviceMesh | None,
) -> None:
    """Write an average, rounded to the model's dtypes. Collective with a mesh.

    Raises `RuntimeError` if another thread has entered a block since `places`.
    """
    theirs = _by_name(found)
    divided = [name for name, *_ in gathered_forms(live, found)]
    if mesh is not None:
        gather_([(theirs[name], average[name]) for name in divided], mesh)
    gathered = {id(theirs[name]) for name in divided}

    def copy() -> None:
        for item in found:
            to, content = theirs[item.name], average[item.name]
            if id(to) not in gathered and identity(to) != identity(content):
                to.copy_(content)

    with open_swaps.TURN:
        open_swaps.refuse_swapped("copy_to", found)
        undisturbed(copy)
        forget_computed()


def _by_name(found: Sequence[Tracked]) -> dict[str, Tensor]:
    """Every name -> this rank's content; all names of one tensor have the same object."""
    return {name: tensor for item in found for tensor in [item.local()] for name in item.names}


def _require_fit(
    ours: Sequence[Tracked], theirs: Sequence[Tracked], average: Mapping[str, Tensor]
) -> None:
    """Raise `ValueError` unless a model can hold an average: names, shapes, one value per tensor."""
    if lines := difference(_shapes(ours), _shapes(theirs)):
        if any(isinstance(each, Layout) for each in _shapes(ours).values()):
            lines.append("between layouts: polyak.save, or checkpoints.export, and load there")
        raise ValueError(report("copy_to: the model's tensors are not the average's", lines))
    for item in theirs:
        first = average[item.name]
        for name in item.aliases:
            if average[name] is not first and not torch.equal(average[name], first):
                raise ValueError(
                    f"copy_to: {name} is tied to {item.name} in the model, but the two "
                    "have different averages: use a model in which they are two tensors"
                )


def _shapes(tracked: Sequence[Tracked]) -> dict[str, Shape]:
    """name -> shape in the model, under all names of tied tensors."""
    return {n: shape(item.found()) for item in tracked for n in (item.name, *item.aliases)}
