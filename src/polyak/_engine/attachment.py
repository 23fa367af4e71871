"""An averager that updates after each real step of an optimizer.

One real step can be many calls. A subclass calls `super().step()`, and torch runs the hooks of both.
SAM, Lookahead, accelerate and Lightning keep an optimizer inside and step it. The update follows where
the outermost of these calls ends: only then are the weights those of the step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor

from polyak._engine.live import ModelTensors
from polyak._engine.optimizers import chain_of, require_moved, runs_hooks, warn_of_own_average
from polyak._engine.signals import runs_below
from polyak._ranks.torch_private import state_makers

Flags = list[Tensor | None]
"""`found_inf`, which a `GradScaler` left in an optimizer, at each of its calls; None without a scaler."""


class Attachment:
    """Watches the optimizers of `live` weights, and calls `step` once each of them has taken its step.

    `before` is called before each step, `after` when the attachment is removed. `complete`
    says that there are no other optimizers. Then a weight without an optimizer causes no warning.
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
        chains = [chain_of(optimizer) for optimizer in optimizers]
        members = [member for chain in chains for member in chain]
        if not members or len(set(map(id, members))) < len(members):
            raise ValueError(
                f"attach: {len(optimizers)} optimizers, wanted one or more, each only once"
            )
        self._live, self._optimizers, self._complete = live, optimizers, complete
        self._generation = 0
        self.active = True
        """Whether the optimizers are watched."""
        self.require_moved()
        for chain in chains:
            warn_of_own_average(chain)
        scalers = (scaler, *(getattr(member, "scaler", None) for member in members))
        self._scaled = any(each is not None for each in scalers)
        self._step = step
        self._after = after
        self._taken: dict[int, Flags] = {}
        self._watches = [_Watch(chain, before, self._taken_by(i)) for i, chain in enumerate(chains)]

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches no optimizer."""
        return {"_taken": {}, "active": False}

    def require_moved(self) -> None:
        """Raise `ValueError` if the optimizers have no averaged parameter; warn if they lack some that train.

        It looks at weights that were found anew since it was called last.
        """
        if self.active and self._generation != self._live.generation:
            require_moved(self._live.averaged, self._optimizers, self._complete)
            self._generation = self._live.generation

    @property
    def waiting(self) -> bool:
        """Whether some of the optimizers have stepped since the last update, and some have not."""
        return bool(self._taken)

    def remove(self) -> None:
        """Stops watching."""
        if not self.active:  # the averager may have another attachment since
            return
        for watch in self._watches:
            watch.remove()
        self.active = False
        self._after()

    def _taken_by(self, which: int) -> Callable[[Flags], None]:
        """A function that is called after each step of one optimizer; it updates once all have stepped."""

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
    """Notices when the outermost `step` of a chain of optimizers ends, if one of them took a step.

    torch's hooks show that a step was taken: they do not run where a `GradScaler` or accelerate skip
    it. They do not show where the outermost call ends: they run once for each class whose `step`
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
            if runs_hooks(member):
                self._undo.append(member.register_step_post_hook(self._stepped).remove)
            self._undo.append(self._wrap(member))

    def remove(self) -> None:
        """Removes the hooks, and restores the optimizers' own `step`."""
        self._taken = lambda _: None  # if other code has wrapped `step` since, ours stays inside
        for undo in self._undo:
            undo()

    def _stepped(self, *_: object) -> None:
        flags = (getattr(member, "found_inf", None) for member in self._chain)
        self._flags.append(next((flag for flag in flags if flag is not None), None))
        if self._depth == 0:  # called by its class, past the optimizer's own `step`
            self._tell()

    def _wrap(self, optimizer: Any) -> Callable[[], None]:
        """Gives an optimizer its own `step`; returns a function that removes it."""
        before, inner = vars(optimizer).get("step"), optimizer.step

        @wraps(type(optimizer).step)
        def step(owner: Any, *args: Any, **kwargs: Any) -> Any:
            if owner is not optimizer:  # a copy of the optimizer, which is not watched
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


def _makes_state() -> bool:
    """Whether the step that runs is the one by which torch makes an optimizer's state."""
    makers = state_makers()
    return bool(makers) and runs_below(sys._getframe(1), makers)
