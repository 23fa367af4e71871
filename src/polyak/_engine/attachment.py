"""Attachments: an averager that updates after each real step of an optimizer.

One real step can be many calls. A subclass calls `super().step()`, and torch runs the hooks of both.
SAM, Lookahead, accelerate and Lightning keep an optimizer inside and step it. The update follows where
the outermost of these calls ends: only then are the weights those of the step.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from polyak._checks import listed
from polyak._engine.live import ModelTensors
from polyak._engine.memory import meeting
from polyak._engine.signals import runs_below
from polyak._engine.tracking import Tracked
from polyak._ranks.sharding import local
from polyak._ranks.torch_private import state_makers

_INSIDE = ("optimizer", "base_optimizer", "optim", "base")
"""The attributes in which optimizers and their wrappers keep the optimizer inside them."""

Flags = list[Tensor | None]
"""What a `GradScaler` left in an optimizer at each of its calls: `found_inf`, None without a scaler."""


class Attachment:
    """Watches the optimizers of `live` weights, and calls `step` once each of them has taken its step.

    `before` is called before each step, `after` when the attachment is removed. If the optimizers are
    all there are (`complete`), there is no warning of weights that none of them has.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        scaler: Any,
        live: ModelTensors,
        step: Callable[[list[Tensor]], None],
        before: Callable[[], None],
        after: Callable[[], None],
        *,
        complete: bool,
    ) -> None:
        chains = [_chain(optimizer) for optimizer in optimizers]
        members = [member for chain in chains for member in chain]
        if not members or len(set(map(id, members))) < len(members):
            raise ValueError(
                f"attach: {len(optimizers)} optimizers, wanted one or more, each only once"
            )
        self._live, self._optimizers, self._complete = live, optimizers, complete
        self._generation = 0
        self.require_moved()
        for chain in chains:
            _warn_of_own_average(chain)
        scalers = (scaler, *(getattr(member, "scaler", None) for member in members))
        self._scaled = any(each is not None for each in scalers)
        self._step = step
        self._after = after
        self._taken: dict[int, Flags] = {}
        self._watches = [_Watch(chain, before, self._taken_by(i)) for i, chain in enumerate(chains)]
        self.active = True
        """Whether the optimizers are watched."""

    def require_moved(self) -> None:
        """Raise `ValueError` if the optimizers have no averaged parameter; warn if they lack some that train.

        It looks at weights that were found anew since it was called last.
        """
        if self._generation != self._live.generation:
            _require_moved(self._live.averaged, self._optimizers, self._complete)
            self._generation = self._live.generation

    def remove(self) -> None:
        """Stops watching."""
        for watch in self._watches:
            watch.remove()
        self.active = False
        self._after()

    def _taken_by(self, which: int) -> Callable[[Flags], None]:
        """What follows each step of one optimizer: once all have stepped, the update."""

        def taken(flags: Flags) -> None:
            if not self._scaled and any(flag is not None for flag in flags):
                raise RuntimeError(
                    "this fused optimizer has a GradScaler, and its hooks run on skipped steps too: "
                    "pass the scaler, attach(optimizer, scaler)"
                )
            self._taken[which] = flags
            if len(self._taken) == len(self._watches):
                every = [flag for flags in self._taken.values() for flag in flags]
                flagged = [flag for flag in every if flag is not None]
                self._taken = {}
                certain = len(flagged) < len(every)  # an optimizer without a flag did step
                self._step([] if certain else flagged)

        return taken


class _Watch:
    """Tells when the outermost `step` of a chain of optimizers ends, if one of them took a step.

    torch's hooks tell that a step was taken: they do not run where a `GradScaler` or accelerate skip
    it. They do not tell where the outermost call ends: they run once for each class whose `step`
    calls the next, and wrappers run none. So each optimizer also gets a `step` of its own that
    counts the calls under way, as torch's schedulers do. A call that raises ends there too.
    """

    def __init__(
        self, chain: Sequence[Any], before: Callable[[], None], taken: Callable[[Flags], None]
    ) -> None:
        self._chain = chain
        self._before = before
        self._taken = taken
        self._flags: Flags = []
        self._depth = 0
        self._first = False
        self._undo: list[Callable[[], None]] = []
        for member in chain:
            if _runs_hooks(member):
                self._undo.append(member.register_step_post_hook(self._stepped).remove)
            self._undo.append(self._wrap(member))

    def remove(self) -> None:
        """Takes the hooks off, and gives the optimizers their own `step` back."""
        self._taken = lambda _: None  # where someone has wrapped `step` since, ours stays inside
        for undo in self._undo:
            undo()

    def _stepped(self, *_: object) -> None:
        flags = (getattr(member, "found_inf", None) for member in self._chain)
        self._flags.append(next((flag for flag in flags if flag is not None), None))
        if self._depth == 0:  # called by its class, past the optimizer's own `step`
            self._tell()

    def _wrap(self, optimizer: Any) -> Callable[[], None]:
        """Gives an optimizer its own `step`; returns what takes it away again."""
        before, inner = vars(optimizer).get("step"), optimizer.step

        @wraps(type(optimizer).step)
        def step(owner: Any, *args: Any, **kwargs: Any) -> Any:
            if owner is not optimizer:  # a copy of the optimizer, which nobody watches
                return type(owner).step(owner, *args, **kwargs)
            with self._under_way():
                return inner(*args, **kwargs)

        def undo() -> None:
            if vars(optimizer).get("step") is method:
                del optimizer.step
                if before is not None:
                    optimizer.step = before

        vars(step).update(getattr(inner, "__dict__", {}))  # the mark of a scheduler that wraps it
        method = optimizer.step = MethodType(step, optimizer)  # schedulers look for `__func__`
        return undo

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        """One call of a `step`, which may be within another."""
        if self._depth == 0:
            self._before()
            self._flags = []
            self._first = not all(getattr(member, "state", True) for member in self._chain)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._depth == 0 and self._flags and not (self._first and _makes_state()):
            self._tell()

    def _tell(self) -> None:
        flags, self._flags = self._flags, []
        self._taken(flags)


def movers(tracked: Sequence[Tracked], optimizers: Sequence[Any]) -> Sequence[Any]:
    """Those of the optimizers that have an averaged tensor; all of them if none has."""
    averaged = [item for item in tracked if item.policy == "average"]
    return [each for each in optimizers if _moved(averaged, [each])] or optimizers


def _moved(averaged: Sequence[Tracked], optimizers: Sequence[Any]) -> list[Tracked]:
    """The averaged tensors that optimizers have: as the same object, or in the same memory."""
    members = [member for optimizer in optimizers for member in _nested(optimizer)]
    groups = [group for member in members for group in getattr(member, "param_groups", None) or ()]
    held = [parameter for group in groups for parameter in group["params"]]
    objects = set(map(id, held))  # on a rank that has no row of a tensor it has no memory
    places = set(meeting([item.local() for item in averaged], list(map(local, held))))
    return [item for i, item in enumerate(averaged) if i in places or id(item.found()) in objects]


def _require_moved(averaged: Sequence[Tracked], optimizers: Sequence[Any], complete: bool) -> None:
    parameters = [item for item in averaged if item.kind != "buffer"]
    found = {item.name for item in _moved(parameters, optimizers)}
    names = ", ".join(type(each).__name__ for each in optimizers)
    if parameters and not found:
        raise ValueError(
            f"attach: {names} has none of the {len(parameters)} averaged parameters "
            f"({parameters[0].name}, ...), so its steps never move them: the weights were replaced "
            "after the optimizer was made, or it trains another model or a copy. Make the optimizer from "
            "the averaged model's parameters; if it trains copies and writes them back, call "
            "update() after its step instead"
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


def _chain(optimizer: Any) -> list[Any]:
    """An optimizer or its wrapper, and the optimizers inside it, from the outermost to the innermost.

    Raises `TypeError` where none of them is a torch optimizer, whose hooks tell of a step.
    """
    chain = list(_nested(optimizer))
    if not any(map(_runs_hooks, chain)):
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


def _warn_of_own_average(chain: Sequence[Any]) -> None:
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


def _makes_state() -> bool:
    """Whether the step that runs is the one by which torch makes an optimizer's state."""
    makers = state_makers()
    return bool(makers) and runs_below(sys._getframe(1), makers)


def _runs_hooks(optimizer: Any) -> bool:
    """Whether torch has wrapped the `step` of this class so that it runs hooks."""
    is_optimizer = isinstance(optimizer, torch.optim.Optimizer)
    return is_optimizer and bool(getattr(type(optimizer).step, "hooked", False))
