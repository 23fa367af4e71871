"""State dicts of modules that average: ema-pytorch's and torch's, and those of no average at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak.checkpoints._checkpoint import Checkpoint, Clock
from polyak.checkpoints._names import under
from polyak.checkpoints._peers.found import Found, count, is_state, weights
from polyak.rules import AVERAGE

SNAPSHOT = re.compile(r"(\d+)\.(\d+)\.pt")
_EMA, _ONLINE = "ema_model.", "online_model."
_MEMBER = re.compile(r"ema_models\.(\d+)\.")


def module_state(found: Found) -> Checkpoint | None:
    """The state dict of a module that averages, whatever file it lies in."""
    if not is_state(found.top):
        return None
    readings = (reading(found.path, found.top) for reading in _READINGS)
    return next((reading for reading in readings if reading is not None), None)


def plain_state(found: Found) -> Checkpoint | None:
    """A state dict alone: live weights, since nothing says otherwise."""
    if not is_state(found.top):
        return None
    return Checkpoint(found.path, found.plain, weights(found.top), {})


def ema_pytorch(path: Path, held: Mapping[str, Any]) -> Checkpoint | None:
    """ema-pytorch's `EMA`, and polyak's: initted, step, ema_model.*, perhaps online_model.*

    `KarrasEMA` saves the same keys. Its clock runs one update ahead: for it, and update_every=1, the
    clock is `Clock(count, "updates", ahead=1)`.
    """
    if not _is_ema(held) or _is_snapshot(held):
        return None
    live = under(held, _ONLINE)
    clock = Clock(count("step", held["step"]), "calls")
    return Checkpoint(path, "ema-pytorch", live or None, {AVERAGE: under(held, _EMA)}, {}, clock)


def snapshot(path: Path, held: Mapping[str, Any]) -> Checkpoint | None:
    """A snapshot of ema-pytorch's `PostHocEMA`: a `KarrasEMA` whose counters are cast as its weights.

    The step is taken from the file's name, `<index>.<step>.pt`: float16 rounds it beyond 2048.
    """
    if not _is_ema(held) or not _is_snapshot(held):
        return None
    named = SNAPSHOT.fullmatch(path.name)
    clock = Clock(int(named[2]), "updates", ahead=1) if named else None
    return Checkpoint(path, "post-hoc-ema", None, {AVERAGE: under(held, _EMA)}, {}, clock)


def post_hoc(path: Path, held: Mapping[str, Any]) -> Checkpoint | None:
    """The state dict of a `PostHocEMA`: ema_models.<i>. and a `KarrasEMA`. Averages are named "i"."""
    found = {match[1] for key in held if (match := _MEMBER.match(key))}
    if not found:
        return None
    members = sorted(found, key=int)
    steps = {count(key, held[key]) for key in (f"ema_models.{i}.step" for i in members)}
    averages = {i: under(held, f"ema_models.{i}.{_EMA}") for i in members}
    clock = Clock(steps.pop(), "updates", ahead=1) if len(steps) == 1 else None
    return Checkpoint(path, "post-hoc-ema", None, averages, {}, clock)


def averaged_model(path: Path, held: Mapping[str, Any]) -> Checkpoint | None:
    """`torch.optim.swa_utils.AveragedModel`: n_averaged, module.*; EMA or SWA, it does not say."""
    if "n_averaged" not in held:
        return None
    averages = {AVERAGE: under(held, "module.")}
    clock = Clock(count("n_averaged", held["n_averaged"]))
    return Checkpoint(path, "averaged-model", None, averages, {}, clock)


def _is_ema(held: Mapping[str, Any]) -> bool:
    return {"initted", "step"} <= set(held) and any(key.startswith(_EMA) for key in held)


def _is_snapshot(held: Mapping[str, Any]) -> bool:
    """Whether the flag was cast to the weights' dtype; the article's class has one of shape (1,)."""
    flag: Tensor = held["initted"]
    return flag.is_floating_point() and flag.dim() == 0


_Reading = Callable[[Path, Mapping[str, Any]], Checkpoint | None]
_READINGS: tuple[_Reading, ...] = (post_hoc, snapshot, ema_pytorch, averaged_model)
