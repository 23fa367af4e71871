"""The averager: averages of a model's weights while it trains.

    averager = Averager(model, Exponential(0.999))
    for batch in batches:
        train_step(model, batch)
        averager.update()
    with averager.applied():
        evaluate(model)

An averager binds to a model as an optimizer does. It does not copy the modules. `polyak._engine.tracking`
decides which tensors are averaged, and a rule (`polyak.rules`) says how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyak import _tensors as tensors
from polyak._checks import require, require_positive
from polyak._dtypes import slot_dtype
from polyak._engine import changes, copying, lending
from polyak._engine.attachment import Attachment
from polyak._engine.live import ModelTensors
from polyak._engine.policies import TRAINABLE, Buffers, Choose, Select
from polyak._engine.pulling import Pull, pull_, require_fraction, require_pull
from polyak._engine.readout import AverageWeights
from polyak._engine.rounding import Rounding, require_rounding
from polyak._engine.slots import Average
from polyak._engine.states import STATE_FORMAT, State, checked, set_together
from polyak._engine.summary import Summary, summarise
from polyak._engine.swap import Applied, Lender
from polyak._engine.tracking import Source, Tracked
from polyak._engine.twins import Twins, plain_copy
from polyak._engine.updating import Nonfinite, Updating
from polyak._lazy import TensorSpec
from polyak._ranks.agreement import Agreement, digest, together
from polyak._ranks.replicas import require_same
from polyak._ranks.sharding import (
    is_distributed,
    local,
    one_mesh,
    require_beside,
)
from polyak.rules import Rule, Tick
from polyak.specs import ONLY, as_specs, named_rules, savable_rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Averager", "Pull"]

SLOT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Averager:
    """Average a model's weights by one rule or several, in one pass over the live weights.

    An update does `slot <- lerp(slot, live, fraction)`. Reading does
    `average = sum of coefficient * slot`. The rule gives fractions and coefficients.

    Args:
        model: an `nn.Module`, or a mapping name -> tensor. It is never copied. If it is sharded by
            FSDP2 (`fully_shard`) or tensor parallelism, each rank averages its own shards without
            communication; shard the model first.
        rule: a `Rule` or its spec, or a mapping name -> rule for several averages.
        every: calls of `update` per update: the first call updates, and then every n-th. Time counts
            every call, so the horizon stays the same: `Exponential(d)` with every=4 has decay d^4.
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
            the averager is made). These are not held and not saved: an average reads the model's.
        shard: a `torch.distributed` process group, or a device mesh of one dimension, whose ranks
            all hold the whole weights (DistributedDataParallel). Each rank then holds and updates
            1/N of every average, by rows, and `applied` gathers it. Every rank must make the
            averager, and enter `applied`, at the same place of the program.
        nonfinite: what an update does if weights are NaN or inf: "allow" averages them, "skip"
            leaves the average unchanged and counts (`skipped`), "error" raises. "skip" and "error"
            read the weights once more; the host waits only for the previous update.
        pull: how far and how often updates move the live weights towards an average: `Pull`. A state
            has it, and loads into an averager with the same. The host waits for each update.

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
        self._make(
            model,
            rule,
            Choose(buffers, select),
            every=every,
            dtype=dtype,
            rounding=rounding,
            device=device,
            nonfinite=nonfinite,
            shard=shard,
            pull=pull,
        )

    def _make(
        self,
        model: Source,
        rule: Rule | str | Mapping[str, Rule | str],
        choice: Choose,
        *,
        every: int,
        dtype: torch.dtype | None,
        rounding: Rounding,
        device: torch.device | str | None,
        nonfinite: Nonfinite,
        shard: DeviceMesh | ProcessGroup | None = None,
        pull: Pull | None,
    ) -> None:
        self._mesh = None if shard is None else one_mesh(shard, _device(model))
        with self._together("Averager"):
            _require_slot_dtype(dtype)
            place = None if device is None else torch.device(device)
            self._choice = choice
            self._live = ModelTensors(model, self._choice, mesh=self._mesh)
            self._refuse_sharded(place, nonfinite)
            self._averages = {
                name: Average(rule, dtype=dtype, device=place, rounding=rounding, name=name)
                for name, rule in named_rules(rule).items()
            }
            require_pull(pull, self._averages)
            if pull is not None:
                self._refuse_rows("pull")
            first = next(iter(self._averages.values()))
            require_rounding(rounding, {spec.dtype for spec in first.specs(self._live).values()})
            self._updating = Updating(
                self._live,
                list(self._averages.values()),
                every=every,
                nonfinite=nonfinite,
                device=place,
            )
        self._options: dict[str, Any] = {"dtype": dtype, "rounding": rounding, "device": place}
        self._options |= {"every": every, "nonfinite": nonfinite, "pull": pull}
        self.run: str | None = None
        """The id of the run that a `Recorder` stores; it is part of the state."""
        self.mixed = False
        """Whether another rule made a part of the slots (`change_rule`)."""
        self._lender = Lender(self._live, self._averages, self._updating, self._mesh)
        self._twins = Twins(self._live, self._averages, self._updating)
        self._call = self._with_pull(self._updating.call)
        self._attachment: Attachment | None = None
        self._compare_replicas("Averager")

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
        return self._updating.skipped

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only a part of the weights, or of the averages; raises as `tracked`."""
        self._live.check("sharded")
        return any(is_distributed(item.held()) for item in self._live.stored())

    def check_replicas(self) -> None:
        """Compare the weights of all ranks bit for bit (with `shard`). Collective.

        The averager does this when it is made and when it is saved. Raises `RuntimeError` with the
        names of the tensors that differ: their rows would be averages of different models.
        """
        self._compare_replicas("check_replicas")

    def update(self, elapsed: float | None = None) -> None:
        """Count one call; at the first and then every `every`-th move the slots to the live weights.

        `elapsed` is the time since the last call in the rule's unit (steps, samples, tokens), by
        default 1. The first update copies. The host does not wait for the device, except once at
        the second update, which looks for infinities that stay constant (a mask).

        Raises `RuntimeError` inside `applied()`, and if the model's tensors are not those that the
        averager was made with. Raises `ValueError` unless elapsed > 0 and the time after it is
        finite, and `FloatingPointError` for weights that are not finite with `nonfinite="error"`.
        """
        with lending.TURN:
            if self._lender.loan is not None:
                self._lender.refuse("update")
            if elapsed is not None:
                elapsed = float(require_positive("elapsed", elapsed))
                self._updating.require_time_for(elapsed)
            self._call(1.0 if elapsed is None else elapsed)

    def attach(self, optimizer: Any, scaler: Any = None) -> Attachment:
        """Call `update()` after each optimizer step. `.remove()` of the result detaches.

        `optimizer` is a `torch.optim.Optimizer`, a wrapper that has one as `.optimizer` (accelerate's,
        Lightning's), or a sequence of them; with several, an update follows when each has stepped.
        A step counts once, when its outermost call ends: gradient accumulation, closures, and steps
        that call other steps make one update, and the step by which torch.distributed.checkpoint makes an
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
        with lending.TURN:
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

    @lending.in_turn
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

    @lending.in_turn
    def weights(self, name: str | None = None) -> AverageWeights:
        """Return the average as a mapping that computes each tensor when it is read.

        It needs less memory than `average()` and is valid until the next update. It raises the same
        errors as `average()`.
        """
        average = self._get(name)
        self._ready("average", average)
        return AverageWeights(self._live, average, self._updating.copies)

    def applied(self, name: str | None = None) -> Applied:
        """Let the model carry the average inside a `with` block; its live weights always come back.

        Where there are hooks and no block, call `averager.applied(name).enter()` in one hook and
        `averager.applied(name).leave()` in the other.

        Contents are exchanged in place, chunk by chunk, and pointers stay. There is no third copy
        of the model, except for buffers and for weights whose average has another dtype or device, or
        several slots.

        The model carries the average of the block that was entered last and is still open. Blocks of
        several averagers on one model may end in any order. Inside, a step of an optimizer that has
        these weights raises. Signal handlers wait until the exchange is done.

        Raises `RuntimeError` before the first update, inside a block of another average of this
        averager, if another thread or asyncio task is in a block on these weights, and after a block
        that wrote to the weights, replaced or moved them. If the block itself raised, that report is
        a note on its exception. Such a write may have spoilt the average; then it cannot be read
        until a state is loaded.

        With `shard`, entering is collective: the ranks agree on what they gather, and each keeps a
        copy of its live weights. Leaving needs no other rank.
        """
        return Applied(self._lender, name)

    @lending.in_turn
    def module(self, name: str | None = None, *, copy: bool = False) -> nn.Module:
        """Return the average as a module to call beside the model: a teacher, a target network.

        Its parameters and buffers are the average's own tensors, so it follows every update without a
        copy, inside `applied()` too. It has the model's structure without wrappers, is in eval mode
        and requires no gradients. Frozen and unselected tensors are the model's. BatchNorm normalises
        by the batch in train mode and never writes. A call returns the same module while anyone holds
        it; a deep copy or a pickle of it is a plain module.

        It needs a rule with one slot in the weights' dtype and on their device. With `copy` it is a
        module of its own for every rule: `copy_to(module)` refreshes it.

        Raises `TypeError` for an averager of a mapping, `ValueError` for an average that no module
        can share and for a sharded model, `RuntimeError` before the first update, inside `applied()`,
        and for a model that cannot be copied. Writes to the module (an optimizer, `.to`, `.half`)
        raise at the next update.
        """
        model = self._live.model
        if not isinstance(model, nn.Module):
            raise TypeError(f"module: the averager is of a {type(model).__name__}, wanted a module")
        self._ready("module", self._get(name))
        if copy:
            copied = plain_copy("module", model, {id(self): None}).requires_grad_(False).eval()
            self.copy_to(copied, name)
            return copied
        module = self._twins.module(model, self._lender.label(name), {id(self): None})
        self._call = self._with_pull(self._twins.call)
        return module

    @torch.no_grad()
    def copy_to(self, model: Source, name: str | None = None) -> None:
        """Write the average into a model for good, by name, rounded to the model's dtypes.

        The model may be the live one (training then continues from the average: Switch-EMA, Hare
        and Tortoise) or another with the same names and shapes, wrapped or not.

        Raises `ValueError` with the names that are missing, extra or of another shape, and
        `RuntimeError` before the first update and inside `applied()`. Collective with `shard`.
        """
        with self._together("copy_to") as agreement:
            whole = self.weights(name).beside()
            average = {name: local(tensor) for name, tensor in whole.items()}
            found = copying.places(model, self._choice, self._live, average)
            forms = copying.gathered_forms(self._live, found)
            agreement.told = (
                f"{self._lender.label(name)!r}, {self._get(name).tick}, {digest(forms)}"
            )
        copying.write_(found, average, self._live, self._mesh)

    @lending.in_turn
    def pull(self, fraction: float, name: str | None = None) -> None:
        """Move the live weights towards the average: `live <- lerp(live, average, fraction)`.

        It moves what is averaged, and leaves copied buffers and the average as they are. After updates,
        `Averager(pull=Pull(...))` does it: Switch-EMA, Hare and Tortoise, Lookahead. Between `backward`
        and the optimizer's step, every step: PACE. `theory.feedback` has their variances.

        Raises `ValueError` for a fraction outside (0, 1] and with `shard`, and `RuntimeError` before the
        first update and inside `applied()`.
        """
        number = require_fraction(fraction)
        self._refuse_rows("pull")
        self._ready("pull", self._get(name))
        self._live.reshard()
        pull_(self._live, self.weights(name), number)

    @lending.in_turn
    def state_dict(self) -> dict[str, Any]:
        """Return rules, clocks and slots as data: plain dictionaries, numbers, strings and tensors.

        The tensors are the averager's own, as with `nn.Module.state_dict`: save or copy them before
        the next update. `torch.load(..., weights_only=True)` reads a saved state. The tensors of a
        sharded model are DTensors that share the slots' memory, for `torch.distributed.checkpoint`.
        Its `load` fills the state of an averager that has made its updates; then call
        `load_state_dict` with it.

        Raises `RuntimeError` inside `applied()`, where slots hold the live weights.
        """
        self._same_model("state_dict")
        self._twins.check("state_dict")
        for average in self._averages.values():
            average.refuse_spoilt("state_dict")
        averages = {name: average.state(self._live) for name, average in self._averages.items()}
        state = {"format": STATE_FORMAT, **self._updating.state(), "averages": averages}
        state |= {"run": self.run} if self.run else {}
        state |= {"pull": repr(self._pull)} if self._pull else {}
        return state | ({"mixed": True} if self.mixed else {})

    @lending.in_turn
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned; its tensors are copied into the slots' memory.

        Averages, rules, names, shapes, dtypes and the layouts of sharded tensors must agree.
        Everything is checked before anything changes. Raises `ValueError` with a list of differences.
        """
        new = self._checked(state)
        taken: list[tuple[object, dict[str, object]]] = [
            (average, average.taken(self._live, held.tick, held.slots))
            for average, held in zip(self._averages.values(), new.averages.values(), strict=True)
        ]
        updating = self._updating.taken(new.calls, new.elapsed, new.skipped, new.copies)
        own: dict[str, object] = {"run": new.run, "mixed": new.mixed}
        before = [average.slots for average in self._averages.values()], self._updating.copies
        set_together([*taken, (self._updating, updating), (self, own)])
        self._keep_memory(*before)

    @lending.in_turn
    def begin(
        self,
        weights: Mapping[str, Tensor] | None = None,
        count: int = 1,
        name: str | None = None,
    ) -> None:
        """Go on as if `count` updates had made the average that is given by name; it is copied.

        Without weights it begins from the model's, so that there is an average before the first call
        of `update`. Give weights for a target network that begins apart from its model, for the
        average of another program, or after a change that `load_state_dict` refuses. Buffers that are
        not given are the model's. With several averages and no `name`, all of them begin so. A rule of
        several slots takes count=1: the weights of its first update.

        Raises `ValueError` for names, shapes or dtypes that do not fit, and a count below 1;
        `RuntimeError` inside `applied()`.
        """
        labels = list(self._averages) if name is None else [self._lender.label(name)]
        self._same_model("begin")
        if weights is None:
            weights = {item.name: item.held() for item in self._live.stored()}
        copies = changes.given(weights, self._live, "copy")
        new = {
            label: changes.begun(weights, count, self._live, self._averages[label], self.every)
            for label in labels
        }
        if len(new) == len(self._averages):
            state: dict[str, Any] = {
                "format": STATE_FORMAT,
                "calls": 0,
                "elapsed": 0.0,
                "skipped": 0,
            }
            self.load_state_dict({**state, "copies": copies, "averages": new})
        else:
            state = self.state_dict()
            state["averages"] |= new
            state["copies"] = copies | state["copies"]
            self.load_state_dict(state)

    @lending.in_turn
    def change_rule(self, rule: Rule | str, name: str | None = None) -> None:
        """Go on with another rule, from the slots and the clock that there are.

        Raises `ValueError` if the rule needs other slots, `TypeError` for what is not a rule, and
        `RuntimeError` inside `applied()`.
        """
        average = self._get(name)
        self._same_model("change_rule")
        other = changes.ruled(average, savable_rule(rule))
        rule_and_clock = {"rule": other.rule, "tick": other.tick}
        changed = other.rule != average.rule and average.tick.n > 0
        mixed: dict[str, object] = {"mixed": self.mixed or changed}
        set_together([(average, rule_and_clock), (self, mixed)])

    @lending.in_turn
    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        """Bring the slots to another dtype or device, those that there are and those to come.

        Raises `ValueError` for a dtype or device that slots cannot have, or not while a module has
        them; `RuntimeError` inside `applied()`.
        """
        self._same_model("to")
        _require_slot_dtype(dtype)
        place = None if device is None else torch.device(device)
        self._refuse_sharded(place, "allow")
        rounding, averages = self._options["rounding"], list(self._averages.values())
        dtypes = {slot_dtype(i.local().dtype, dtype) for i in self._live.averaged}
        require_rounding(rounding, dtypes if dtype else set())
        new = changes.moved(self._live, averages, self._updating, dtype, place)
        given = {"dtype": dtype, "device": place}
        options = self._options | {key: value for key, value in given.items() if value is not None}
        set_together([*new, (self, {"_options": options})])
        self._twins.settle()

    @lending.in_turn
    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise what `load_state_dict` would raise, and change nothing."""
        self._checked(state)

    @lending.in_turn
    def summary(self) -> Summary:
        """Return every tensor's policy, the rules, the clock and the memory; it prints as a table.

        It reads all weights, and warns if rounding to nearest stops a share of them.
        """
        self._same_model("summary")
        return summarise(
            self._averages,
            self._live,
            self._updating.copies,
            elapsed=float(self._updating.every),
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the summary."""
        return self.summary()._repr_html_()

    def _together(self, call: str) -> AbstractContextManager[Agreement]:
        """With `shard`: a block that fails on all ranks if it fails on one."""
        if self._mesh is None:
            return nullcontext(Agreement())
        return together(call, self._mesh.get_group())

    def _compare_replicas(self, call: str) -> None:
        if self._mesh is None:
            return
        with self._together(call):
            self._live.check(call)
            alike = {i.name: i.found() for i in self._live.averaged if i.kind != "buffer"}
            stored = [(item.name, item.policy) for item in self._live.stored()]
        slots = f"dtype={self._options['dtype']}, {self._options['rounding']} rounding"
        told = f"{as_specs(self.rules)}, every={self.every}, {slots}, "
        told += f"{len(stored)} tensors ({digest(stored)})"
        require_same(call, alike, told, self._mesh)

    def _refuse_sharded(self, place: torch.device | None, nonfinite: str) -> None:
        """Raise `ValueError` for options that sharded weights cannot have."""
        stored = self._live.stored()
        require_beside((item.held() for item in stored), place)
        sharded = [item.name for item in stored if is_distributed(item.held())]
        if sharded and nonfinite in ("skip", "error"):
            raise ValueError(
                f'nonfinite is "{nonfinite}" and the weights are sharded ({sharded[0]}): each rank '
                'would decide by its own shards, and the ranks would drift apart; wanted "allow"'
            )

    def __reduce__(self) -> Any:
        """A copy or a pickle is an averager of the model beside it: of the copied model, in a holder."""
        if self._mesh is not None:
            raise TypeError(
                "an Averager with shard= has a process group and cannot be copied or pickled: save "
                "state_dict(), make an Averager for the other model and call load_state_dict() there"
            )
        made_with = self._live.model, self.rules, self._choice, self._options
        return _restored, (*made_with, self.state_dict())

    def _refuse_rows(self, call: str) -> None:
        if self._mesh is not None:
            raise ValueError(
                f"{call}: with shard= a rank has only its rows; call copy_to(model) instead"
            )

    def _with_pull(self, call: Callable[..., None]) -> Callable[..., None]:
        """What `update` and `attach` do: a call, and the pull that may follow it."""
        return call if self._pull is None else partial(self._call_and_pull, call, self._pull)

    def _call_and_pull(
        self,
        call: Callable[..., None],
        pull: Pull,
        elapsed: float,
        found_inf: Sequence[Tensor] = (),
    ) -> None:
        average = self._get(pull.name)
        self._updating.settle()
        before = average.tick.n
        call(elapsed, found_inf)
        self._updating.settle()
        if average.tick.n > before and average.tick.n % pull.every == 0:
            self.pull(pull.fraction, pull.name)

    @property
    def _pull(self) -> Pull | None:
        pull: Pull | None = self._options["pull"]
        return pull

    def _same_model(self, call: str) -> None:
        self._lender.refuse(call)
        self._updating.settle()
        self._live.check(call)

    def _checked(self, state: Mapping[str, Any]) -> State:
        self._same_model("load_state_dict")
        new = checked(state, self._live, self._averages)
        if (saved := state.get("pull", repr(self._pull))) != repr(self._pull):
            raise ValueError(
                f"load_state_dict: saved with pull={saved}, this averager has pull={self._pull!r}: make "
                "it with the same; polyak.load and the callbacks take change_rule=True to change it"
            )
        for name, average in self._averages.items():
            if average.shared() and not new.averages[name].tick.n:
                raise ValueError(
                    f"load_state_dict: average {name!r} has no update yet, and module({name!r}) has "
                    "its slots; let go of the module first"
                )
        return new

    def _keep_memory(
        self, slots: Sequence[Mapping[str, list[Tensor]]], copies: list[Tensor]
    ) -> None:
        """Brings what was loaded into the memory that slots and copies had, which others may use."""
        averages = zip(self._averages.values(), slots, strict=True)
        kept: dict[str, object] = {"copies": tensors.kept(copies, self._updating.copies)}
        set_together([*((a, a.kept(before)) for a, before in averages), (self._updating, kept)])
        self._twins.settle()

    def _ready(self, call: str, average: Average) -> None:
        self._same_model(call)
        self._twins.check(call)
        average.require_usable(call)

    def _get(self, name: str | None) -> Average:
        return self._averages[self._lender.label(name)]

    @lending.in_turn
    def _after_steps(self, found_inf: list[Tensor]) -> None:
        self._lender.refuse("update")
        self._call(1.0, found_inf)


def _restored(
    model: Source,
    rules: dict[str, Rule],
    choice: Choose,
    options: dict[str, Any],
    state: dict[str, Any],
) -> Averager:
    """An averager as it was; raises `TypeError` for a model that is not there yet."""
    if isinstance(model, nn.Module) and "_modules" not in vars(model):
        raise TypeError(
            f"{type(model).__name__} has an Averager of itself as an attribute, which would be copied "
            "before the model is: leave it out, def __getstate__(self): return {**super()."
            '__getstate__(), "averager": None}, or keep it beside the model'
        )
    averager = Averager.__new__(Averager)
    averager._make(model, rules, choice, **options)
    changes.alike(state, averager._live, averager._averages, averager._updating)
    averager.load_state_dict(state)
    return averager


def _require_slot_dtype(dtype: torch.dtype | None) -> None:
    wanted = f"one of {', '.join(map(str, SLOT_DTYPES))}"
    require(dtype in (None, *SLOT_DTYPES), "dtype", dtype, wanted)


def _device(model: object) -> torch.device:
    """The device of a model's first tensor. `track` refuses later what cannot be a model."""
    held: Iterable[object] = model.values() if isinstance(model, Mapping) else ()
    tensors = model.parameters() if isinstance(model, nn.Module) else held
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))
