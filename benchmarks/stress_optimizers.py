"""Optimizers for the stress command, plain and with the habits of other libraries' ones.

A new optimizer is one line of `OPTIMIZERS`. Each takes one real step at a call of `step()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW


class Overriding(SGD):
    """Overrides `step` and calls the one that it inherits."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class OverridingTwice(Overriding):
    """Overrides what is overridden."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Looped(AdamW):
    """Takes its one step in two half ones, as sharpness-aware and lookahead optimizers do."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


class Nested(torch.optim.Optimizer):
    """Has an optimizer of its own for the step."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {"lr": 0.125})
        self.inner = SGD(self.param_groups, lr=0.125)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Wrapped(torch.optim.Optimizer):
    """As accelerate's: an optimizer by its class, which never calls the constructor of that class."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.125, momentum=0.5),
    "sgd, one by one": lambda p: SGD(p, lr=0.125, foreach=False),
    "sgd, fused": lambda p: SGD(p, lr=0.125, fused=True),
    "adam": lambda p: Adam(p, lr=0.0625),
    "adam, foreach": lambda p: Adam(p, lr=0.0625, foreach=True),
    "adam, fused": lambda p: Adam(p, lr=0.0625, fused=True),
    "adamw, fused": lambda p: AdamW(p, lr=0.0625, fused=True),
    "overriding": lambda p: Overriding(p, lr=0.125),
    "overriding, fused": lambda p: Overriding(p, lr=0.125, fused=True),
    "overriding twice": lambda p: OverridingTwice(p, lr=0.125),
    "looped": lambda p: Looped(p, lr=0.0625),
    "nested": Nested,
    "wrapped": lambda p: Wrapped(SGD(p, lr=0.125)),
    "wrapped, fused": lambda p: Wrapped(Adam(p, lr=0.0625, fused=True)),
}  # fmt: skip


def trainable(tensors: list[Tensor], name: str) -> list[Tensor]:
    """The tensors that an optimizer can train; a fused one takes real ones of one usual dtype."""
    unique = list({id(t): t for t in tensors}.values())
    found = [t for t in unique if t.is_floating_point() or (t.is_complex() and "fused" not in name)]
    if "fused" in name:
        found = [t for t in found if t.dtype in (torch.float32, torch.float64)]
    kept = [t for t in found if t.is_leaf and not t.is_conj() and not t.is_neg()]
    # torch's fused steps take a tensor with gaps for one without, and write into the gaps.
    return [t for t in kept if _has_no_gaps(t)] if "fused" in name else kept


def _has_no_gaps(tensor: Tensor) -> bool:
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() in (0, reach + 1)
