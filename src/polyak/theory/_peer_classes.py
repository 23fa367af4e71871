"""Classes of other libraries: their arguments with defaults, and the rule that these mean.

Versions: torch 2.13, ema-pytorch 0.8.3, torch-ema 0.3, diffusers 0.42.1, timm 1.0.31, lightning 2.6.6,
ignite 0.5.5, composer 0.32.1, NeMo 3.0.0, mmengine 0.10.7, fairseq 0.12.2, TRL 1.16, edm2 4bf8162. The
tests run the libraries that install; the formulas of timm, composer, NeMo, mmengine, fairseq, TRL and
edm2 were only read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from polyak._checks import require
from polyak.decays import HalfLifeRamp, InversePower
from polyak.rules import ArticleEMA, Bema, Exponential, Power, Rule, Uniform
from polyak.theory._calls import Call, count, number
from polyak.theory._peer_rules import begun, counted, diffusers, every_step

_AT_CONSTRUCTION = "its first average is the weights at construction: call update() before training"
_UNSCALED = "it does not rescale its decay when it updates less often: this decay is its {k}th root"
_AHEAD = "its clock runs one update ahead, so its first weights count twice"
_IMAGES = "its time counts images: call update(elapsed=batch_size)"
_IN_LIGHTNING = "in Lightning, use polyak.integrations.lightning.AveragerCallback"


class Meaning(NamedTuple):
    """The meaning of another library's call here; `changes` says what is different, a sentence each."""

    rule: Rule | Mapping[str, Rule]
    every: int = 1
    buffers: str = "auto"
    changes: tuple[str, ...] = ()


def _constant(decay: float, every: int = 1, start: float = 0, **options: Any) -> Meaning:
    """An EMA that moves by `1 - decay` once in `every` steps."""
    changes = options.pop("changes", ())
    if every > 1:
        changes = (*changes, _UNSCALED.format(k=every))
    return Meaning(begun(every_step(decay, every), start), every, changes=changes, **options)


def _ramp(
    inv_gamma: float, power: float, low: float, high: float, start: int, every: int, **options: Any
) -> Meaning:
    """A copy up to `start` + 1, then 1 - (1 + e / inv_gamma) ** -power within [low, high]."""
    if low == high:
        return _constant(high, every, start, **options)
    if every > 1:
        rule: Rule = ArticleEMA(high, start, inv_gamma, power, low, first_copy=False)
    else:
        rule = begun(Exponential(InversePower(inv_gamma, power, low, high)), start)
    return Meaning(rule, every, **options)


def _buffers(averaged: bool) -> str:
    return "average" if averaged else "copy"


def _ema_pytorch(model: Any = None, ema_model: Any = None, beta: Any = 0.9999,
                 update_after_step: Any = 100, update_every: Any = 10, inv_gamma: Any = 1.0,
                 power: Any = 2 / 3, min_value: Any = 0.0, **others: Any) -> Meaning:  # fmt: skip
    return _ramp(
        number("inv_gamma", inv_gamma),
        number("power", power),
        number("min_value", min_value),
        number("beta", beta),
        count("update_after_step", update_after_step),
        count("update_every", update_every),
        buffers="average",
    )


def _karras(model: Any = None, sigma_rel: Any = None, gamma: Any = None, ema_model: Any = None,
            update_every: Any = 100, **others: Any) -> Meaning:  # fmt: skip
    every = count("update_every", update_every)
    slow = f"it forgets {every} times too slowly with update_every={every}; ours does not"
    changes = (_AHEAD, slow) if every > 1 else (_AHEAD,)
    return Meaning(_power(sigma_rel, gamma), every, "average", changes)


def _power(sigma_rel: Any, gamma: Any) -> Power:
    if gamma is not None:
        return Power(number("gamma", gamma))
    return Power(relative_std=number("sigma_rel", sigma_rel))


def _post_hoc(model: Any = None, ema_model: Any = None, sigma_rels: Any = None, gammas: Any = None,
              checkpoint_every_num_steps: Any = 1000, update_every: Any = 100,
              **others: Any) -> Meaning:  # fmt: skip
    given = gammas if gammas is not None else sigma_rels
    require(isinstance(given, list | tuple), "sigma_rels", given, "a list of numbers")
    pairs = ((None, value) if gammas is not None else (value, None) for value in given)
    rules = {str(i): _power(*pair) for i, pair in enumerate(pairs)}
    every = count("checkpoint_every_num_steps", checkpoint_every_num_steps)
    changes = (
        f"store snapshots with polyak.Recorder(averager, folder, every={every})",
        "make another average of them with polyak.synthesize",
        _AHEAD,
    )
    return Meaning(rules, count("update_every", update_every), "average", changes)


def _torch_ema(parameters: Any = None, decay: Any = None, use_num_updates: Any = True) -> Meaning:
    value = number("decay", decay)
    return Meaning(counted(value, use_num_updates is True), changes=(_AT_CONSTRUCTION,))


def _averaged_model(model: Any = None, device: Any = None, avg_fn: Any = None,
                    multi_avg_fn: Any = None, use_buffers: Any = False) -> Meaning:  # fmt: skip
    buffers = _buffers(use_buffers is True)
    function = multi_avg_fn if multi_avg_fn is not None else avg_fn
    name = function.name if isinstance(function, Call) else ""
    if function is None or name.endswith(("swa_multi_avg_fn", "swa_avg_fn")):
        return Meaning(Uniform(), buffers=buffers)
    known = name.endswith(("ema_multi_avg_fn", "ema_avg_fn"))
    require(known, "avg_fn", function, "get_ema_avg_fn(decay), whose rule is known")
    given = [*function.args, *function.kwargs.values(), 0.999]
    return Meaning(Exponential(number("decay", given[0])), buffers=buffers)


def _diffusers(parameters: Any = None, decay: Any = 0.9999, min_decay: Any = 0.0,
               update_after_step: Any = 0, use_ema_warmup: Any = False, inv_gamma: Any = 1.0,
               power: Any = 2 / 3, **others: Any) -> Meaning:  # fmt: skip
    low, high = number("min_decay", min_decay), number("decay", decay)
    start = count("update_after_step", update_after_step)
    shape = (
        (number("inv_gamma", inv_gamma), number("power", power)) if use_ema_warmup is True else None
    )
    rule = diffusers(low, high, start, shape)
    if rule is None:
        wanted = "at most 2/11, or decay: no rule of ours has this ramp"
        raise ValueError(f"min_decay is {low!r}, wanted {wanted}")
    late = "its warm-up (1 + n) / (10 + n) is on by default: the decay is reached late"
    return Meaning(rule, changes=(late,) if shape is None and low != high else ())


def _timm(model: Any = None, decay: Any = 0.9999, min_decay: Any = 0.0, update_after_step: Any = 0,
          use_warmup: Any = False, warmup_gamma: Any = 1.0, warmup_power: Any = 2 / 3,
          device: Any = None, foreach: Any = True, exclude_buffers: Any = False,
          **others: Any) -> Meaning:  # fmt: skip
    high, start = number("decay", decay), count("update_after_step", update_after_step)
    without = ("without update(step=...) it ignores its warm-up and update_after_step",)
    buffers = _buffers(exclude_buffers is not True)
    if use_warmup is not True:
        return _constant(high, 1, start, buffers=buffers, changes=without)
    shape = number("warmup_gamma", warmup_gamma), number("warmup_power", warmup_power)
    low = number("min_decay", min_decay)
    return _ramp(*shape, low, high, start, 1, buffers=buffers, changes=without)


def _timm_v2(model: Any = None, decay: Any = 0.9999, device: Any = None) -> Meaning:
    return _constant(number("decay", decay), buffers="average", changes=(_AT_CONSTRUCTION,))


def _lightning_ema(device: Any = None, use_buffers: Any = True, decay: Any = 0.999,
                   update_every_n_steps: Any = 1, update_starting_at_step: Any = None,
                   update_starting_at_epoch: Any = None, **others: Any) -> Meaning:  # fmt: skip
    epoch = update_starting_at_epoch
    require(epoch is None, "update_starting_at_epoch", epoch, "a start in steps")
    start = update_starting_at_step
    return _constant(
        number("decay", decay),
        count("update_every_n_steps", update_every_n_steps),
        0 if start is None else count("update_starting_at_step", start),
        buffers=_buffers(use_buffers is True),
        changes=(_IN_LIGHTNING,),
    )


def _lightning_mean(device: Any = None, use_buffers: Any = True, **others: Any) -> Meaning:
    return Meaning(Uniform(), 1, _buffers(use_buffers is True), (_IN_LIGHTNING,))


def _lightning_swa(swa_lrs: Any = None, swa_epoch_start: Any = 0.8, **others: Any) -> Meaning:
    changes = (
        f"call update() once an epoch, from {swa_epoch_start} of the run on",
        "it also sets the learning rate to swa_lrs; set that in your schedule",
        "it runs one more epoch for BatchNorm: polyak.recalibrate does that",
        _IN_LIGHTNING,
    )
    return Meaning(Uniform(), changes=changes)


def _ignite(model: Any = None, momentum: Any = 0.0002, momentum_warmup: Any = None,
            warmup_iters: Any = None, handle_buffers: Any = "copy") -> Meaning:  # fmt: skip
    changes = [_AT_CONSTRUCTION, "its momentum is 1 - decay"]
    if momentum_warmup is not None:
        changes.append("its linear warm-up of the momentum is left out: no rule of ours has it")
    buffers = _buffers(handle_buffers != "copy")
    return _constant(1 - number("momentum", momentum), buffers=buffers, changes=tuple(changes))


def _composer(half_life: Any = "1000ba", smoothing: Any = None, ema_start: Any = "0.0dur",
              update_interval: Any = None) -> Meaning:  # fmt: skip
    every = 1 if update_interval is None else _batches("update_interval", update_interval)
    changes = (f"it starts at {ema_start}: call update() from there on",)
    if smoothing is not None:
        return _constant(number("smoothing", smoothing), every, buffers="average", changes=changes)
    rule = Exponential(half_life=_batches("half_life", half_life))
    return Meaning(rule, every, "average", changes)


def _batches(name: str, value: Any) -> int:
    counts = isinstance(value, str) and value.endswith("ba") and value[:-2].isdigit()
    require(counts, name, value, 'batches, such as "1000ba"')
    return int(value[:-2])


def _nemo(decay: Any = None, validate_original_weights: Any = False, every_n_steps: Any = 1,
          cpu_offload: Any = False) -> Meaning:  # fmt: skip
    every = count("every_n_steps", every_n_steps)
    return _constant(number("decay", decay), every, changes=(_AT_CONSTRUCTION,))


def _mmengine(model: Any = None, momentum: Any = 0.0002, interval: Any = 1, device: Any = None,
              update_buffers: Any = False) -> Meaning:  # fmt: skip
    return _constant(
        1 - number("momentum", momentum),
        count("interval", interval),
        buffers=_buffers(update_buffers is True),
        changes=("its momentum is 1 - decay",),
    )


def _mmengine_annealing(model: Any = None, momentum: Any = 0.0002, gamma: Any = 100,
                        interval: Any = 1, device: Any = None,
                        update_buffers: Any = False) -> Meaning:  # fmt: skip
    high, every = 1 - number("momentum", momentum), count("interval", interval)
    buffers = _buffers(update_buffers is True)
    return _ramp(number("gamma", gamma), 1.0, 0.0, high, 0, every, buffers=buffers)


def _mmengine_swa(model: Any = None, interval: Any = 1, device: Any = None,
                  update_buffers: Any = False) -> Meaning:  # fmt: skip
    return Meaning(Uniform(), count("interval", interval), _buffers(update_buffers is True))


def _fairseq(ema_decay: Any = 0.9999, ema_start_update: Any = 0, ema_update_freq: Any = 1,
             **others: Any) -> Meaning:  # fmt: skip
    every = count("ema_update_freq", ema_update_freq)
    start = count("ema_start_update", ema_start_update)
    first = () if start else (_AT_CONSTRUCTION,)
    return _constant(number("ema_decay", ema_decay), every, start, changes=first)


def _trl(update_freq: Any = 400, ema_power: Any = 0.5, bias_power: Any = 0.2, lag: Any = 10,
         update_after: Any = 0, multiplier: Any = 1.0, **others: Any) -> Meaning:  # fmt: skip
    scale, after = number("multiplier", multiplier), count("update_after", update_after)
    rule = Bema(
        kappa=number("ema_power", ema_power),
        eta=number("bias_power", bias_power),
        gamma=scale,
        rho=number("lag", lag) + scale * after,
    )
    first = f"make the first update at step {after}, which takes the anchor"
    change = "when it resumes, its average begins again; ours continues"
    return Meaning(rule, count("update_freq", update_freq), changes=(first, change))


def _edm2_power(net: Any = None, stds: Any = (0.05, 0.1)) -> Meaning:
    require(isinstance(stds, list | tuple), "stds", stds, "a list of numbers")
    rules = {f"{number('stds', s):.3f}": Power(relative_std=s) for s in stds}
    return Meaning(rules, changes=(_IMAGES,))


def _edm2_traditional(
    net: Any = None, halflife_Mimg: Any = None, rampup_ratio: Any = 0.09
) -> Meaning:
    half_life = 1e6 * number("halflife_Mimg", halflife_Mimg)
    if rampup_ratio is None:
        return Meaning(Exponential(half_life=half_life), changes=(_AT_CONSTRUCTION, _IMAGES))
    rule = Exponential(HalfLifeRamp(half_life, number("rampup_ratio", rampup_ratio)))
    return Meaning(rule, changes=(_IMAGES,))


CLASSES: dict[str, Callable[..., Meaning]] = {
    "ema_pytorch.EMA": _ema_pytorch,
    "ema_pytorch.KarrasEMA": _karras,
    "ema_pytorch.PostHocEMA": _post_hoc,
    "torch_ema.ExponentialMovingAverage": _torch_ema,
    "torch.optim.swa_utils.AveragedModel": _averaged_model,
    "diffusers.training_utils.EMAModel": _diffusers,
    "timm.utils.ModelEmaV3": _timm,
    "timm.utils.ModelEmaV2": _timm_v2,
    "lightning.pytorch.callbacks.EMAWeightAveraging": _lightning_ema,
    "lightning.pytorch.callbacks.WeightAveraging": _lightning_mean,
    "lightning.pytorch.callbacks.StochasticWeightAveraging": _lightning_swa,
    "ignite.handlers.EMAHandler": _ignite,
    "composer.algorithms.EMA": _composer,
    "nemo.collections.common.callbacks.EMA": _nemo,
    "mmengine.model.ExponentialMovingAverage": _mmengine,
    "mmengine.model.MomentumAnnealingEMA": _mmengine_annealing,
    "mmengine.model.StochasticWeightAverage": _mmengine_swa,
    "fairseq.models.ema.EMAModuleConfig": _fairseq,
    "trl.BEMACallback": _trl,
    "training.phema.PowerFunctionEMA": _edm2_power,
    "training.phema.TraditionalEMA": _edm2_traditional,
}
