"""Which optimizers a wrapper contains, which weights they change, and whether they average."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak._checks import listed
from polyak._engine.memory import meeting
from polyak._engine.tracking import Tracked
from polyak._ranks.sharding import local

_INSIDE = ("optimizer", "base_optimizer", "optim", "base")
"""The attributes in which optimizers and their wrappers keep the optimizer inside them."""


def movers(tracked: Sequence[Tracked], optimizers: Sequence[Any]) -> Sequence[Any]:
    """Those of the optimizers that have an averaged tensor; all of them if none has."""
    averaged = [item for item in tracked if item.policy == "average"]
    return [each for each in optimizers if _moved(averaged, [each])] or optimizers


def _moved(averaged: Sequence[Tracked], optimizers: Sequence[Any]) -> list[Tracked]:
    """The averaged tensors that optimizers have: as the same object, or in the same memory.

    Megatron, apex and torchao train copies of the weights. They keep the weights in lists, to write them back.
    """
    members = [member for optimizer in optimizers for member in _nested(optimizer)]
    groups = [group for member in members for group in getattr(member, "param_groups", None) or ()]
    held = [parameter for group in groups for parameter in group["params"]]
    others = [{**getattr(member, "__dict__", {}), "state": None} for member in members]
    objects = set(map(id, [*held, *_tensors(others)]))  # a rank's empty part has no memory
    places = set(meeting([item.local() for item in averaged], list(map(local, held))))
    return [item for i, item in enumerate(averaged) if i in places or id(item.found()) in objects]


def _tensors(held: object, depth: int = 5) -> Iterator[Tensor]:
    """The tensors in lists and mappings, and those within them."""
    if isinstance(held, Tensor):
        yield held
    elif depth and isinstance(held, (list, tuple, Mapping)):
        for each in (*held, *held.values()) if isinstance(held, Mapping) else held:
            yield from _tensors(each, depth - 1)


def require_moved(averaged: Sequence[Tracked], optimizers: Sequence[Any], complete: bool) -> None:
    """Raise `ValueError` if no optimizer has an averaged parameter; warn if some train in none of them."""
    parameters = [item for item in averaged if item.kind != "buffer"]
    found = {item.name for item in _moved(parameters, optimizers)}
    names = ", ".join(type(each).__name__ for each in optimizers)
    if parameters and not found:
        raise ValueError(
            f"attach: {names} has none of the {len(parameters)} averaged parameters "
            f"({parameters[0].name}, ...), so its steps never move them: the weights were replaced "
            "after the optimizer was made, or it trains another model or a copy. Make the optimizer from "
            "the averaged model's parameters; if it trains copies that other code writes back, call "
            "update() after that instead"
        )
    left = [
        i.name for i in parameters if i.name not in found and i.kind == "parameter" and i.trains
    ]
    if left and not complete:
        warnings.warn(
            f"attach: {names} has {len(found)} of the {len(parameters)} averaged parameters, and "
            f"not {listed(left)}: attach every optimizer that trains them, or leave them out "
            "(requires_grad_(False) or `select`)",
            stacklevel=6,
        )


def chain_of(optimizer: Any) -> list[Any]:
    """An optimizer or its wrapper, and the optimizers inside it, from the outermost to the innermost.

    Raises `TypeError` if none of them is a torch optimizer, whose hooks run at a step.
    """
    chain = list(_nested(optimizer))
    if not any(map(runs_hooks, chain)):
        raise TypeError(
            f"attach: {type(optimizer).__name__} is not a torch.optim.Optimizer, and has none "
            "inside (.optimizer); call update() after its step instead"
        )
    return chain


def _nested(optimizer: Any) -> Iterator[Any]:
    seen: list[Any] = []
    while callable(getattr(optimizer, "step", None)) and optimizer not in seen:
        seen.append(optimizer)
        yield optimizer
        inside = (getattr(optimizer, name, None) for name in _INSIDE)
        optimizer = next((each for each in inside if callable(getattr(each, "step", None))), None)


def warn_of_own_average(chain: Sequence[Any]) -> None:
    """Warn if an optimizer averages the weights itself: it is one of schedule-free, or ASGD."""
    for optimizer in reversed(chain):  # accelerate's wrapper has what the optimizer inside has
        if own := _own_average(optimizer, innermost=optimizer is chain[-1]):
            warnings.warn(
                f"attach: {type(optimizer).__name__} averages the weights itself, and {own}. Evaluate "
                "the optimizer's own average first: you may not need another",
                stacklevel=5,
            )
            return


def _own_average(optimizer: Any, *, innermost: bool) -> str:
    """Where an optimizer has its average, and what an averager would average; empty if it has none."""
    second = (
        "This averager makes a second average, of the weights after each step, at which the next "
        "gradients are taken"
    )
    if isinstance(optimizer, torch.optim.ASGD):
        return f'state[parameter]["ax"] is that average. {second}'
    modes = all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
    known = "weight_lr_power" in {*vars(optimizer), *getattr(optimizer, "defaults", ())}
    if modes and (known or innermost):
        return f"eval() writes that average into the model. {second}"
    if known:  # schedule-free with a closure, in which alone the model has other weights
        return "the weights after each step are that average. This averager makes an average of averages"
    return ""


def runs_hooks(optimizer: Any) -> bool:
    """Whether torch has wrapped the `step` of this class so that it runs hooks."""
    is_optimizer = isinstance(optimizer, torch.optim.Optimizer)
    return is_optimizer and bool(getattr(type(optimizer).step, "hooked", False))
