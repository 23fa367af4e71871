"""Dictionaries that training scripts save: a state dict and an average's state, each under a key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from polyak.checkpoints._checkpoint import Checkpoint, Weights
from polyak.checkpoints._names import Renamed
from polyak.checkpoints._peers.found import Found, is_state, weights
from polyak.checkpoints._peers.modules import module_state
from polyak.checkpoints._peers.positional import diffusers, torch_ema
from polyak.rules import AVERAGE

LIVE_KEYS = ("", "state_dict", "model", "model_state_dict", "net", "weights", "module", "params")
AVERAGE_KEYS = ("ema", "ema_state_dict", "ema_model", "ema_model_state_dict", "params_ema")
_TORCHTITAN = re.compile(r"(?:.*\.)?state\.(.+)\.ema_params")


def nested(found: Found) -> Checkpoint | None:
    """A dictionary with live weights, an average, or both, each under one of the usual keys.

    An average that tells its own layout, such as the state of a `torch_ema`, may lie under any key.
    """
    live = _first(found, LIVE_KEYS)
    inner = _inner(found)
    if inner is not None:
        return replace(inner, live=inner.live or live)
    average = _first(found, AVERAGE_KEYS)
    if live is None and average is None:
        return None
    return Checkpoint(found.path, found.plain, live, {} if average is None else {AVERAGE: average})


def torchtitan(found: Found) -> Checkpoint | None:
    """torchtitan's folders: the averages are an optimizer's state, `state.<name>.ema_params`."""
    parts = found.top.values() if isinstance(found.top, dict) else [found.top]
    for held in parts:
        if isinstance(held, dict) or not isinstance(held, Mapping):
            continue
        keys = {match[1]: key for key in held if (match := _TORCHTITAN.fullmatch(key))}
        if keys:
            averages = {AVERAGE: weights(Renamed(held, keys))}
            return Checkpoint(found.path, "torchtitan", _first(found, LIVE_KEYS), averages)
    return None


def _first(found: Found, keys: Sequence[str]) -> Weights | None:
    """The state dict under the first of some keys that has one."""
    states = (found.top[key] for key in keys if is_state(found.top.get(key)))
    return next(map(weights, states), None)


def _inner(found: Found) -> Checkpoint | None:
    """The one part that is an average's state by its own keys."""
    parts = {key: held for key, held in found.top.items() if isinstance(held, Mapping)}
    read = {key: _of_average(replace(found, top=held)) for key, held in parts.items()}
    readings = {key: reading for key, reading in read.items() if reading is not None}
    if len(readings) > 1:
        raise ValueError(
            f"{', '.join(map(repr, readings))} are each an average with its clock: save the one that "
            "is wanted into a file of its own"
        )
    return next(iter(readings.values()), None)


def _of_average(found: Found) -> Checkpoint | None:
    return torch_ema(found) or diffusers(found) or module_state(found)
