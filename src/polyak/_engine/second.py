"""The second module of `EMA`, which has the average: how it is made, and what it averages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyak._checks import difference, report, require
from polyak._dtypes import slot_dtype
from polyak._engine import open_swaps
from polyak._engine.live import ModelTensors
from polyak._engine.memory import addresses, identity, overlap
from polyak._engine.tracking import Policy, Tracked, averageable
from polyak._engine.watch import ELEMENTS_A_LOOK
from polyak._modes import no_grad, ordinary
from polyak._tensors import versions

Copies = list[tuple[Tensor, Tensor]]
"""Tensors of the second module, and the tensors of the model that they are updated from."""

LEAST_ADDRESSES = 256
"""How many tensors of tiny ones each update looks at: as many as take about two percent of its time."""

_MOST = {"initted": 1, "step": 2**53}  # above 2**53, a float cannot hold every integer


@dataclass(frozen=True)
class ByName:
    """The article's choice: all floating-point tensors are averaged, buffers too.

    `copied` are names, `ignored` names and `prefixes` beginnings of names. Raises `ValueError` for
    those that match nothing, `TypeError` for a lone string or what is not a name.
    """

    copied: Collection[str]
    ignored: Collection[str]
    prefixes: Collection[str]

    def __post_init__(self) -> None:
        options = ("param_or_buffer_names_no_ema", "ignore_names", "ignore_startswith_names")
        for option, (field, names) in zip(options, list(vars(self).items()), strict=True):
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"EMA {option} is {names!r}, wanted a collection of names")
            object.__setattr__(self, field, frozenset(names))

    def __call__(self, found: Sequence[Tracked]) -> list[tuple[Policy, str]]:
        names = [name for item in found for name in item.names]
        idle = {*self.ignored} - {*names}
        idle |= {p for p in self.prefixes if not any(name.startswith(p) for name in names)}
        if idle:
            raise ValueError(
                f"EMA ignore_names, ignore_startswith_names: {sorted(idle)} match no tensor of the model"
            )
        if idle := {*self.copied} - {*names}:
            wanted = "which match no tensor"
            raise ValueError(f"EMA param_or_buffer_names_no_ema has {sorted(idle)}, {wanted}")
        return [self._choose(item) for item in found]

    def _choose(self, item: Tracked) -> tuple[Policy, str]:
        prefixes = tuple(self.prefixes)
        if any(name in self.ignored or name.startswith(prefixes) for name in item.names):
            return "skip", "ignored"
        if any(name in self.copied for name in item.names):
            return "copy", "by its name"
        return ("average" if averageable(item.local()) else "copy"), item.kind


@open_swaps.in_turn
def made(
    live: ModelTensors, model: nn.Module, given: nn.Module | Callable[[], nn.Module] | None
) -> tuple[nn.Module, ModelTensors]:
    """The module that has the average, in eval mode and without gradients, and its tensors.

    It is the given one, or a copy of the model. Raises `ValueError` if it shares memory with the
    model, and `RuntimeError` for a model that cannot be copied.
    """
    if given is None:
        open_swaps.refuse_swapped("EMA", live.stored())
        module = _copied(live, model)
    else:
        module = given if isinstance(given, nn.Module) else given()
    policies = {name: item.policy for item in live.tracked for name in item.names}
    carrier = ModelTensors(module, _Alike(policies), like=live)
    require_second(live, carrier)
    return module.requires_grad_(False).eval(), carrier


@dataclass(frozen=True)
class _Alike:
    """The policies of the live model, name by name, for the module that has the average."""

    policies: Mapping[str, Policy]

    def __call__(self, found: Sequence[Tracked]) -> list[tuple[Policy, str]]:
        alike = "as in the live model"
        return [(self.policies.get(item.name, "average"), alike) for item in found]


@ordinary
def _copied(live: ModelTensors, model: nn.Module) -> nn.Module:
    """A copy of the model, in which tied tensors are tied.

    `deepcopy` copies each of two Parameters on one storage by itself, so they are copied first.
    """
    copies: dict[int, Any] = {}
    try:
        for item in live.tracked:
            first, *others = (entry.found() for entry in item.entries)
            for other in others:
                if id(other) not in copies and other is not first:
                    copies[id(other)] = _alias(deepcopy(first, copies), other)
        return deepcopy(model, copies)
    except Exception as error:
        raise RuntimeError(
            f"EMA: {type(model).__name__} cannot be copied ({error}); build a second one and give "
            "it as ema_model=, or use polyak.Averager, which needs no copy"
        ) from error


def _alias(tensor: Tensor, like: Tensor) -> Tensor:
    """A second tensor on the memory of the first: a Parameter or a plain tensor, as `like` is."""
    if isinstance(like, nn.Parameter):
        return nn.Parameter(tensor.detach(), like.requires_grad)
    return tensor.detach()


def require_second(live: ModelTensors, carrier: ModelTensors) -> None:
    """Raises `ValueError` if the two models share memory."""
    taken = {identity(item.found()) for item in live.tracked}
    shared = [item.name for item in carrier.tracked if identity(item.found()) in taken]
    stored = [(item.name, item.found()) for item in (*live.stored(), *carrier.stored())]
    shared = shared or list(overlap(stored) or ())
    if shared:
        raise ValueError(f"EMA ema_model shares {shared[0]} with the model, wanted a second module")


def copies(live: ModelTensors, carrier: ModelTensors, policy: Policy) -> Copies:
    """The tensors of a policy in the second module, with the live ones: "skip" are the ignored names."""
    ours = {item.name: item for item in live.tracked if item.policy == policy}
    open_swaps.refuse_swapped("EMA", list(ours.values()))
    theirs = {item.name: item for item in carrier.tracked if item.name in ours}
    given = {name: item.shape() for name, item in ours.items()}
    if wrong := difference({name: item.shape() for name, item in theirs.items()}, given):
        title = "EMA: the names or shapes of the model's tensors differ from those of ema_model"
        raise RuntimeError(report(title, wrong))
    return [(theirs[name].local(), item.local()) for name, item in ours.items()]


class WideSlots:
    """The slots in a second module: its own tensors, and a float32 tensor beside each narrow one."""

    def __init__(self, live: ModelTensors, carrier: ModelTensors) -> None:
        self._live, self._carrier = live, carrier
        self._wide: dict[str, Tensor] = {}
        self._looked: list[tuple[list[Tensor], list[int | None]]] = [([], [])]
        self._turn = 0
        self._written: tuple[list[Tensor], list[int]] = [], []

    def __bool__(self) -> bool:
        """Whether any tensor of the second module is narrow."""
        return bool(self._wide)

    def untouched(self, *, everywhere: bool) -> bool:
        """Whether both modules' tensors are where they were, and nobody wrote to narrow ones.

        `.data` and `set_` move a tensor. The memory may be the other module's then. A call looks at
        tensors in turn, as `Watch` does, or everywhere.
        """
        self._turn = (self._turn + 1) % len(self._looked)
        parts = self._looked if everywhere else [self._looked[self._turn]]
        here = all(addresses(tensors) == places for tensors, places in parts)
        narrow, seen = self._written
        return here and versions(narrow) == seen

    @open_swaps.in_turn
    @no_grad
    def look_up(self) -> list[Tensor]:
        """The slots, in the order of the averaged tensors."""
        both = [i.local() for i in (*self._live.averaged, *self._carrier.averaged)]
        looks = max(LEAST_ADDRESSES, sum(map(Tensor.numel, both)) // ELEMENTS_A_LOOK)
        parts = [both[i : i + looks] for i in range(0, len(both), looks)]
        self._looked = [(part, addresses(part)) for part in parts]
        slots, wide = [], {}
        for live, carried in zip(self._live.averaged, self._carrier.averaged, strict=True):
            tensor = carried.local()
            dtype = slot_dtype(live.local().dtype, None)
            if tensor.dtype == dtype:
                slots.append(tensor)
            else:
                slots.append(_wide(tensor, dtype, self._wide.get(carried.name)))
                wide[carried.name] = slots[-1]
        self._wide = wide
        narrow = [item.local() for item, _ in self._pairs()]
        self._written = narrow, versions(narrow)
        return slots

    def turn(self, model: nn.Module, module: nn.Module) -> tuple[ModelTensors, ModelTensors]:
        """Goes on, by name, with the tensors of modules that took the place of the two.

        Raises `ValueError` unless they are like those before.
        """
        self._live, self._carrier = _turned(self._live, model), _turned(self._carrier, module)
        return self._live, self._carrier

    def round_(self) -> None:
        """Write the float32 slots, rounded, into the module's narrow weights."""
        for item, slot in self._pairs():
            item.local().copy_(slot)
        self._written = self._written[0], versions(self._written[0])

    def keys(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The keys of the module's state dict that have a float32 slot, with that slot."""
        slots = {id(item.local()): slot for item, slot in self._pairs()}
        for key, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) in slots:
                yield key, slots[id(tensor)]

    def _pairs(self) -> list[tuple[Tracked, Tensor]]:
        wide = self._wide
        return [(t, wide[t.name]) for t in self._carrier.averaged if t.name in wide] if wide else []


def _turned(tensors: ModelTensors, model: nn.Module) -> ModelTensors:
    if tensors.model is model:
        return tensors
    choice, mesh = tensors._options
    turned = ModelTensors(model, choice, mesh=mesh, like=tensors)
    turned.suspect = tensors.suspect
    return turned


@ordinary
def _wide(narrow: Tensor, dtype: torch.dtype, before: Tensor | None) -> Tensor:
    """A wide slot for a narrow tensor: the last one, unless the narrow tensor was changed since."""
    if before is not None and torch.equal(before.to(narrow.device, narrow.dtype), narrow):
        return before.to(narrow.device, dtype)
    return narrow.to(dtype)


@ordinary
def take_counters(state: dict[str, Tensor], prefix: str, buffers: Mapping[str, Tensor]) -> None:
    """Brings the counters in a state to the shapes of the buffers; ema-pytorch's are scalars.

    Raises `ValueError` unless each is one integer that it can have.
    """
    for name, buffer in buffers.items():
        if (key := prefix + name) in state:
            state[key] = torch.full_like(buffer, _counter(key, state[key], _MOST[name]))


def _counter(key: str, value: object, most: int) -> int:
    try:
        number = value.reshape(1).item() if isinstance(value, Tensor) else None
    except (RuntimeError, ValueError):  # a tensor without content, or of another number of values
        number = None
    if isinstance(value, Tensor) and isinstance(number, float) and value.is_floating_point():
        most = min(most, int(2 / torch.finfo(value.dtype).eps))  # larger ones may be rounded
    holds = isinstance(number, int | float) and 0 <= number <= most and number % 1 == 0
    holds = holds and (most == 1 or not isinstance(number, bool))
    shown = value if number is None else number
    kind = f" of {value.dtype}" if isinstance(value, Tensor) else ""
    require(holds, f"EMA: {key}", shown, f"a tensor of one integer, 0 to {most}{kind}")
    return int(cast(float, number))
