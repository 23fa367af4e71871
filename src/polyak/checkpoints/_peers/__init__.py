"""Detect from its keys which library wrote a file, and map its parts to live weights and averages.

A layout is one function: it takes the content of a file and returns a `Checkpoint`, or None if the file
has another layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from polyak._checks import difference, report
from polyak._lazy import as_lazy
from polyak.checkpoints._checkpoint import Checkpoint
from polyak.checkpoints._open.files import labelled
from polyak.checkpoints._peers.common import NO_CODE, Found, holds_tensors, kind_of
from polyak.checkpoints._peers.general import general, left_aside
from polyak.checkpoints._peers.trainers import (
    composer,
    edm2,
    mmengine,
    nemo,
    opennmt,
    torchtitan,
    weight_averaging,
)
from polyak.checkpoints._peers.walk import LIVE_KEYS

_LAYOUTS = (weight_averaging, nemo, composer, mmengine, edm2, torchtitan, opennmt, general)
"""The first that fits counts: those of libraries that exchange weights stand before the general one."""

FORMATS = (
    "polyak", "averaged-model", "composer", "dcp", "diffusers", "edm2", "ema-pytorch", "lightning",
    "mmengine", "nemo", "post-hoc-ema", "safetensors", "sharded-safetensors", "state-dict", "timm",
    "torch-ema", "torchtitan",
)  # fmt: skip
"""The values of `Checkpoint.format`."""


def recognise(found: Found) -> Checkpoint:
    """The content of a file as a checkpoint, by the first layout that fits.

    Raises `ValueError` naming the file: if no layout fits, with what the file holds; if one fits and a
    part is damaged or names are needed.
    """
    # Parts may be of any type, and torch's own errors are many.
    with labelled(found.path, "a part of its layout is missing"):
        readings = (layout(found) for layout in _LAYOUTS)
        reading = next((reading for reading in readings if reading is not None), None)
        if reading is not None and found.names is not None:
            _require_shapes(reading)
    if reading is None:
        raise ValueError(f"{found.path}: {_unknown(found.top)}")
    return replace(reading, aside=dict(found.aside), left=left_aside(found.top, reading))


def _require_shapes(reading: Checkpoint) -> None:
    """Raises `ValueError` if the given names give an average other shapes than the live weights have."""
    live = as_lazy(reading.live or {}).specs
    for average in reading.averages.values():
        got = {n: spec.shape for n, spec in as_lazy(average).specs.items() if n in live}
        wanted = {name: live[name].shape for name in got}
        if lines := difference(wanted, got):
            raise ValueError(report("names are not in the order of the averaged tensors", lines))


def _unknown(top: Mapping[str, Any]) -> str:
    """The message of the error if no layout fits."""
    if modules := {key: part for key, part in top.items() if holds_tensors(part)}:
        key, part = next(iter(modules.items()))
        return f"{key!r} is a whole pickled {part.name}: {NO_CODE}"
    if {"state", "param_groups"} <= top.keys():
        return "the state of an optimizer, not of a model: give the file of the weights beside it"
    return (
        f"no layout that polyak knows. It holds {_described(top)}; known are {', '.join(FORMATS)}, "
        f"and state dicts under {', '.join(filter(None, LIVE_KEYS))}, ema and the like. Name the part with the "
        "weights (key=..., on the command line --key), or save the model's state_dict"
    )


def _described(top: Mapping[str, Any], most: int = 12) -> str:
    parts = [f"{key!r:.40} ({kind_of(value)})" for key, value in list(top.items())[:most]]
    more = f" and {len(top) - most} more" if len(top) > most else ""
    return (", ".join(parts) or "nothing") + more
