"""The averager: averages of a model's weights while it trains.

    averager = Averager(model, Exponential(0.999))
    for batch in batches:
        train_step(model, batch)
        averager.update()
    with averager.applied():
        evaluate(model)

An averager holds averages of a model's weights. It does not copy the modules. `polyak._engine.tracking`
decides which tensors are averaged, and a rule (`polyak.rules`) says how.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyak._checks import require_positive
from polyak._engine import changes, open_swaps
from polyak._engine.applying import Applied
from polyak._engine.attachment import Attachment
from polyak._engine.averages import Options
from polyak._engine.guard import Nonfinite
from polyak._engine.into_modules import IntoModules
from polyak._engine.policies import TRAINABLE, Buffers, Choose, Select
from polyak._engine.pulling import Pull
from polyak._engine.resumable import Resumable
from polyak._engine.rounding import Rounding
from polyak._engine.summary import Summary, summarise
from polyak._engine.tracking import Source
from polyak.rules import Rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Averager", "Pull"]


class Averager(IntoModules, Resumable):
    """Average a model's weights by one rule or several, in one pass over the live weights.

    An update does `slot <- lerp(slot, live, fraction)`. Reading does
    `average = sum of coefficient * slot`. The rule gives fractions and coefficients.

    Args:
        model: an `nn.Module`, or a mapping name -> tensor. It is never copied. If it is sharded by
            FSDP2 (`fully_shard`) or tensor parallelism, each rank averages its own shards without
            communication; shard the model first.
        rule: a `Rule` or its spec, or a mapping name -> rule for several averages.
        every: calls of `update` per update: the first call updates, and then every n-th. Time counts
            every call, so the half-life stays the same: `Exponential(d)` with every=4 has decay d^4.
        dtype: dtype of the slots. Default: that of the weights, and float32 for narrower weights.
        rounding: rounding of the slots: "nearest", "stochastic" (bfloat16 and float16 slots; correct
            in the mean) or "compensated" (a second tensor per slot holds what rounding drops).
        device: device of the slots. Default: that of the weights. Slots on the CPU for CUDA weights
            are updated in a background thread; use `attach` with them.
        buffers: "auto" averages BatchNorm's running statistics and copies other buffers. "copy" and
            "average" decide for all buffers. A mapping name pattern -> "average", "copy" or "skip"
            decides by name, for parameters too: the first pattern that matches one of a tensor's names.
        select: what is averaged: a name pattern, several, or a function of the name. Default:
            "trainable", all but frozen parameters (`requires_grad` is False while others train, when
            the averager is made). Frozen parameters are not held or saved: averages read the model's.
        shard: a `torch.distributed` process group, or a device mesh of one dimension, whose ranks
            all hold the whole weights (DistributedDataParallel). Each rank then holds and updates
            1/N of every average, by rows, and `applied` gathers it. Every rank must make the
            averager, and enter `applied`, at the same point of the program.
        nonfinite: what an update does if weights are NaN or inf: "allow" averages them, "skip"
            leaves the average unchanged and counts (`skipped`), "error" raises. "skip" and "error"
            read the weights once more; the host waits only for the previous update.
        pull: how far and how often updates move the live weights towards an average: `Pull`. A state
            contains it, and loads only into an averager with the same. The host waits for each update.

    >>> weights = {"w": torch.zeros(2)}
    >>> averager = Averager(weights, "exponential(0.5)")
    >>> for _ in range(3):
    ...     weights["w"] += 1.0
    ...     averager.update()
    >>> averager.average()["w"]
    tensor([2.2500, 2.2500])

    Raises `ValueError` or `TypeError` for a bad argument, or for a model that cannot be averaged, with
    the tensor's name. Raises `RuntimeError` for a call at the wrong time.
    """

    def __init__(
        self,
        model: Source,
        rule: Rule | str | Mapping[str, Rule | str],
        *,
        every: int = 1,
        dtype: torch.dtype | None = None,
        rounding: Rounding = "nearest",
        device: torch.device | str | None = None,
        buffers: Buffers = "auto",
        select: Select = TRAINABLE,
        nonfinite: Nonfinite = "allow",
        shard: DeviceMesh | ProcessGroup | None = None,
        pull: Pull | None = None,
    ) -> None:
        options = Options(every, dtype, rounding, device, nonfinite, pull)
        self._make(model, rule, Choose(buffers, select), options, shard)

    def update(self, elapsed: float | None = None) -> None:
        """Count one call. The first and then every `every`-th call moves the slots towards the live weights.

        `elapsed` is the time since the last call in the rule's unit (steps, samples, tokens), by
        default 1. The first update copies. The host does not wait for the device, except once at
        the second update, which looks for infinities that stay constant (a mask).

        Raises `RuntimeError` inside `applied()`, and if the model's tensors are not those that the
        averager was made with. Raises `ValueError` unless elapsed > 0 and the time after it is
        finite, and `FloatingPointError` for weights that are not finite with `nonfinite="error"`.
        """
        with open_swaps.TURN:
            if self._swapper.swap is not None:
                self._swapper.refuse("update")
            if elapsed is not None:
                elapsed = float(require_positive("elapsed", elapsed))
                self._updating.clock.require_time_for(elapsed)
            self._call(1.0 if elapsed is None else elapsed)

    def attach(self, optimizer: Any, scaler: Any = None) -> Attachment:
        """Call `update()` after each optimizer step. `.remove()` of the result detaches.

        `optimizer` is a `torch.optim.Optimizer`, a wrapper that has one as `.optimizer` (accelerate's,
        Lightning's), or a sequence of them; with several, an update follows when each has stepped.
        A step counts once, when its outermost call ends. So gradient accumulation, closures, and steps
        that call other steps make one update. The step with which torch.distributed.checkpoint makes an
        optimizer's state makes none.

        If a `GradScaler` skips a step of an ordinary optimizer, the update is skipped too. A fused
        optimizer runs its hooks even then, so pass the scaler here (accelerate's is found). The host
        waits only for the previous update.

        Raises `ValueError` for no optimizer or a repeated one, and for optimizers that have none of the
        averaged parameters, also at a step after these were replaced; `TypeError` for another object;
        `RuntimeError` if the averager is attached already, or at a step of a fused optimizer whose
        scaler was not passed. Warns of parameters that train and are in none of the optimizers.
        """
        lone = hasattr(optimizer, "step") or not isinstance(optimizer, Iterable)
        return self._attach([optimizer] if lone else list(optimizer), scaler)

    def _attach(
        self, optimizers: Sequence[Any], scaler: Any, *, complete: bool = False
    ) -> Attachment:
        """Attach; a `complete` list has all optimizers there are, so weights in none need no warning."""
        if self._attachment is not None and self._attachment.active:
            raise RuntimeError(
                "attach: the averager is attached already, so a step would count twice; call "
                "remove() on the earlier attachment first"
            )
        with open_swaps.TURN:
            self._live.check("attach")
        updating = self._updating
        self._attachment = Attachment(
            optimizers,
            scaler,
            self._live,
            self._after_steps,
            updating.before_step,
            updating.detached,
            complete=complete,
        )
        updating.replaced = self._attachment.require_moved
        return self._attachment

    @open_swaps.in_turn
    def average(self, name: str | None = None) -> dict[str, Tensor]:
        """Return the average: canonical name -> fresh tensor, in the slots' dtype and on their device.

        The result has averaged and copied tensors, tied ones under all their names, so the model's
        `load_state_dict` accepts it if everything is tracked. Tensors of a sharded model, and of
        `shard`, are DTensors: every rank must then do the same with them (with `shard` use `copy_to`
        to write them into a model). `name` is needed if there are several averages.

        Raises `RuntimeError` before the first update and inside `applied()`, and `KeyError` for an
        unknown name.
        """
        return self.weights(name).whole()

    def applied(self, name: str | None = None) -> Applied:
        """Give the model the average's weights in a `with` block; the live weights always come back.

        In a framework with hooks, call `averager.applied(name).enter()` in one hook and
        `averager.applied(name).leave()` in the other.

        Contents are exchanged in place, chunk by chunk, and pointers stay. There is no third copy
        of the model, except for buffers and for weights whose average has another dtype or device, or
        several slots.

        The model has the average of the block that was entered last and is still open. Blocks of
        several averagers on one model may end in any order. Inside, a step of an optimizer that has
        these weights raises. Signal handlers wait until the exchange is done.

        Raises `RuntimeError` before the first update, inside a block of another average of this
        averager, if another thread or asyncio task is in a block on these weights, and after a block
        that wrote to the weights, replaced or moved them. If the block itself raised, that report is
        a note on its exception. Such a write may have changed the average, too; then it cannot be
        read until a state is loaded.

        With `shard`, entering is collective: the ranks agree on what they gather, and each keeps a
        copy of its live weights. Leaving needs no other rank.
        """
        return Applied(self._swapper, name)

    @open_swaps.in_turn
    def summary(self) -> Summary:
        """Return every tensor's policy, the rules, the clock and the memory; it prints as a table.

        It reads all weights, and warns if rounding to nearest stops a share of them.
        """
        self._same_model("summary")
        return summarise(
            self._averages,
            self._live,
            self._updating.copies.tensors,
            elapsed=float(self._updating.every),
        )

    def _repr_html_(self) -> str:
        """The summary, for a notebook."""
        return self.summary()._repr_html_()

    def __reduce__(self) -> Any:
        """A copy or a pickle averages the model that was copied with it."""
        if self._mesh is not None:
            raise TypeError(
                "an Averager with shard= has a process group and cannot be copied or pickled: save "
                "state_dict(), make an Averager for the other model and call load_state_dict() there"
            )
        open_swaps.refuse_swapped("copy", self._live.tracked)
        made_with = type(self), self._live.model, self.rules, self._choice, self._options
        own = {name: value for name, value in vars(self).items() if name not in self._parts}
        return _restored, (*made_with, self.state_dict()), own

    @open_swaps.in_turn
    def _after_steps(self, found_inf: list[Tensor]) -> None:
        self._swapper.refuse("update")
        self._call(1.0, found_inf)


def _restored(
    cls: type[Averager],
    model: Source,
    rules: dict[str, Rule],
    choice: Choose,
    options: Options,
    state: dict[str, Any],
) -> Averager:
    """Restore an averager; raises `TypeError` if its model is not restored yet."""
    if isinstance(model, nn.Module) and "_modules" not in vars(model):
        raise TypeError(
            f"{type(model).__name__} has an Averager of itself as an attribute, which would be copied "
            "before the model is: leave it out, def __getstate__(self): return {**super()."
            '__getstate__(), "averager": None}, or keep it beside the model'
        )
    averager = cls.__new__(cls)
    averager._make(model, rules, choice, options)
    changes.alike(state, averager._live, averager._averages, averager._updating)
    averager.load_state_dict(state)
    return averager
