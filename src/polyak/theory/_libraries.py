"""The constructor call that gives the same average in other libraries.

The same decay means different averages in different libraries: they differ in the warm-up, in what
the first update does and in what they start from. Each function below states one library's update
rule, read from its source, and says when a rule of ours is one of its settings.

Versions: torch 2.13, ema-pytorch 0.8.3, torch-ema 0.3, diffusers 0.42.1, timm 1.0.31, lightning
2.6.6, edm2 4bf8162. The tests run the first four against `theory.profile`. They do not run timm,
lightning and edm2, whose formulas were only read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from polyak.decays import Constant, InversePower, Polynomial, Ratio, Schedule
from polyak.rules import AVERAGE, ArticleEMA, Exponential, Power, Rule, Tail, Tick, Uniform
from polyak.specs import as_rule

# How to use a call, for libraries where it does not match ours update by update.
CONVENTIONS = {
    "torch_ema.ExponentialMovingAverage": "construct it where the rule makes its first update",
    "timm.utils.ModelEmaV3": "update(model, step=n), n = 1, 2, ...",
    "training.phema.PowerFunctionEMA": "edm2's own repository; time counts images",
}


def equivalents(rule: Rule | str) -> dict[str, str]:
    """Return library -> the call whose average equals this rule's at every update.

    Libraries without such a call are left out. Each value is Python source that starts with its key,
    for a rule updated after every step (`every=1`); it needs the library's package imported and
    `model` in scope. Call the result's update (`update`, `update_parameters`, `step`) where ours is
    called, with the exceptions in `CONVENTIONS`:

    - `torch_ema` counts the weights at construction as the first update: construct it where the
      rule makes its first, and update it from the second on.
    - `timm` takes the number of the update: `ema.update(model, step=n)`, n from 1. Without `step` it
      ignores its warm-up and counts from construction.

    ema_pytorch's `KarrasEMA` differs from `Power`: its clock runs one update ahead, so the first
    weights count twice, and it ignores `update_every`.

    >>> for call in equivalents("exponential(0.99)").values():
    ...     print(call)
    ema_pytorch.EMA(model, beta=0.99, min_value=0.99, update_after_step=0, update_every=1)
    torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.99, use_num_updates=False)
    torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    diffusers.training_utils.EMAModel(model.parameters(), decay=0.99, min_decay=0.99)
    timm.utils.ModelEmaV3(model, decay=0.99)
    lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.99)
    >>> equivalents("window(100)")
    {}

    This holds for floating-point parameters; the libraries treat buffers differently. No library
    has a half-life or span above about 10^10: the decay has too few digits next to 1.
    """
    rule = as_rule(rule)
    calls = {name: arguments(rule) for name, arguments in _LIBRARIES.items()}
    return {name: f"{name}({call})" for name, call in calls.items() if call is not None}


class _Ramp(NamedTuple):
    """Copies up to update `start` + 1, then a ramp of decays.

    With e = t - start - 1 the decay of update t is 1 - (1 + e / inv_gamma) ** -power, clamped to
    [low, high].
    """

    inv_gamma: float
    power: float
    low: float
    high: float
    start: int

    @property
    def constant(self) -> bool:
        return self.low == self.high


def _ramp(rule: Rule) -> _Ramp | None:
    """The rule as a ramp, or None."""
    match rule:
        case Uniform():
            return _Ramp(1.0, 1.0, 0.0, 1.0, 0)
        case Exponential(decay=decay, debias=False) if _has_one_decay(rule):
            return _ramp_of(decay)
        case ArticleEMA(first_copy=False):
            bounds = (rule.min_value, rule.beta)
            return _Ramp(rule.inv_gamma, rule.power, *bounds, rule.update_after_step)
        case Tail(rule=(Uniform() | Exponential()) as inner, start=start):
            ramp = _ramp(inner)
            return ramp and ramp._replace(start=math.floor(start))
    return None


def _has_one_decay(rule: Exponential) -> bool:
    """Whether the decay, which the libraries take, has enough digits for the rule's half-life."""
    if isinstance(rule.decay, Schedule) or rule.decay == 0:
        return True
    twice = rule.fractions(Tick(2, 2.0, 1.0))[AVERAGE]
    return math.isclose(1 - rule.decay, twice, rel_tol=1e-6)


def _ramp_of(decay: float | Schedule) -> _Ramp | None:
    match decay:
        case InversePower():
            bounds = (decay.min_decay, decay.max_decay)
            return _Ramp(decay.inv_gamma, decay.power, *bounds, 0)
        case Polynomial(exponent=exponent):
            return _Ramp(exponent + 1, 1.0, 0.0, 1.0, 0)
        case Constant(decay=value) | (float() | int() as value):
            return _Ramp(1.0, 1.0, value, value, 0)
    return None


def _constant(rule: Rule) -> float | None:
    """The decay of an EMA without warm-up or start, or None."""
    ramp = _ramp(rule)
    return ramp.low if ramp and ramp.constant and ramp.start == 0 else None


def _ratio(rule: Rule) -> tuple[float, int] | None:
    """(largest decay, start) of an EMA with the warm-up (1 + n) / (10 + n), or None."""
    match rule:
        case Exponential(decay=Ratio(max_decay=most)):
            return most, 0
        case Tail(rule=Exponential(decay=Ratio(max_decay=most)), start=start):
            return most, math.floor(start)
    return None


def _ema_pytorch(rule: Rule) -> str | None:
    """Call 1 copies, as does call t while t - 1 <= update_after_step; then the ramp's decay.

    ema-pytorch computes it in torch's default dtype: float32 rounds it at the 8th digit. `beta=1`
    freezes the average there, so the largest decay below 1 takes its place.
    """
    ramp = _ramp(rule)
    if ramp is None:
        return None
    beta, tail = min(ramp.high, math.nextafter(1, 0)), f"{ramp.start}, update_every=1"
    if ramp.constant:
        return f"model, beta={beta}, min_value={beta}, update_after_step={tail}"
    shape = f"inv_gamma={ramp.inv_gamma}, power={ramp.power}, min_value={ramp.low}"
    return f"model, beta={beta}, {shape}, update_after_step={tail}"


def _torch_ema(rule: Rule) -> str | None:
    """Call n: decay min(decay, (1 + n) / (10 + n)), or `decay` if not use_num_updates; no copy."""
    if ratio := _ratio(rule):
        return f"model.parameters(), decay={ratio[0]}" if ratio[1] == 0 else None
    decay = _constant(rule)
    return decay if decay is None else f"model.parameters(), decay={decay}, use_num_updates=False"


def _averaged_model(rule: Rule) -> str | None:
    """The first call copies; then the mean, or lerp by 1 - decay."""
    if isinstance(rule, Uniform):
        return "model"
    decay = _constant(rule)
    make = "torch.optim.swa_utils.get_ema_multi_avg_fn"
    return decay if decay is None else f"model, multi_avg_fn={make}({decay})"


def _diffusers(rule: Rule) -> str | None:
    """Call t copies while s = t - update_after_step - 1 <= 0; then (1 + s) / (10 + s), or the ramp."""
    if ratio := _ratio(rule):
        most, start = ratio
        return f"model.parameters(), decay={most}" + _unless_default("update_after_step", start)
    ramp = _ramp(rule)
    if ramp is None:
        return None
    call = f"model.parameters(), decay={ramp.high}"
    if not ramp.constant:
        call += f", use_ema_warmup=True, inv_gamma={ramp.inv_gamma}, power={ramp.power}"
    call += _unless_default("min_decay", ramp.low)
    return call + _unless_default("update_after_step", ramp.start)


def _timm(rule: Rule) -> str | None:
    """`update(model, step=t)` copies while t - update_after_step - 1 <= 0; then the ramp's decay."""
    ramp = _ramp(rule)
    if ramp is None:
        return None
    call = f"model, decay={ramp.high}"
    if not ramp.constant:
        call += f", use_warmup=True, warmup_gamma={ramp.inv_gamma}, warmup_power={ramp.power}"
        call += _unless_default("min_decay", ramp.low)
    return call + _unless_default("update_after_step", ramp.start)


def _unless_default(name: str, value: float) -> str:
    return f", {name}={value}" if value else ""


def _lightning_ema(rule: Rule) -> str | None:
    """`AveragedModel` after every optimizer step: the first copies, then lerp by 1 - decay."""
    decay = _constant(rule)
    return decay if decay is None else f"decay={decay}"


def _lightning_mean(rule: Rule) -> str | None:
    """`AveragedModel` after every optimizer step, with its default: the mean."""
    return "" if isinstance(rule, Uniform) else None


def _edm2(rule: Rule) -> str | None:
    """decay (1 - dt / t) ** (gamma + 1), t the images after the batch: 0 at the first update.

    It takes the relative std. A gamma below -0.38 has the same relative std as one above.
    """
    if not isinstance(rule, Power) or rule.gamma < -0.38:
        return None
    g = rule.gamma
    return f"model, stds=[{math.sqrt(g + 1) / ((g + 2) * math.sqrt(g + 3))}]"


_LIBRARIES: dict[str, Callable[[Rule], str | None]] = {
    "ema_pytorch.EMA": _ema_pytorch,
    "torch_ema.ExponentialMovingAverage": _torch_ema,
    "torch.optim.swa_utils.AveragedModel": _averaged_model,
    "diffusers.training_utils.EMAModel": _diffusers,
    "timm.utils.ModelEmaV3": _timm,
    "lightning.pytorch.callbacks.EMAWeightAveraging": _lightning_ema,
    "lightning.pytorch.callbacks.WeightAveraging": _lightning_mean,
    "training.phema.PowerFunctionEMA": _edm2,
}
