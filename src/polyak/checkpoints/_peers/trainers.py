"""Checkpoints of training frameworks: which part is the average, and which the live weights."""

from __future__ import annotations

from polyak.checkpoints._checkpoint import Checkpoint, Clock, Weights
from polyak.checkpoints._names import under
from polyak.checkpoints._peers.found import Found, count, flag, is_state, number, part, weights
from polyak.rules import AVERAGE, Power, Rule


def timm(found: Found) -> Checkpoint | None:
    """timm: state_dict_ema beside state_dict; elsewhere model_ema beside model."""
    for average, live in (("state_dict_ema", "state_dict"), ("model_ema", "model")):
        held = found.top.get(average)
        if is_state(held):
            beside = weights(found.top[live]) if is_state(found.top.get(live)) else None
            return Checkpoint(found.path, "timm", beside, {AVERAGE: weights(held)})
    return None


def composer(found: Found) -> Checkpoint | None:
    """Composer: state.model, and among state.algorithms its `EMA`, which holds the other weights.

    While it saves, the model has the average and the algorithm the live weights; where it does not
    (ema_weights_active is false) they lie the other way. Frozen parameters are the model's alone.
    """
    state = part(found.top, "state")
    if "algorithms" not in state or not is_state(state.get("model")):
        return None
    model = weights(state["model"])
    algorithm = part(dict(state["algorithms"]), "EMA")
    if not algorithm or not flag("ema_started", algorithm.get("ema_started")):
        return Checkpoint(found.path, "composer", model, {})
    held = algorithm["ema_model"]
    kept = {**part(held, "named_parameters_dict"), **part(held, "named_buffers_dict")}
    other: Weights = {**model, **weights(kept)}
    active = flag("ema_weights_active", algorithm.get("ema_weights_active"))
    live, average = (other, model) if active else (model, other)
    return Checkpoint(found.path, "composer", live, {AVERAGE: average})


def mmengine(found: Found) -> Checkpoint | None:
    """MMEngine: the average under state_dict, the live weights under ema_state_dict, exchanged."""
    held = part(found.top, "ema_state_dict")
    if "steps" not in held or not is_state(found.top.get("state_dict")):
        return None
    live, average = under(held, "module."), weights(found.top["state_dict"])
    clock = Clock(count("steps", held["steps"]), "calls")
    return Checkpoint(found.path, "mmengine", live, {AVERAGE: average}, {}, clock)


def edm2(found: Found) -> Checkpoint | None:
    """EDM2's training state: state.cur_nimg, net, and under ema the averages by relative std.

    Its clock counts images. Where there is one average by its half-life, `ema` is that alone.
    """
    top, held = found.top, part(found.top, "ema")
    if "cur_nimg" not in part(top, "state") or not is_state(top.get("net")) or not held:
        return None
    clock = Clock(count("cur_nimg", top["state"]["cur_nimg"]), "time")
    live = weights(top["net"])
    if "stds" not in held:
        return Checkpoint(found.path, "edm2", live, {AVERAGE: weights(held)}, {}, clock)
    stds = [number("stds", std) for std in held["stds"]]
    names = [AVERAGE] if len(stds) == 1 else [str(std) for std in stds]
    averages = dict(zip(names, map(weights, held["emas"]), strict=True))
    rules: dict[str, Rule] = dict(zip(names, map(Power.from_relative_std, stds), strict=True))
    return Checkpoint(found.path, "edm2", live, averages, rules, clock)
