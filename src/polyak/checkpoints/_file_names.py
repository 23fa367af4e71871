"""What the name of a checkpoint tells: its step or epoch, metrics, and whether it repeats another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

SUFFIX = re.compile(
    r"(\.safetensors|\.nemo|\.ckpt|\.bin|\.pt|\.pth|\.pkl)(\.tar)?$|(?<=^snapshot)(?=\.ep\.\d+$)"
)
"""How the names of files with weights end; those of espnet 1 have no suffix."""
UNFINISHED = {".tmp", ".part", ".incomplete"}
"""How the names of files and folders end whose save is not done."""

_PAIR = re.compile(r"([A-Za-z][\w./ ]*)=(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)", re.IGNORECASE)
_NOT_COUNTED = re.compile(
    r"-v\d+$|[-_.](rank|shard)[-_]?\d+$"
)  # Lightning's, where the name was taken
_STEP = re.compile(
    r"(?:(?:steps?|iter|iteration|updates?|(?<![a-z])ba)[-_]?(\d+)|(\d+)[-_]?(?:steps?|iters?|updates?))"
    r"(?![\d.])",
    re.IGNORECASE,
)
_EPOCH = re.compile(
    r"(?:(?<![a-z])(?:epochs?|ep)[-_.]?(\d+)|(?<![\d.])(\d+)epoch)(?![\d.])", re.IGNORECASE
)
_NUMBER = re.compile(r"\d+")
_REPEATS = re.compile(r"(?<![a-z])(best|last|latest|final|end)(?![a-z])", re.IGNORECASE)
_AVERAGES = re.compile(
    r"(?<![a-z])(ave|avg|average|averaged|ema|swa|mean|soup|merged)(?![a-z])", re.IGNORECASE
)
_CLOCKS = {"step": "step", "global_step": "step", "epoch": "epoch"}


class Named(NamedTuple):
    """What a name tells.

    `clock` has "step", "epoch" or "number" (the last number of a name that does not say of what).
    `repeats`: it may be a copy of another, such as `last.ckpt`. `averages`: it is made of others.
    """

    clock: dict[str, float]
    metrics: dict[str, float]
    repeats: bool
    averages: bool


def named(path: Path) -> Named:
    """What the name of a file or folder tells.

    >>> named(Path("epoch=3-step=64-val_loss=0.25.ckpt"))
    Named(clock={'epoch': 3.0, 'step': 64.0}, metrics={'val_loss': 0.25}, repeats=False, averages=False)
    >>> [named(Path(name)).clock for name in ("iter_0001000", "12epoch.pth", "checkpoint-500", "7.pt")]
    [{'step': 1000.0}, {'epoch': 12.0}, {'number': 500.0}, {'number': 7.0}]
    """
    stem = SUFFIX.sub("", path.name)
    pairs = {key.strip(" -_"): float(value) for key, value in _PAIR.findall(stem)}
    clock = {_CLOCKS[key]: value for key, value in pairs.items() if key in _CLOCKS}
    metrics = {key: value for key, value in pairs.items() if key not in _CLOCKS}
    rest = _NOT_COUNTED.sub("", _PAIR.sub("", stem))
    if not clock:
        clock = _counted(rest)
    return Named(clock, metrics, bool(_REPEATS.search(rest)), bool(_AVERAGES.search(rest)))


def _counted(stem: str) -> dict[str, float]:
    """The step, the epoch, or else the last number in a name without `key=value`."""
    found: dict[str, float] = {}
    if steps := _STEP.findall(stem):
        found["step"] = float("".join(steps[-1]))
    if epochs := _EPOCH.findall(stem):
        found["epoch"] = float("".join(epochs[-1]))
    numbers = _NUMBER.findall(stem)
    return found or ({"number": float(numbers[-1])} if numbers else {})
