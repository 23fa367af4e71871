"""Lightning's checkpoints: of its averaging callbacks, of NeMo's, and of none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from polyak.checkpoints._checkpoint import Checkpoint, Clock, Weights
from polyak.checkpoints._names import named
from polyak.checkpoints._peers.found import Found, count, is_state, number, part, tensors, weights
from polyak.rules import AVERAGE, Exponential, Rule


def lightning(found: Found) -> Checkpoint | None:
    """A Lightning checkpoint, whichever callback made the average."""
    if not {"pytorch-lightning_version", "state_dict"} <= set(found.top):
        return None
    readings = (reading(found) for reading in (_weight_averaging, _nemo, _stochastic, _plain))
    return next(reading for reading in readings if reading is not None)


def _plain(found: Found) -> Checkpoint:
    return Checkpoint(found.path, "lightning", weights(found.top["state_dict"]), {})


def _weight_averaging(found: Found) -> Checkpoint | None:
    """`WeightAveraging`, `EMAWeightAveraging`: the average under state_dict, with averaging_state.

    Of two such callbacks the second saves the first one's average as its live weights, which are
    then in no file.
    """
    top = found.top
    if not {"averaging_state", "current_model_state"} <= set(top):
        return None
    callbacks = [state for state in part(top, "callbacks").values() if _is_averaging(state)]
    live = weights(top["current_model_state"]) if len(callbacks) < 2 else None
    clock = Clock(count("n_averaged", top["averaging_state"].get("n_averaged")))
    average = weights(top["state_dict"])
    return Checkpoint(found.path, "lightning", live, {AVERAGE: average}, {}, clock)


def _is_averaging(state: object) -> bool:
    return isinstance(state, Mapping) and set(state) == {"latest_update_step"}


def _stochastic(found: Found) -> Checkpoint | None:
    """`StochasticWeightAveraging`: the average lies in the callback's state."""
    for state in part(found.top, "callbacks").values():
        if isinstance(state, Mapping) and is_state(state.get("average_model_state")):
            averages = {AVERAGE: weights(state["average_model_state"])}
            clock = Clock(count("n_averaged", state.get("n_averaged")))
            live = weights(found.top["state_dict"])
            return Checkpoint(found.path, "lightning", live, averages, {}, clock)
    return None


def _nemo(found: Found) -> Checkpoint | None:
    """NeMo's `EMA`: in each optimizer's state the averages of its parameters, in its order.

    In the twin that is named `-EMA` they are the model's own weights: the live ones are elsewhere.
    `decay` is that of one update, every `every_n_steps` steps, so the rule's, of one step, is its root.
    """
    optimizers = found.top.get("optimizer_states")
    states = optimizers if isinstance(optimizers, list) else []
    held = [state for state in states if isinstance(state, Mapping) and "ema" in state]
    if not held:
        return None
    averaged = [tensor for state in held for tensor in tensors("ema", state["ema"])]
    live, path = weights(found.top["state_dict"]), found.path
    clock, rules = _nemo_clock(held[0]), _nemo_rules(held)
    if _are_within(averaged, live):
        return Checkpoint(path, "nemo", None, {AVERAGE: live}, rules, clock)
    averages = {AVERAGE: named(averaged, found.names)}
    return Checkpoint(path, "nemo", live, averages, rules, clock)


def _nemo_clock(state: Mapping[str, Any]) -> Clock:
    return Clock(count("current_step", state.get("current_step")), "calls")


def _nemo_rules(held: Sequence[Mapping[str, Any]]) -> dict[str, Rule]:
    """The rule, where all optimizers have one and the same."""
    decays = {number("decay", state.get("decay")) for state in held}
    cadences = {count("every_n_steps", state.get("every_n_steps")) for state in held}
    (decay, *others), (every, *differ) = decays, cadences
    if others or differ or decay == 1 or every == 0:
        return {}
    return {AVERAGE: Exponential(decay ** (1 / every))}


def _are_within(averaged: Sequence[Tensor], live: Weights) -> bool:
    """Whether tensors are those of a state dict: a file holds what is shared once."""
    places = {live[name].data_ptr() for name in live}
    return all(tensor.data_ptr() in places for tensor in averaged)
