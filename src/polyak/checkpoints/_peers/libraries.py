"""Libraries that average: ema-pytorch, torch's AveragedModel, torch_ema, diffusers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyak._checks import is_integer
from polyak._lazy import LazyTensors
from polyak.checkpoints._checkpoint import Checkpoint, Clock
from polyak.checkpoints._names import named, under
from polyak.checkpoints._peers.common import (
    Found,
    count,
    flag,
    is_state,
    number,
    state,
    tensors,
)
from polyak.checkpoints._sniff import POST_HOC
from polyak.checkpoints._torch_save.files import StoredTensors
from polyak.rules import AVERAGE, Rule
from polyak.theory import _peer_rules as peer_rules

_EMA, _ONLINE = "ema_model.", "online_model."
_MEMBER = re.compile(r"ema_models\.(\d+)\.")
_OF_LIST = re.compile(r"(\d+)\.initted")


def module_state(found: Found) -> Checkpoint | None:
    """The state dict of a module that averages, in any kind of file."""
    if isinstance(found.top, dict) and is_integer(found.top.get("n_averaged"), 0):
        return _counted(found, found.top)
    if not is_state(found.top) or not _tells_average(found.top):
        return None
    saved = state(found.top)
    readings = (reading(found.path, saved) for reading in _READINGS)
    return next((reading for reading in readings if reading is not None), None)


def _counted(found: Found, top: dict[str, Any]) -> Checkpoint | None:
    """An `AveragedModel` whose counter was saved as a number."""
    rest = {key: part for key, part in top.items() if key != "n_averaged"}
    if not is_state(rest) or not all(key.startswith("module.") for key in rest):
        return None
    clock = Clock(count("n_averaged", top["n_averaged"]))
    averages = {AVERAGE: under(state(rest), "module.")}
    return Checkpoint(found.path, "averaged-model", None, averages, {}, clock)


def ema_pytorch(path: Path, held: LazyTensors) -> Checkpoint | None:
    """ema-pytorch's `EMA`, and polyak's: initted, step, ema_model.*, perhaps online_model.*

    `KarrasEMA` saves the same keys. Its clock runs one update ahead: for it, and update_every=1, the
    clock is `Clock(count, "updates", ahead=1)`.
    """
    if not _is_ema(held) or _is_snapshot(held):
        return None
    live = under(held, _ONLINE)
    clock = Clock(count("step", held["step"]), "calls")
    return Checkpoint(path, "ema-pytorch", live or None, {AVERAGE: under(held, _EMA)}, {}, clock)


def snapshot(path: Path, held: LazyTensors) -> Checkpoint | None:
    """A snapshot of ema-pytorch's `PostHocEMA`: a `KarrasEMA` whose counters are cast as its weights.

    The step is taken from the file's name, `<index>.<step>.pt`: float16 rounds it beyond 2048.
    """
    if not _is_ema(held) or not _is_snapshot(held):
        return None
    name = POST_HOC.fullmatch(path.name)
    clock = Clock(int(name[2]), "updates", ahead=1) if name else None
    return Checkpoint(path, "post-hoc-ema", None, {AVERAGE: under(held, _EMA)}, {}, clock)


def post_hoc(path: Path, held: LazyTensors) -> Checkpoint | None:
    """The state dict of a `PostHocEMA`: ema_models.<i>. and a `KarrasEMA`. Averages are named "i"."""
    indices = {match[1] for key in held if (match := _MEMBER.match(key))}
    if not indices:
        return None
    members = sorted(indices, key=int)
    steps = {count(key, held[key]) for key in (f"ema_models.{i}.step" for i in members)}
    averages = {i: under(held, f"ema_models.{i}.{_EMA}") for i in members}
    clock = Clock(steps.pop(), "updates", ahead=1) if len(steps) == 1 else None
    return Checkpoint(path, "post-hoc-ema", None, averages, {}, clock)


def several(path: Path, held: LazyTensors) -> Checkpoint | None:
    """A `ModuleList` of ema-pytorch's `EMA`s, as imagen-pytorch has one for each U-Net: averages "i"."""
    members = sorted(match[1] for key in held if (match := _OF_LIST.fullmatch(key)))
    readings = [ema_pytorch(path, under(held, f"{i}.")) for i in members]
    found = {i: one for i, one in zip(members, readings, strict=True) if one is not None}
    if not found or len(found) < len(members):
        return None
    averages = {i: one.averages[AVERAGE] for i, one in found.items()}
    clocks = {one.clock for one in found.values()}
    clock = clocks.pop() if len(clocks) == 1 else None
    return Checkpoint(path, "ema-pytorch", None, averages, {}, clock)


def averaged_model(path: Path, held: LazyTensors) -> Checkpoint | None:
    """`torch.optim.swa_utils.AveragedModel`: n_averaged, module.*; EMA or SWA, it does not say."""
    if "n_averaged" not in held:
        return None
    averages = {AVERAGE: under(held, "module.")}
    clock = Clock(count("n_averaged", held["n_averaged"]))
    return Checkpoint(path, "averaged-model", None, averages, {}, clock)


def torch_ema(found: Found) -> Checkpoint | None:
    """torch_ema's `ExponentialMovingAverage`: decay, num_updates, shadow_params, collected_params.

    The weights at construction are its first update, which it does not count. The collected
    parameters are live weights of some earlier time, so they are left out.
    """
    top = found.top
    if not {"decay", "num_updates", "shadow_params"} <= set(top):
        return None
    average = _unnamed(found, "shadow_params")
    clock, decay = None, number("decay", top.get("decay"))
    if top["num_updates"] is not None:
        clock = Clock(count("num_updates", top.get("num_updates")), ahead=1)
    rules = {} if decay == 1 else {AVERAGE: peer_rules.counted(decay, clock is not None)}
    return Checkpoint(found.path, "torch-ema", None, {AVERAGE: average}, rules, clock)


def diffusers(found: Found) -> Checkpoint | None:
    """diffusers' `EMAModel`: the settings (`diffusers_rules`), optimization_step, shadow_params."""
    top = found.top
    if not {"optimization_step", "decay", "shadow_params"} <= set(top):
        return None
    averages = {AVERAGE: _unnamed(found, "shadow_params")}
    clock = Clock(count("optimization_step", top.get("optimization_step")))
    return Checkpoint(found.path, "diffusers", None, averages, diffusers_rules(top), clock)


def diffusers_rules(settings: Mapping[str, Any]) -> dict[str, Rule]:
    """The rule of an `EMAModel` with these settings, if one of ours is exactly it."""
    low = number("min_decay", settings.get("min_decay"))
    high = max(number("decay", settings.get("decay")), low)
    start = count("update_after_step", settings.get("update_after_step"))
    shape = None
    if flag("use_ema_warmup", settings.get("use_ema_warmup")):
        shape = (
            number("inv_gamma", settings.get("inv_gamma")),
            number("power", settings.get("power")),
        )
    rule = peer_rules.diffusers(low, high, start, shape) if shape or high < 1 else None
    return {} if rule is None else {AVERAGE: rule}


def _unnamed(found: Found, key: str) -> LazyTensors:
    """The tensors of a list, by the names that were given."""
    return named(StoredTensors(tensors(key, found.top[key])), found.names)


def _tells_average(keys: Iterable[str]) -> bool:
    return any(
        key in ("initted", "n_averaged") or _MEMBER.match(key) or _OF_LIST.fullmatch(key)
        for key in keys
    )


def _is_ema(held: LazyTensors) -> bool:
    return {"initted", "step"} <= set(held) and any(key.startswith(_EMA) for key in held)


def _is_snapshot(held: LazyTensors) -> bool:
    """Whether the flag was cast to the weights' dtype; the article's class has one of shape (1,)."""
    shape, dtype = held.specs["initted"]
    return dtype.is_floating_point and shape == ()


_Reading = Callable[[Path, LazyTensors], Checkpoint | None]
_READINGS: tuple[_Reading, ...] = (post_hoc, snapshot, ema_pytorch, several, averaged_model)


def described(found: Found) -> Checkpoint | None:
    """An average that describes itself by its own keys, wherever it lies."""
    return torch_ema(found) or diffusers(found) or module_state(found)


def clock_beside(held: LazyTensors, keys: Mapping[str, str]) -> Clock | None:
    """The clock beside an average: that of `AveragedModel`, ema-pytorch's `EMA` or `LitEma`."""
    if "n_averaged" in keys:
        return Clock(count("n_averaged", held[keys["n_averaged"]]))
    if {"initted", "step"} <= keys.keys():
        return Clock(count("step", held[keys["step"]]), "calls")
    counted = held[keys["num_updates"]] if "num_updates" in keys else None
    if counted is None or counted.numel() != 1 or int(counted) < 0:
        return None
    return Clock(int(counted), ahead=1)


def rule_beside(held: LazyTensors, keys: Mapping[str, str]) -> Rule | None:
    """The rule of a `LitEma`: the decay is min(decay, (1 + n) / (10 + n)) if it counts its updates."""
    if not {"decay", "num_updates"} <= keys.keys():
        return None
    decay = held[keys["decay"]]
    if decay.numel() != 1 or not 0 <= float(decay) < 1:
        return None
    exact = float(str(np.float32(float(decay))))  # .9999 was rounded to a float32
    return peer_rules.counted(exact, clock_beside(held, keys) is not None)
