"""EMA: the founding article's class, a module that carries the average of another module.

A script written for that class, or for ema-pytorch's `EMA` with these options, works when only its
import changes, and checkpoints of either load. It runs the averager's engine on the tensors of
`ema_model`. Its decay counts averaging calls and is not rescaled by `update_every`; where that is
not wanted, use `Averager`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyak._checks import difference, report, require_count
from polyak._engine.live import ModelTensors
from polyak._engine.slots import Average, move_
from polyak._engine.tracking import Policy, averageable, track
from polyak._tensors import Groups, slot_dtype
from polyak.rules import AVERAGE, ArticleEMA, Tick


class EMA(nn.Module):
    """An exponential moving average of a model, as a module: `ema.update()`, then `ema(x)`.

    After call n, with e = max(n - update_after_step - 1, 0):
    `decay = clamp(1 - (1 + e / inv_gamma) ** -power, min_value, beta)`, and 0 while e = 0. Calls up
    to update_after_step + 1 copy, the first averaging call copies once more, and only calls with
    (n - 1) % update_every == 0 do anything. With inv_gamma 1, power 2/3 reaches decay .999 at
    e = 31.6 K and .9999 at 1 M; power 3/4 at 10 K and 215.4 K.

    Args:
        model: the live model; part of the module tree with `include_online_model`.
        ema_model: the module that carries the average; by default a copy of the model, in eval
            mode, without gradients. One that cannot be copied is given ready made.
        beta, inv_gamma, power, min_value, update_after_step, update_every: as above, in calls.
        param_or_buffer_names_no_ema: names that are copied instead of averaged.
        ignore_names, ignore_startswith_names: left alone after the initial copies.
        include_online_model: whether `state_dict` holds the live model, under `online_model.`.

    Unlike ema-pytorch's, beta=1 does not freeze the average, and the first averaging call copies
    once more; names that match nothing are errors. Floating-point buffers are averaged, integer and boolean ones copied. The averages of bfloat16
    and float16 weights are kept in float32, which `state_dict` holds; `ema_model` has their
    roundings.

    >>> model = nn.Linear(2, 1)
    >>> ema = EMA(model, beta=0.99, update_after_step=0, update_every=1)
    >>> for _ in range(3):
    ...     ema.update()
    >>> round(ema.get_current_decay(), 4), list(ema.state_dict())[:3]
    (0.5193, ['initted', 'step', 'online_model.weight'])

    Raises `ValueError` for options out of range and for names that match nothing, `TypeError`
    unless model is a module, `RuntimeError` for a model that cannot be copied.
    Source: the founding article, section 2; ema-pytorch (MIT), whose file layout it shares.
    """

    initted: Tensor
    step: Tensor

    def __init__(
        self,
        model: nn.Module,
        ema_model: nn.Module | Callable[[], nn.Module] | None = None,
        beta: float = 0.9999,
        update_after_step: int = 100,
        update_every: int = 10,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
        param_or_buffer_names_no_ema: Collection[str] = frozenset(),
        ignore_names: Collection[str] = frozenset(),
        ignore_startswith_names: Collection[str] = frozenset(),
        include_online_model: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}, wanted a torch.nn.Module")
        require_count("EMA update_every", update_every, "calls per update")
        self.rule = ArticleEMA(beta, update_after_step, inv_gamma, power, min_value)
        self.update_every = update_every
        self.include_online_model = include_online_model
        self.online_model = model if include_online_model else [model]
        ignored = _ignored(model, ignore_names, ignore_startswith_names)
        policies = _policies(model, ignored, param_or_buffer_names_no_ema)
        self.ema_model = _carrier(model, ema_model)
        self._live = ModelTensors(model, policies, None)
        order = [item.name for item in self._live.tracked]
        self._carrier = ModelTensors(self.ema_model, policies, None, order)
        self.register_buffer("initted", torch.tensor([0.0]))
        self.register_buffer("step", torch.tensor([0]))
        self._calls, self._initted = 0, False
        self._loaded: dict[str, Tensor] = {}
        self._rounded: dict[str, Tensor] = {}
        self._average = Average(self.rule)
        self._adopt()
        self.register_state_dict_post_hook(_save_slots)
        self.register_load_state_dict_pre_hook(_read_state)
        self.register_load_state_dict_post_hook(_take_over)

    @property
    def model(self) -> nn.Module:
        """The live model."""
        online = self.online_model
        return online if isinstance(online, nn.Module) else online[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the module that carries the average."""
        return self.ema_model(*args, **kwargs)

    def train(self, mode: bool = True) -> EMA:
        """Sets the live model's mode; the average stays in eval mode, where dropout is off."""
        super().train(mode)
        self.ema_model.eval()
        return self

    def get_current_decay(self) -> float:
        """The decay that the last call of `update` had, or would have had: 0 while it copies."""
        return self.rule.decay(self._calls)

    def update(self) -> None:
        """Counts one call and, if it is this call's turn, copies or averages.

        Raises `RuntimeError` if the model's tensors are not those of the start.
        """
        self._calls += 1
        self.step.fill_(self._calls)
        if (self._calls - 1) % self.update_every:
            return
        groups = self._follow()
        copies = self._calls <= self.rule.update_after_step + 1
        if copies or not self._initted:
            self._copy("skip")
        if not copies and not self._initted:
            self._initted = True
            self.initted.fill_(1.0)
        elapsed = self._calls - self._average.tick.t
        move_(groups, self._average.advance(self._live, elapsed), stages=self._live.stages)
        self._finish()

    def update_moving_average(
        self, ma_model: nn.Module | None = None, current_model: nn.Module | None = None
    ) -> None:
        """One averaging with the decay of now, outside the count of calls.

        The models, if given, are this object's own `ema_model` and `model`, else `ValueError`.
        """
        if ma_model not in (None, self.ema_model) or current_model not in (None, self.model):
            raise ValueError("update_moving_average averages this EMA's own models and no others")
        self._blend(1 - self.get_current_decay())

    def copy_params_from_model_to_ema(self) -> None:
        """Copies all that is tracked from the live model, ignored names included."""
        self._blend(1.0)
        self._copy("skip")

    def restore_ema_model_device(self) -> None:
        """Moves the average to the device of this module's own buffers."""
        self.ema_model.to(self.initted.device)
        self._adopt()

    def get_params_iter(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of the tracked floating-point parameters of one of the two models."""
        return self._pairs(model, "parameter")

    def get_buffers_iter(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of the tracked floating-point buffers of one of the two models."""
        return self._pairs(model, "buffer")

    def _pairs(self, model: nn.Module, kind: str) -> Iterator[tuple[str, Tensor]]:
        for item in track(model):
            if item.kind == kind and averageable(item.local()):
                yield item.name, item.local()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMA:
        super()._apply(fn, recurse)
        self._adopt()
        return self

    def _blend(self, fraction: float) -> None:
        groups = self._follow()
        move_(groups, [self._average.move(self._live, AVERAGE, fraction)], stages=self._live.stages)
        self._finish()

    def _finish(self) -> None:
        """What follows a move of the slots: tensors to copy, and roundings of float32 slots."""
        self._copy("copy")
        for item in self._carrier.averaged:
            if item.name in self._rounded:
                item.local().data.copy_(self._rounded[item.name])

    @torch.no_grad()
    def _copy(self, policy: Policy) -> None:
        """Copies the tensors of a policy from the live model: "skip" are the ignored ones."""
        pairs = zip(self._live.tracked, self._carrier.tracked, strict=True)
        for source, carried in pairs:
            if source.policy == policy:
                carried.local().copy_(source.local())

    def _follow(self) -> Groups:
        """The live weights' groups; the average's tensors are looked up anew where replaced."""
        groups = self._live.groups()
        before = self._carrier.generation
        self._carrier.groups()
        if self._carrier.generation != before:
            self._adopt()
        return groups

    @torch.no_grad()
    def _adopt(self) -> None:
        """Makes the tensors of `ema_model` the slots; a narrow one gets a float32 slot beside it."""
        self._live.check("EMA")
        self._carrier.check("EMA ema_model")
        before, self._rounded = self._rounded, {}
        slots = []
        for live, carried in zip(self._live.averaged, self._carrier.averaged, strict=True):
            tensor = carried.local()
            dtype = slot_dtype(live.local().dtype, None)
            if tensor.dtype == dtype:
                slots.append(tensor)
            else:
                slots.append(_wide(tensor, dtype, before.get(carried.name)))
                self._rounded[carried.name] = slots[-1]
        self._average.adopt(AVERAGE, slots)

    @torch.no_grad()
    def _resume(self) -> None:
        """Sets the clock by the counters that were loaded, and takes float32 slots from the file."""
        self._calls, self._initted = int(self.step), bool(self.initted)
        self.rule = replace(self.rule, first_copy=not self._initted)
        self._average.rule = self.rule
        turns = -(-self._calls // self.update_every)
        last = (turns - 1) * self.update_every + 1 if turns else 0
        self._average.tick = Tick(turns, float(last), float(self.update_every))
        self._adopt()
        for key, slot in self._slot_keys():
            if key in self._loaded:
                slot.copy_(self._loaded[key])
        self._loaded = {}

    def _slot_keys(self) -> Iterator[tuple[str, Tensor]]:
        """The keys of `ema_model.state_dict()` whose averages are held wider, with their slots."""
        slots = {
            id(item.local()): self._rounded[item.name]
            for item in self._carrier.averaged
            if item.name in self._rounded
        }
        for key, tensor in self.ema_model.state_dict(keep_vars=True).items():
            if id(tensor) in slots:
                yield key, slots[id(tensor)]


def _carrier(model: nn.Module, ema_model: nn.Module | Callable[[], nn.Module] | None) -> nn.Module:
    """The module that carries the average, in eval mode and without gradients."""
    if ema_model is None:
        try:
            ema_model = deepcopy(model)
        except Exception as error:
            raise RuntimeError(
                f"EMA: {type(model).__name__} cannot be copied ({error}); build a second one and "
                "give it as ema_model=, or use polyak.Averager, which needs no copy"
            ) from error
    carrier = ema_model if isinstance(ema_model, nn.Module) else ema_model()
    taken = {item.local().data_ptr() for item in track(model) if item.local().numel()}
    shared = [item.name for item in track(carrier) if item.local().data_ptr() in taken]
    if shared:
        raise ValueError(f"EMA ema_model shares {shared[0]} with the model, wanted a second module")
    if lines := difference(_shapes(model), _shapes(carrier)):
        raise ValueError(report("EMA ema_model has other tensors than the model", lines))
    return carrier.requires_grad_(False).eval()


@torch.inference_mode(False)
def _wide(narrow: Tensor, dtype: torch.dtype, before: Tensor | None) -> Tensor:
    """A wide slot of a narrow tensor: the one before, unless the narrow one was set otherwise."""
    if before is not None and torch.equal(before.to(narrow.device, narrow.dtype), narrow):
        return before.to(narrow.device, dtype)
    return narrow.to(dtype)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {item.name: tuple(item.local().shape) for item in track(model)}


def _ignored(model: nn.Module, names: Collection[str], prefixes: Collection[str]) -> set[str]:
    """The names that are left alone; raises `ValueError` for one that matches nothing."""
    known = [name for item in track(model) for name in (item.name, *item.aliases)]
    found = {name for name in known if name in names or name.startswith(tuple(prefixes))}
    idle = [name for name in names if name not in found]
    idle += [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in found)]
    if idle:
        raise ValueError(f"EMA ignores {sorted(idle)}, which match no tensor of the model")
    return found


def _policies(model: nn.Module, ignored: set[str], copied: Collection[str]) -> dict[str, Policy]:
    """Name -> policy for every tensor of the model: all that floats is averaged, buffers too."""
    known = {name for item in track(model) for name in (item.name, *item.aliases)}
    if idle := sorted(set(copied) - known):
        raise ValueError(f"EMA param_or_buffer_names_no_ema has {idle}, which match no tensor")
    policies: dict[str, Policy] = dict.fromkeys(copied, "copy")
    for item in track(model):
        if ignored.intersection((item.name, *item.aliases)):
            policies[item.name] = "skip"
        elif not policies.keys() & {item.name, *item.aliases}:
            policies[item.name] = "average" if averageable(item.local()) else "copy"
    return policies


def _save_slots(module: EMA, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Puts the float32 averages of narrow weights into a state dict, under the narrow ones' keys."""
    for key, slot in module._slot_keys():
        state[f"{prefix}ema_model.{key}"] = slot.detach()


def _read_state(module: EMA, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Brings counters to this class's shapes (ema-pytorch's are scalars), notes wide averages."""
    for name, buffer in (("initted", module.initted), ("step", module.step)):
        if prefix + name in state:
            state[prefix + name] = state[prefix + name].reshape(1).to(buffer.dtype)
    keys = {key: f"{prefix}ema_model.{key}" for key, _ in module._slot_keys()}
    module._loaded = {key: state[long] for key, long in keys.items() if long in state}


def _take_over(module: EMA, _: object) -> None:
    module._resume()
