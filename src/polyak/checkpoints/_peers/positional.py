"""Averages whose tensors have an order and no names: torch_ema's and diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyak.checkpoints._checkpoint import Checkpoint, Clock
from polyak.checkpoints._names import named
from polyak.checkpoints._peers.found import Found, count, flag, number, tensors
from polyak.decays import InversePower, Ratio
from polyak.rules import AVERAGE, Exponential, Rule, Tail

_FIRST_RATIO = 2 / 11  # (1 + s) / (10 + s) at s = 1, the first decay that is no copy


def torch_ema(found: Found) -> Checkpoint | None:
    """torch_ema's `ExponentialMovingAverage`: decay, num_updates, shadow_params, collected_params.

    The weights at construction are its first update, which it does not count. The collected
    parameters are live weights of some earlier time, so they are left out.
    """
    top = found.top
    if not {"decay", "num_updates", "shadow_params"} <= set(top):
        return None
    average = named(tensors("shadow_params", top["shadow_params"]), found.names)
    clock, decay = None, number("decay", top.get("decay"))
    if top["num_updates"] is not None:
        clock = Clock(count("num_updates", top.get("num_updates")), ahead=1)
    rules = {} if decay == 1 else {AVERAGE: Exponential(Ratio(decay) if clock else decay)}
    return Checkpoint(found.path, "torch-ema", None, {AVERAGE: average}, rules, clock)


def diffusers(found: Found) -> Checkpoint | None:
    """diffusers' `EMAModel`: the settings (`diffusers_rules`), optimization_step, shadow_params."""
    top = found.top
    if not {"optimization_step", "decay", "shadow_params"} <= set(top):
        return None
    average = named(tensors("shadow_params", top["shadow_params"]), found.names)
    clock = Clock(count("optimization_step", top.get("optimization_step")))
    averages = {AVERAGE: average}
    return Checkpoint(found.path, "diffusers", None, averages, diffusers_rules(top), clock)


def diffusers_rules(settings: Mapping[str, Any]) -> dict[str, Rule]:
    """The rule of an `EMAModel`, where one of ours is exactly it.

    Step t copies while s = t - update_after_step - 1 <= 0; then the decay is (1 + s) / (10 + s), or
    1 - (1 + s / inv_gamma) ** -power with use_ema_warmup, at most `decay`, at least `min_decay`.
    """
    low = number("min_decay", settings.get("min_decay"))
    high = max(number("decay", settings.get("decay")), low)
    start = count("update_after_step", settings.get("update_after_step"))
    if flag("use_ema_warmup", settings.get("use_ema_warmup")):
        shape = (
            number("inv_gamma", settings.get("inv_gamma")),
            number("power", settings.get("power")),
        )
        rule = Exponential(InversePower(*shape, min_decay=low, max_decay=high))
    elif low == high < 1:
        rule = Exponential(high)
    elif low <= _FIRST_RATIO and high < 1:
        rule = Exponential(Ratio(high))
    else:
        return {}
    return {AVERAGE: Tail(rule, start) if start else rule}
