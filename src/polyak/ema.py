"""EMA: the founding article's class, a module that has the average of another module.

A script written for that class, or for ema-pytorch's `EMA` with these options, works when only its
import changes, and checkpoints of either load. It runs the averager's engine on the tensors of `ema_model`.
Its decay counts averaging calls, whatever `update_every` is; where that is not wanted, use `Averager`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyak._checks import require_count
from polyak._engine import open_swaps, second
from polyak._engine.live import ModelTensors
from polyak._engine.moving import Move
from polyak._engine.policies import Choose
from polyak._engine.slots import Average
from polyak._engine.tracking import Policy, averageable, track
from polyak._engine.updating import Motion, undisturbed
from polyak._modes import no_grad
from polyak._tensors import Groups
from polyak.rules import AVERAGE, ArticleEMA, Tick

__all__ = ["EMA"]


class EMA(nn.Module):
    """An exponential moving average of a model, as a module: `ema.update()`, then `ema(x)`.

    After call n, with e = max(n - update_after_step - 1, 0):
    `decay = clamp(1 - (1 + e / inv_gamma) ** -power, min_value, beta)`, and 0 while e = 0. Calls up
    to update_after_step + 1 copy, the first averaging call copies once more, and only calls with
    (n - 1) % update_every == 0 do anything. With inv_gamma 1, power 2/3 reaches decay .999 at
    e = 31.6 K and .9999 at 1 M; power 3/4 at 10 K and 215.4 K.

    Args:
        model: the live model; part of the module tree with `include_online_model`.
        ema_model: the module that has the average; by default a copy of the model, in eval
            mode, without gradients. Pass it if the model cannot be copied.
        beta, inv_gamma, power, min_value, update_after_step, update_every: as above, in calls.
        param_or_buffer_names_no_ema: names that are copied instead of averaged.
        ignore_names, ignore_startswith_names: left alone after the initial copies.
        include_online_model: whether `state_dict` holds the live model, under `online_model.`.

    Unlike in ema-pytorch, beta=1 does not freeze the average, the first averaging call copies once
    more, and names that match nothing are errors. Floating-point buffers are averaged; integer and
    boolean buffers are copied. The averages of bfloat16 and float16 weights are float32 tensors:
    `state_dict` holds these, and `ema_model` holds them rounded.

    >>> model = nn.Linear(2, 1)
    >>> ema = EMA(model, beta=0.99, update_after_step=0, update_every=1)
    >>> for _ in range(3):
    ...     ema.update()
    >>> round(ema.get_current_decay(), 4), list(ema.state_dict())[:3]
    (0.5193, ['initted', 'step', 'online_model.weight'])

    Raises `ValueError` for options out of range, names that match nothing and models that share
    memory; `TypeError` unless model is a module; `RuntimeError` if it cannot be copied.
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
        self.rule = ArticleEMA(beta, update_after_step, inv_gamma, power, min_value)
        self.update_every = require_count("EMA update_every", update_every, "calls per update")
        self.include_online_model = include_online_model
        self.online_model = model if include_online_model else [model]
        choice = second.ByName(param_or_buffer_names_no_ema, ignore_names, ignore_startswith_names)
        self._live = ModelTensors(model, choice)
        self.ema_model, self._carrier = second.made(self._live, model, ema_model)
        self.register_buffer("initted", torch.tensor([0.0]))
        self.register_buffer("step", torch.tensor([0]))
        self._calls, self._initted = 0, False
        self._loaded: dict[str, Tensor] = {}
        self._wide = second.WideSlots(self._live, self._carrier)
        self._average = Average(self.rule)
        self._bind()
        self.register_state_dict_post_hook(_save_slots)
        self.register_load_state_dict_pre_hook(_read_state)
        self.register_load_state_dict_post_hook(EMA._resume)

    @property
    def model(self) -> nn.Module:
        """The live model."""
        online = self.online_model
        return online if isinstance(online, nn.Module) else online[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module that has the average."""
        return self.ema_model(*args, **kwargs)

    def train(self, mode: bool = True) -> EMA:
        """Sets the live model's mode; the average stays in eval mode, where dropout is off."""
        super().train(mode)
        self.ema_model.eval()
        return self

    def get_current_decay(self) -> float:
        """The decay that the last call of `update` had, or would have had: 0 while it copies."""
        return self.rule.decay(self._calls)

    @open_swaps.in_turn
    def update(self) -> None:
        """Counts one call; every `update_every`-th call copies or averages.

        Raises `RuntimeError` if the model's tensors are not those of the start, and `ValueError` if the
        two models share memory.
        """
        calls, copying = self._calls + 1, self._calls <= self.rule.update_after_step
        due = self._calls % self.update_every == 0
        fresh = due and not self._initted

        def advance() -> list[Move]:
            elapsed = calls - self._average.tick.t
            return self._average.advance(self._live, elapsed) if due else []

        def end() -> None:
            if due:
                self._wide.round_()
            if fresh and not copying:
                self._initted = True
                self.initted.fill_(1.0)
            self._calls = calls
            self.step.fill_(calls)

        policies: tuple[Policy, ...] = ("copy", "skip") if copying or fresh else ("copy",)
        self._move("update", advance, policies if due else (), end)

    @open_swaps.in_turn
    def update_moving_average(
        self, ma_model: nn.Module | None = None, current_model: nn.Module | None = None
    ) -> None:
        """Averages once, with the current decay; the call is not counted.

        The models, if given, are this object's own `ema_model` and `model`, else `ValueError`.
        """
        if ma_model not in (None, self.ema_model) or current_model not in (None, self.model):
            raise ValueError("update_moving_average takes this EMA's own two models only")
        self._blend("update_moving_average", 1 - self.get_current_decay(), ("copy",))

    @open_swaps.in_turn
    def copy_params_from_model_to_ema(self) -> None:
        """Copies all that is tracked from the live model, ignored names included."""
        self._live.check("EMA")
        self._live.suspect = ""
        self._blend("copy_params_from_model_to_ema", 1.0, ("copy", "skip"))

    @open_swaps.in_turn
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
        for item in track(model, Choose()).tracked:
            if item.kind == kind and averageable(item.local()):
                yield item.name, item.local()

    @open_swaps.in_turn
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMA:
        super()._apply(fn, recurse)
        self._adopt()
        return self

    def _blend(self, call: str, fraction: float, policies: Sequence[Policy]) -> None:
        move = self._average.move
        self._move(call, lambda: [move(self._live, AVERAGE, fraction)], policies, self._wide.round_)

    def _move(
        self,
        call: str,
        advance: Callable[[], list[Move]],
        policies: Sequence[Policy],
        end: Callable[[], None],
    ) -> None:
        """Moves slots, copies tensors of these policies if any, calls `end`: all of it or nothing."""
        groups = self._follow(call) if policies else []
        copies = [
            pair for each in policies for pair in second.copies(self._live, self._carrier, each)
        ]
        before, motion = self._average.tick, None
        try:
            motion = Motion(groups, advance(), stages=self._live.stages)
            self._finish(motion.run, copies, end)
        except BaseException:
            if motion is None:
                self._average.back_to(before)
            else:
                undisturbed(partial(self._finish, motion.finish, copies, end))
            raise

    @no_grad
    def _finish(
        self, move: Callable[[], None], copies: second.Copies, end: Callable[[], None]
    ) -> None:
        """All of a call that changes tensors; after an interruption, each part of it may run twice."""
        move()
        for tensor, content in copies:
            tensor.copy_(content)
        end()

    def _follow(self, call: str) -> Groups:
        """Groups the live weights; looks up again what was replaced, the two models too."""
        placed = self._modules  # nn.Module's attributes take 1 us each
        online = placed.get("online_model") if self.include_online_model else self.model
        if self._live.model is not online or self._carrier.model is not placed["ema_model"]:
            self._live, self._carrier = self._wide.turn(self.model, self.ema_model)
            self._adopt()
        self._live.trained(call)
        if self._live.suspect:
            mend = "load a saved state, or call copy_params_from_model_to_ema()"
            raise RuntimeError(f"EMA: {mend} first. {self._live.suspect}")
        self._follow_second(call)
        return self._live.groups

    def _follow_second(self, call: str, *, everywhere: bool = False) -> None:
        self._carrier.trained(call)
        bound = self._live.generation, self._carrier.generation
        if bound != self._bound or not self._wide.untouched(everywhere=everywhere):
            self._adopt()

    def _adopt(self) -> None:
        """Looks all tensors up again, and makes those of `ema_model` the slots."""
        self._live.check("EMA")
        self._carrier.check("EMA ema_model")
        second.require_second(self._live, self._carrier)
        self._bind()

    @open_swaps.in_turn
    def _bind(self) -> None:
        self._average.adopt(AVERAGE, self._wide.look_up())
        self._bound = self._live.generation, self._carrier.generation

    @open_swaps.in_turn
    @no_grad
    def _resume(self, _: object) -> None:
        """Sets the clock by the counters that were loaded, and takes float32 slots from the file."""
        self._calls, self._initted = int(self.step), bool(self.initted)
        self.rule = self._average.rule = replace(self.rule, first_copy=not self._initted)
        turns = -(-self._calls // self.update_every)
        last = (turns - 1) * self.update_every + 1 if turns else 0
        self._average.tick = Tick(turns, float(last), float(self.update_every))
        self._live.suspect = ""
        self._adopt()
        for key, slot in self._wide.keys(self.ema_model):
            if key in self._loaded and self._loaded[key].shape == slot.shape:
                slot.copy_(self._loaded[key])
        self._loaded = {}


@open_swaps.in_turn
def _save_slots(module: EMA, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Put float32 averages under the keys of narrow weights; raises in a block on `ema_model`."""
    open_swaps.refuse_swapped("EMA.state_dict", module._carrier.tracked)
    if module._wide:
        module._follow_second("EMA.state_dict", everywhere=True)
    for key, slot in module._wide.keys(module.ema_model):
        state[f"{prefix}ema_model.{key}"] = slot.detach()


def _read_state(module: EMA, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Takes the counters, and notes float32 averages; raises `ValueError` before anything is loaded."""
    second.take_counters(state, prefix, {"initted": module.initted, "step": module.step})
    keys = {key: f"{prefix}ema_model.{key}" for key, _ in module._wide.keys(module.ema_model)}
    module._loaded = {key: state[long] for key, long in keys.items() if long in state}
