"""The averager: averages of a model's weights while it trains.

    averager = Averager(model, Exponential(0.999))
    for batch in batches:
        train_step(model, batch)
        averager.update()
    with averager.applied():
        evaluate(model)

It binds to a model as an optimizer does, holds no copy of the modules, and applies whatever its rule
says (`polyak.rules`) to the tensors that `polyak._engine.tracking` decided on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyak._checks import difference, report, require_positive
from polyak._engine import lending
from polyak._engine.attachment import Attachment
from polyak._engine.live import ModelTensors
from polyak._engine.policies import Buffers, Choose, Select
from polyak._engine.readout import AverageWeights
from polyak._engine.rounding import Rounding, require_rounding
from polyak._engine.slots import Average
from polyak._engine.states import STATE_FORMAT, State, checked, set_together
from polyak._engine.summary import Summary, summarise
from polyak._engine.swap import Applied, Lender
from polyak._engine.tracking import Source, Tracked, track
from polyak._engine.updating import Nonfinite, Updating
from polyak._lazy import TensorSpec
from polyak._ranks.agreement import Agreement, digest, together
from polyak._ranks.replicas import gather_, require_same
from polyak._ranks.sharding import (
    Layout,
    Shape,
    is_distributed,
    local,
    one_mesh,
    require_beside,
    reshard,
    shape,
)
from polyak.rules import Rule, Tick
from polyak.specs import as_rule, as_specs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

ONLY = "average"
"""The name of the average where there is but one."""

SLOT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Averager:
    """Averages of a model's weights: one rule or several, in one pass over the live weights.

    `slot <- lerp(slot, live, fraction)` at each update, `average = sum of coefficient * slot` when
    it is read; fractions and coefficients are the rule's.

    Args:
        model: an `nn.Module`, or a mapping name -> tensor. Never copied. Of one sharded by FSDP2
            (`fully_shard`) or tensor parallelism, each rank averages its own parts, without
            communication: shard the model first.
        rule: a `Rule` or its spec, or a mapping name -> rule for several averages at once.
        every: calls of `update` per update. Time still counts every call, so the horizon stays:
            `Exponential(d)` with every=4 updates with decay d^4.
        dtype: of the slots; by default that of the weights, and float32 for narrower ones.
        rounding: of the slots: "nearest", "stochastic" (bfloat16 and float16 slots, right in the
            mean) or "compensated" (a second tensor a slot holds what rounding dropped).
        device: of the slots; by default that of the weights. Slots on the CPU of CUDA weights
            are moved beside the training (`polyak._engine.offload`), best with `attach`.
        buffers: "auto" averages BatchNorm's running statistics and copies the others; "copy",
            "average", or a mapping name pattern -> "average", "copy" or "skip" (left alone), for
            parameters too.
        select: what is tracked: a pattern, several, or a function of the name. By default all.
        shard: a `torch.distributed` process group, or a device mesh of one dimension, whose ranks
            all have these weights whole (DistributedDataParallel): each rank holds and updates its
            rows of every average, 1/N of the memory, and to apply one it is gathered. Every rank
            of it makes the averager, and enters `applied`, at the same place of the program.
        nonfinite: of an update that finds NaN or inf in the weights: "allow" averages them, "skip"
            leaves the average as it is and counts (`skipped`), "error" raises. The last two read
            the weights once more; the host waits at most for the update before.

    >>> weights = {"w": torch.zeros(2)}
    >>> averager = Averager(weights, "exponential(0.5)")
    >>> for _ in range(3):
    ...     weights["w"] += 1.0
    ...     averager.update()
    >>> averager.average()["w"]
    tensor([2.2500, 2.2500])

    Raises `ValueError` or `TypeError` for a bad argument or a model that cannot be averaged, naming
    the tensor; `RuntimeError` for a call at the wrong time.
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
        select: Select = None,
        nonfinite: Nonfinite = "allow",
        shard: DeviceMesh | ProcessGroup | None = None,
    ) -> None:
        self._mesh = None if shard is None else one_mesh(shard, _device(model))
        with self._together("Averager"):
            if dtype not in (None, *SLOT_DTYPES):
                wanted = f"one of {', '.join(map(str, SLOT_DTYPES))}"
                raise ValueError(f"dtype is {dtype!r}, wanted {wanted}")
            place = None if device is None else torch.device(device)
            self._choice = Choose(buffers, select)
            self._live = ModelTensors(model, self._choice, mesh=self._mesh)
            self._refuse_sharded(place, nonfinite)
            self._averages = {
                name: Average(rule, dtype=dtype, device=place, rounding=rounding, name=name)
                for name, rule in _named(rule).items()
            }
            first = next(iter(self._averages.values()))
            require_rounding(rounding, {spec.dtype for spec in first.specs(self._live).values()})
            self._updating = Updating(
                self._live,
                list(self._averages.values()),
                every=every,
                nonfinite=nonfinite,
                device=place,
            )
        self._slots = f"dtype={dtype}, {rounding} rounding"
        self.run: str | None = None
        """The run that a `Recorder` stores, if one does; kept in states."""
        self.mixed = False
        """Whether the slots were made by other rules too (`polyak.load(change_rule=True)`)."""
        self._lender = Lender(self._live, self._averages, self._updating, self._mesh)
        self._attachment: Attachment | None = None
        self._compare_replicas("Averager")

    @property
    def rule(self) -> Rule | dict[str, Rule]:
        """The rule, or name -> rule where there are several."""
        rules = self.rules
        return rules[ONLY] if list(rules) == [ONLY] else rules

    @property
    def rules(self) -> dict[str, Rule]:
        """name -> rule; the name of a lone average is "average"."""
        return {name: average.rule for name, average in self._averages.items()}

    @property
    def every(self) -> int:
        """How many calls of `update` make an update."""
        return self._updating.every

    @property
    def tracked(self) -> list[Tracked]:
        """Every tensor of the model as it is now: its name, its policy, where its content is.

        Raises `RuntimeError` where the model's tensors are not those of the start.
        """
        self._live.check("tracked")
        return list(self._live.tracked)

    def slot_specs(self, name: str | None = None) -> dict[str, dict[str, TensorSpec]]:
        """What an average may hold: slot -> name of the averaged tensor -> its shape and dtype.

        Raises `KeyError` for an unknown name.
        """
        average = self._get(name)
        return {slot: average.specs(self._live) for slot in sorted(average.known_slots())}

    @property
    def clock(self) -> Tick:
        """The clock after the last update, without waiting for a verdict that may take it back."""
        return next(iter(self._averages.values())).tick

    @property
    def count(self) -> int:
        """How many updates were made: the calls of `update`, divided by `every`."""
        self._updating.settle()
        return self.clock.n

    @property
    def skipped(self) -> int:
        """How many updates were left out because weights were not finite (`nonfinite="skip"`)."""
        self._updating.settle()
        return self._updating.skipped

    @property
    def sharded(self) -> bool:
        """Whether ranks have a part each, of the weights or of the averages alone."""
        return any(is_distributed(item.held()) for item in self._live.stored())

    def check_replicas(self) -> None:
        """With `shard`, compares the weights of all ranks, bit for bit; collective.

        It is done at the start and when an average is saved. Raises `RuntimeError` naming the
        tensors in which ranks differ: their rows would be averages of different models.
        """
        self._compare_replicas("check_replicas")

    def update(self, elapsed: float | None = None) -> None:
        """Counts one call and, at every `every`-th, moves the slots towards the live weights.

        `elapsed` is the time since the last call, 1 if not given: steps, samples or tokens, as the
        rule counts. The first update copies. The host never waits for the device, except once at the
        second update: infinities that stay constant (a mask) are looked for then.

        Raises `RuntimeError` inside `applied()` and when the model's tensors are not those of the
        start; `ValueError` unless elapsed > 0 and the time after it is finite; `FloatingPointError`
        for weights that are not finite where `nonfinite="error"`.
        """
        with lending.TURN:
            if self._lender.loan is not None:
                self._lender.refuse("update")
            if elapsed is not None:
                elapsed = float(require_positive("elapsed", elapsed))
                self._updating.require_time_for(elapsed)
            self._updating.call(1.0 if elapsed is None else elapsed)

    def attach(self, optimizer: Any, scaler: Any = None) -> Attachment:
        """Calls `update()` after each step of an optimizer; `.remove()` of what it returns detaches.

        `optimizer` is a `torch.optim.Optimizer`, a wrapper of one (accelerate's, Lightning's, any
        that has it as `.optimizer`), or a sequence of them: then an update follows when each has
        stepped. A step counts once, where its outermost call ends: gradient accumulation, closures,
        and steps that call other steps make one update.

        A `GradScaler` that skips a step of an ordinary optimizer skips the update with it; a fused
        optimizer runs its hooks all the same, so give the scaler here (accelerate's is found). The
        host waits at most for the update before.

        Raises `ValueError` for no optimizer or one given twice; `TypeError` for another object;
        `RuntimeError` if attached already, and at a step of a fused optimizer under a scaler that
        was not given.
        """
        lone = hasattr(optimizer, "step") or not isinstance(optimizer, Iterable)
        several = [optimizer] if lone else list(optimizer)
        if self._attachment is not None and self._attachment.active:
            raise RuntimeError(
                "attach: attached already, so a step would count twice: remove() first"
            )
        updating = self._updating
        self._attachment = Attachment(
            several, scaler, self._after_steps, updating.before_step, updating.detached
        )
        return self._attachment

    @lending.in_turn
    def average(self, name: str | None = None) -> dict[str, Tensor]:
        """The average: canonical name -> fresh tensor, in the slots' dtype and on their device.

        Sharded ones are DTensors like the model's, or with `shard` of its rows, and every rank must
        then do the same with them.
        It has averaged and copied tensors, under all names of tied ones, so that the model's
        `load_state_dict` takes it where everything is tracked (with `shard` that is `copy_to`'s to
        do). `name` is needed where there are several averages.

        Raises `RuntimeError` before the first update and inside `applied()`; `KeyError` for an
        unknown name.
        """
        return self.weights(name).whole()

    @lending.in_turn
    def weights(self, name: str | None = None) -> AverageWeights:
        """The average as a mapping that computes a tensor when asked: `average()` in less memory.

        It holds until the next update. Errors: those of `average()`.
        """
        average = self._get(name)
        self._ready("average", average)
        return AverageWeights(self._live, average, self._updating.copies)

    def applied(self, name: str | None = None) -> AbstractContextManager[None]:
        """Within the block the model carries the average; its live weights come back whatever happens.

        Contents are exchanged in place, by chunks: pointers stay, and there is no third copy but
        for buffers and for weights whose average has another dtype or device or several slots.

        An inner block of the same average does nothing. Another averager of the same model sees the
        average in the block, as everyone does. Ctrl-C waits until contents have been exchanged.

        Raises `RuntimeError` before the first update, inside the block of another average, and
        after a block that wrote to the weights, replaced or moved them. (Where the block itself
        raised, that is a note on its exception.) What it wrote may have spoilt the average: then
        it cannot be read until a state is loaded.

        With `shard` it is collective to enter: ranks agree on what they gather, and each keeps its
        live weights aside, a copy for the time of the block. To leave, no rank needs another.
        """
        return Applied(self._lender, name)

    @torch.no_grad()
    def copy_to(self, model: Source, name: str | None = None) -> None:
        """Writes the average into a model for good, by name, rounded to the model's dtypes.

        The model may be the live one (training then goes on from the average: Switch-EMA, Hare and
        Tortoise) or another of the same names and shapes, wrapped or not.

        Raises `ValueError` listing names that are missing, extra or of another shape;
        `RuntimeError` before the first update and inside `applied()`. Collective with `shard`.
        """
        with self._together("copy_to") as agreement:
            average = {name: local(tensor) for name, tensor in self.average(name).items()}
            reshard(model)
            found = [i for i in track(model, self._choice).tracked if i.policy != "skip"]
            _require_fit(self._live.stored(), found, average)
            theirs = {name: item.local() for item in found for name in item.names}
            divided = [item.name for item in self._live.averaged if item.mesh is not None]
            forms = [(name, theirs[name].shape, theirs[name].dtype) for name in divided]
            agreement.told = (
                f"{self._lender.label(name)!r}, {self._get(name).tick}, {digest(forms)}"
            )
            lending.refuse_lent("copy_to", found)
        if self._mesh is not None:
            gather_([(theirs[name], average[name]) for name in divided], self._mesh)
        gathered = {id(theirs[name]) for name in divided}
        with lending.TURN:
            for item in found:
                if id(theirs[item.name]) not in gathered:
                    theirs[item.name].copy_(average[item.name])

    @lending.in_turn
    def state_dict(self) -> dict[str, Any]:
        """Rules, clocks and slots as data: plain dictionaries, numbers, strings and tensors.

        The tensors are the averager's own, as with `nn.Module.state_dict`: save or copy them before
        the next update. `torch.load(..., weights_only=True)` reads a saved one. Those of a sharded
        model are DTensors that share the slots' memory, for `torch.distributed.checkpoint`: it
        loads into the state of an averager that has made its updates, which then takes it over
        with `load_state_dict`.

        Raises `RuntimeError` inside `applied()`, where slots hold the live weights.
        """
        self._same_model("state_dict")
        for average in self._averages.values():
            average.refuse_spoilt("state_dict")
        averages = {name: average.state(self._live) for name, average in self._averages.items()}
        state = {"format": STATE_FORMAT, **self._updating.state(), "averages": averages}
        state |= {"run": self.run} if self.run else {}
        return state | ({"mixed": True} if self.mixed else {})

    @lending.in_turn
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state that `state_dict` gave, copying its tensors; then training goes on.

        Averages, rules, names, shapes, dtypes and the layouts of sharded tensors must agree; all is
        checked before anything is changed. Raises `ValueError` that lists what differs.
        """
        new = self._checked(state)
        changes: list[tuple[object, dict[str, object]]] = [
            (average, average.taken(self._live, held.tick, held.slots))
            for average, held in zip(self._averages.values(), new.averages.values(), strict=True)
        ]
        updating = self._updating.taken(new.calls, new.elapsed, new.skipped, new.copies)
        own: dict[str, object] = {"run": new.run, "mixed": new.mixed}
        set_together([*changes, (self._updating, updating), (self, own)])

    @lending.in_turn
    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises what `load_state_dict` would raise, and takes nothing over."""
        self._checked(state)

    @lending.in_turn
    def summary(self) -> Summary:
        """What was decided for every tensor, the rules, the clock and the memory; prints as a table.

        It warns where rounding to nearest stops a share of the weights. It reads all weights.
        """
        self._same_model("summary")
        return summarise(
            self._averages,
            self._live,
            self._updating.copies,
            elapsed=float(self._updating.every),
        )

    def _together(self, call: str) -> AbstractContextManager[Agreement]:
        """A block that fails on all ranks if it fails on one, where they share averages."""
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
        told = f"{as_specs(self.rules)}, every={self.every}, {self._slots}, "
        told += f"{len(stored)} tensors ({digest(stored)})"
        require_same(call, alike, told, self._mesh)

    def _refuse_sharded(self, place: torch.device | None, nonfinite: str) -> None:
        """Raises `ValueError` for what sharded weights cannot have."""
        stored = self._live.stored()
        require_beside((item.held() for item in stored), place)
        sharded = [item.name for item in stored if is_distributed(item.held())]
        if sharded and nonfinite in ("skip", "error"):
            raise ValueError(
                f'nonfinite is "{nonfinite}" and the weights are sharded ({sharded[0]}): ranks '
                'would decide each by its own part, and go apart; wanted "allow"'
            )

    def __reduce__(self) -> Any:
        raise TypeError(
            "an Averager is bound to its model and is not copied or pickled: save state_dict(), "
            "make another Averager for the other model and load it there"
        )

    def _same_model(self, call: str) -> None:
        self._lender.refuse(call)
        self._updating.settle()
        self._live.check(call)

    def _checked(self, state: Mapping[str, Any]) -> State:
        self._same_model("load_state_dict")
        return checked(state, self._live, self._averages)

    def _ready(self, call: str, average: Average) -> None:
        self._same_model(call)
        average.require_usable(call)

    def _get(self, name: str | None) -> Average:
        return self._averages[self._lender.label(name)]

    @lending.in_turn
    def _after_steps(self, found_inf: list[Tensor]) -> None:
        self._lender.refuse("update")
        self._updating.call(1.0, found_inf)


def _device(model: object) -> torch.device:
    """Where the first tensor of a model is; what is no model is refused later."""
    held: Iterable[object] = model.values() if isinstance(model, Mapping) else ()
    tensors = model.parameters() if isinstance(model, nn.Module) else held
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def _require_fit(
    ours: Sequence[Tracked], theirs: Sequence[Tracked], average: Mapping[str, Tensor]
) -> None:
    """Raises `ValueError` unless a model can hold an average: names, shapes, one value a tensor."""
    if lines := difference(_shapes(ours), _shapes(theirs)):
        if any(isinstance(each, Layout) for each in _shapes(ours).values()):
            lines.append("between layouts: polyak.save, or checkpoints.export, and load there")
        raise ValueError(report("copy_to: the model's tensors are not the average's", lines))
    for item in theirs:
        first = average[item.name]
        for name in item.aliases:
            if average[name] is not first and not torch.equal(average[name], first):
                raise ValueError(
                    f"copy_to: {name} is tied to {item.name} in the model, and its average is "
                    "another: wanted a model in which they are two tensors"
                )


def _shapes(tracked: Sequence[Tracked]) -> dict[str, Shape]:
    """name -> shape in the model, under all names of tied tensors."""
    return {n: shape(item.found()) for item in tracked for n in (item.name, *item.aliases)}


def _named(rule: Rule | str | Mapping[str, Rule | str]) -> dict[str, Rule]:
    """name -> rule; a single rule is called "average"."""
    if not isinstance(rule, Mapping):
        return {ONLY: as_rule(rule)}
    if not rule:
        raise ValueError("rule is an empty mapping, wanted at least one name -> rule")
    for name in rule:
        if not isinstance(name, str) or not name:
            raise TypeError(f"an average's name is {name!r}, wanted a string that is not empty")
        if "/" in name:
            raise ValueError(f"an average's name is {name!r}, wanted one without a slash")
    return {name: as_rule(each) for name, each in rule.items()}
