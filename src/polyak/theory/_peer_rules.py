"""The rules of other libraries, from the settings that their calls and their files both have."""

from __future__ import annotations

from polyak.decays import InversePower, Ratio
from polyak.rules import Exponential, Rule, Tail

_FIRST_RATIO = 2 / 11  # (1 + s) / (10 + s) at s = 1, the first decay that is not a copy


def begun(rule: Rule, start: float) -> Rule:
    """A rule that copies until step `start`, and then begins."""
    return Tail(rule, start) if start else rule


def every_step(decay: float, every: int) -> Exponential:
    """The EMA with this decay over `every` steps: ours is the decay of one step, its root."""
    return Exponential(decay ** (1 / every) if every > 1 else decay)


def counted(decay: float, counts: bool) -> Exponential:
    """The EMA of torch_ema and `LitEma`: with a counter, the decay is min(decay, (1 + n) / (10 + n))."""
    return Exponential(Ratio(decay) if counts else decay)


def diffusers(
    low: float, high: float, start: int, shape: tuple[float, float] | None
) -> Rule | None:
    """The rule of diffusers' `EMAModel`; None if no rule of ours is exactly it.

    Step t copies while s = t - start - 1 <= 0; then the decay is (1 + s) / (10 + s), or with the shape
    (inv_gamma, power) of use_ema_warmup 1 - (1 + s / inv_gamma) ** -power, within [low, high].
    """
    if shape is not None:
        rule = Exponential(InversePower(*shape, min_decay=low, max_decay=high))
    elif low == high:
        rule = Exponential(high)
    elif low <= _FIRST_RATIO:
        rule = Exponential(Ratio(high))
    else:
        return None
    return begun(rule, start)
