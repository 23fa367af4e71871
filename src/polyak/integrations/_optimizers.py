"""Which optimizers move the weights that are averaged."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from polyak.averager import Averager


def moving(averager: Averager, optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Return the optimizers that have at least one of the averaged tensors."""
    averaged = {id(item.found()) for item in averager.tracked if item.policy == "average"}
    return [each for each in optimizers if not averaged.isdisjoint(map(id, _parameters(each)))]


def _parameters(optimizer: Optimizer) -> list[object]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
