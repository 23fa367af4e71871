"""Checkpoints of trainers and training scripts: which part is the average, and which the live weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from polyak._lazy import LazyTensors, joined, renamed
from polyak.checkpoints._checkpoint import Checkpoint, Clock
from polyak.checkpoints._names import NamesNeededError, named, under
from polyak.checkpoints._peers.common import (
    Found,
    count,
    flag,
    is_state,
    number,
    part,
    state,
    tensors,
    weights,
)
from polyak.checkpoints._peers.general import general
from polyak.checkpoints._peers.walk import live_part, walk
from polyak.checkpoints._torch_save.files import StoredTensors
from polyak.checkpoints._torch_save.tensors import StoredTensor
from polyak.rules import AVERAGE, Power, Rule
from polyak.theory._peer_rules import every_step

_TORCHTITAN = re.compile(r"(?:.*\.)?state\.(.+)\.ema_params")


def composer(found: Found) -> Checkpoint | None:
    """Composer: state.model, and among state.algorithms its `EMA`, which holds the other weights.

    While it saves, the model has the average and the algorithm the live weights; where it does not
    (ema_weights_active is false) they lie the other way. Frozen parameters are the model's alone.
    """
    top = part(found.top, "state")
    if "algorithms" not in top or not is_state(top.get("model")):
        return None
    model = weights(top["model"])
    algorithm = part(dict(top["algorithms"]), "EMA")
    if not algorithm or not flag("ema_started", algorithm.get("ema_started")):
        return Checkpoint(found.path, "composer", model, {})
    stored = algorithm["ema_model"]
    kept = {**part(stored, "named_parameters_dict"), **part(stored, "named_buffers_dict")}
    other = joined(model, weights(kept))
    active = flag("ema_weights_active", algorithm.get("ema_weights_active"))
    live, average = (other, model) if active else (model, other)
    return Checkpoint(found.path, "composer", live, {AVERAGE: average})


def opennmt(found: Found) -> Checkpoint | None:
    """OpenNMT: the model's output layer, which it has under `generator.`, lies beside it."""
    if not {"model", "generator", "vocab", "opt"} <= found.top.keys():
        return None
    top = dict(found.top)
    model, generator = top["model"], top.pop("generator")
    if not (is_state(model) and is_state(generator)):
        return None
    own = {f"generator.{name}": tensor for name, tensor in generator.items()}
    return general(replace(found, top={**top, "model": {**model, **own}}))


def mmengine(found: Found) -> Checkpoint | None:
    """MMEngine: the average under state_dict, the live weights under ema_state_dict, exchanged."""
    stored = part(found.top, "ema_state_dict")
    if "steps" not in stored or not is_state(found.top.get("state_dict")):
        return None
    live, average = under(state(stored), "module."), weights(found.top["state_dict"])
    clock = Clock(count("steps", stored["steps"]), "calls")
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


def weight_averaging(found: Found) -> Checkpoint | None:
    """Lightning's `WeightAveraging`, `EMAWeightAveraging`: the average under state_dict, with averaging_state.

    Of two such callbacks the second saves the first one's average as its live weights, which are
    then in no file.
    """
    top = found.top
    if not {"averaging_state", "current_model_state"} <= set(top):
        return None
    callbacks = [one for one in part(top, "callbacks").values() if _is_averaging(one)]
    live = weights(top["current_model_state"]) if len(callbacks) < 2 else None
    clock = Clock(count("n_averaged", top["averaging_state"].get("n_averaged")))
    average = weights(top["state_dict"])
    return Checkpoint(found.path, "lightning", live, {AVERAGE: average}, {}, clock)


def _is_averaging(callback: object) -> bool:
    return isinstance(callback, Mapping) and set(callback) == {"latest_update_step"}


def nemo(found: Found) -> Checkpoint | None:
    """NeMo's `EMA`: the state of each optimizer holds the averages of its parameters, in its order.

    In the second file, named `-EMA`, they are the model's own weights, and live weights are missing.
    `decay` is that of one update, every `every_n_steps` steps, so the rule's, of one step, is its root.
    """
    optimizers = found.top.get("optimizer_states")
    states = optimizers if isinstance(optimizers, list) else []
    with_averages = [one for one in states if isinstance(one, Mapping) and "ema" in one]
    if not with_averages:
        return None
    averaged = [tensor for one in with_averages for tensor in tensors("ema", one["ema"]).values()]
    live, path = weights(found.top["state_dict"]), found.path
    clock = Clock(count("current_step", with_averages[0].get("current_step")), "calls")
    rules = _nemo_rules(with_averages)
    if _are_within(averaged, live):
        return Checkpoint(path, "nemo", None, {AVERAGE: live}, rules, clock)
    by_position = StoredTensors({str(place): tensor for place, tensor in enumerate(averaged)})
    try:
        averages = {AVERAGE: named(by_position, found.names)}
    except NamesNeededError as error:
        return Checkpoint(path, "nemo", live, {}, {}, clock, refused={AVERAGE: str(error)})
    return Checkpoint(path, "nemo", live, averages, rules, clock)


def _nemo_rules(held: Sequence[Mapping[str, Any]]) -> dict[str, Rule]:
    """The rule, where all optimizers have one and the same."""
    decays = {number("decay", one.get("decay")) for one in held}
    cadences = {count("every_n_steps", one.get("every_n_steps")) for one in held}
    (decay, *others), (every, *differ) = decays, cadences
    if others or differ or decay == 1 or every == 0:
        return {}
    return {AVERAGE: every_step(decay, every)}


def _are_within(averaged: Sequence[StoredTensor], live: LazyTensors) -> bool:
    """Whether tensors are those of a state dict: a file holds what is shared once."""
    origins = {origin for name in live for origin in live.origins(name)}
    return all(tensor.identity in origins for tensor in averaged)


def torchtitan(found: Found) -> Checkpoint | None:
    """torchtitan's folders: the averages are an optimizer's state, `state.<name>.ema_params`."""
    parts = found.top.values() if isinstance(found.top, dict) else [found.top]
    for folder in parts:
        if isinstance(folder, dict) or not isinstance(folder, Mapping):
            continue
        keys = {match[1]: key for key in folder if (match := _TORCHTITAN.fullmatch(key))}
        if keys:
            averages = {AVERAGE: weights(renamed(folder, keys))}
            live = live_part(list(walk(found.top)), [])
            return Checkpoint(found.path, "torchtitan", live and weights(live.held), averages)
    return None
