"""Checkpoints of no particular library: averages are found by their keys and their own layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from polyak._lazy import LazyTensors, joined
from polyak.checkpoints._checkpoint import Checkpoint, Clock, Weights
from polyak.checkpoints._indexed import IndexedTensors
from polyak.checkpoints._names import Names, NamesNeededError, canonical_names, named
from polyak.checkpoints._peers.common import (
    Found,
    count,
    holds_tensors,
    is_unread,
    tensors,
    weights,
)
from polyak.checkpoints._peers.libraries import described
from polyak.checkpoints._peers.own_state import own_state
from polyak.checkpoints._peers.walk import Part, joined_like, live_part, walk, words
from polyak.checkpoints._peers.within import split
from polyak.checkpoints._safetensors.files import TensorFile
from polyak.checkpoints._torch_save.files import StoredTensors
from polyak.checkpoints._torch_save.pickles import Aside
from polyak.rules import AVERAGE, Rule, Tick

_FORMATS = {"pytorch-lightning_version": "lightning", "state_dict_ema": "timm"}
_COUNTERS = ("n_averaged", "updates", "num_updates")


class _Average(NamedTuple):
    """An average of a file, and what is known of it."""

    label: str
    weights: Weights
    format: str = ""
    clock: Clock | None = None
    rule: Rule | None = None
    tick: Tick | None = None


def general(found: Found) -> Checkpoint | None:
    """Read a file by the roles of its state dicts; None if none has weights.

    Raises `ValueError` for several state dicts, if nothing says which are the live weights.
    """
    describe = lambda held: _described(replace(found, top=held))  # noqa: E731
    parts = list(walk(found.top, describe, found.keys))
    averaging = [part for part in parts if part.role == "average"]
    part = live_part(parts, averaging)
    averaging = joined_like(averaging, part)
    live = None if part is None else weights(part.held)
    within: list[_Average] = []
    refused: dict[str, str] = {}
    if live is None:
        inner = [p.reading.live for p in averaging if p.reading and p.reading.live is not None]
        live = inner[0] if len(inner) == 1 else None
    elif not found.whole:
        live, within, refused = _without_averages(live, found.names)
    averaging = [_with_live(found, part, live) for part in averaging]
    averages = [each for part in averaging for each in _averages(found, part)]
    refused |= {name: why for part in averaging for name, why in _refused(found, part).items()}
    if live is None and not averages and not within:
        _refuse(parts, refused)
        return None
    return _checkpoint(found, live, _with_copies([*averages, *within]), refused)


def _described(found: Found) -> Checkpoint | None:
    """An average that describes itself; without its weights if they need names."""
    try:
        return own_state(found) or described(found)
    except NamesNeededError as error:
        return Checkpoint(found.path, found.plain, None, {}, refused={AVERAGE: str(error)})


def _with_live(found: Found, part: Part, live: Weights | None) -> Part:
    """A part whose averages are sums of slots and of live weights, which are known only now."""
    if live is None or part.reading is None or not part.reading.refused:
        return part
    return part._replace(reading=own_state(replace(found, top=part.held), live) or part.reading)


def _averages(found: Found, part: Part) -> list[_Average]:
    """The averages in a part of a file."""
    if (reading := part.reading) is not None:
        many = len(reading.averages) > 1 or reading.format == "polyak"
        label = part.path[-1] if part.path else AVERAGE
        return [
            _Average(
                name if many else label,
                average,
                reading.format,
                reading.clock,
                reading.rules.get(name),
                reading.ticks.get(name),
            )
            for name, average in reading.averages.items()
        ]
    if not part.named and (not isinstance(part.held, list) or found.names is None):
        return []
    average = weights(part.held) if part.named else _listed(found, part)
    return [_Average(part.label, average, clock=_clock(part))]


def _listed(found: Found, part: Part) -> Weights:
    """The tensors of a list, by the names that were given."""
    return named(StoredTensors(tensors(part.label, part.held)), found.names)


def _refused(found: Found, part: Part) -> Mapping[str, str]:
    """The averages of a part that were not read, and why."""
    if part.reading is not None:
        return part.reading.refused
    if isinstance(part.held, list) and found.names is None:
        try:
            _listed(found, part)
        except NamesNeededError as error:
            return {AVERAGE: f"{part.label}: {error}"}
    return {}


def _without_averages(
    live: Weights, names: Names
) -> tuple[Weights, list[_Average], dict[str, str]]:
    """Live weights without the averages in them, and these."""
    found = split(live, names)
    if not found.averages and not found.refused:
        return live, [], {}
    averages = [
        _Average(name, average, clock=found.clock, rule=found.rules.get(name))
        for name, average in found.averages.items()
    ]
    return found.live, averages, found.refused


def _clock(part: Part) -> Clock | None:
    """The updates of an average, from a counter that lies beside it."""
    counter = next((key for key in _COUNTERS if key in part.beside), None)
    if counter is None or (counter == "num_updates" and len(part.path) < 2):
        return None
    return Clock(count(counter, part.beside[counter]))


def _with_copies(averages: list[_Average]) -> list[_Average]:
    """Join a float32 average of some tensors (`ema_fp32_params`) with the narrow average of all."""
    wide = [each for each in averages if {"fp", "32"} <= words(each.label)]
    rest = [each for each in averages if not {"fp", "32"} <= words(each.label)]
    if len(wide) != 1 or len(rest) != 1 or not set(wide[0].weights) <= set(rest[0].weights):
        return averages
    return [rest[0]._replace(weights=joined(rest[0].weights, wide[0].weights))]


def _checkpoint(
    found: Found, live: Weights | None, averages: list[_Average], refused: dict[str, str]
) -> Checkpoint:
    alone = len(averages) == 1 and averages[0].format != "polyak"
    named = {AVERAGE: averages[0]} if alone else _by_label(averages)
    clocks = {each.clock for each in averages}
    formats = [each.format for each in averages if each.format]
    key = next((key for key in _FORMATS if key in found.top), "")
    return Checkpoint(
        found.path,
        formats[0] if formats else _FORMATS.get(key, found.plain),
        live,
        {name: each.weights for name, each in named.items()},
        {name: each.rule for name, each in named.items() if each.rule is not None},
        clocks.pop() if len(clocks) == 1 else None,
        ticks={name: each.tick for name, each in named.items() if each.tick is not None},
        shapes=_shapes(found.top.get("param_shapes")),
        refused=refused,
    )


def _shapes(described: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights, which DeepSpeed writes beside them: those of each group by name."""
    groups = described if isinstance(described, (list, tuple)) else [described]
    shapes = [item for group in groups if isinstance(group, dict) for item in group.items()]
    shape_of = {str(name): tuple(shape) for name, shape in shapes if isinstance(shape, torch.Size)}
    return {plain: shape_of[name] for plain, name in canonical_names(shape_of).items()}


def _by_label(averages: list[_Average]) -> dict[str, _Average]:
    """Averages by their labels; a number distinguishes those of one label."""
    named: dict[str, _Average] = {}
    seen: Counter[str] = Counter()
    for each in averages:
        seen[each.label] += 1
        several = seen[each.label] > 1
        named[f"{each.label}#{seen[each.label]}" if several else each.label] = each
    return named


def _refuse(parts: Sequence[Part], refused: Mapping[str, str]) -> None:
    """Raises `ValueError` for averages that cannot be read, and for several state dicts."""
    if refused:
        raise ValueError(next(iter(refused.values())))
    states = [part for part in parts if part.role == "other" and part.named]
    if len(states) > 1:
        shown = ", ".join(f"{part.label} ({len(part.tensors())} tensors)" for part in states[:12])
        raise ValueError(
            f"it holds several state dicts, {shown}, and does not say which are the live weights: "
            f"name one, such as key={states[0].label!r} (--key {states[0].label})"
        )


def left_aside(top: Any, reading: Checkpoint) -> dict[str, int]:
    """Count the tensors that are in neither the live weights nor an average, by their place.

    What is only counters and other single numbers is left out.
    """
    live = [] if reading.live is None else [reading.live]
    used = {
        origin
        for read_weights in (*live, *reading.averages.values())
        for name in read_weights
        for origin in read_weights.origins(name)
    }
    within = top.values() if isinstance(top, dict) else [top]
    left = {
        f"{name} ({why})": 1
        for file in within
        if isinstance(file, (TensorFile, IndexedTensors))
        for name, why in file.unread.items()
    }
    for part in walk(top):
        for name, number in _unused(part, used).items():
            left[name] = left.get(name, 0) + number
    return left


def _unused(part: Part, used: set[Any]) -> dict[str, int]:
    if not isinstance(part.held, (LazyTensors, list)) and not part.named and not part.loose:
        return {f"{part.label} ({_kind(part.held)})": 0}
    content = part.tensors()
    unread = part.held.items() if isinstance(part.held, dict) else ()
    left = {
        ".".join(filter(None, (part.label, f"{name} ({_kind(one)})"))): 1
        for name, one in unread
        if is_unread(one) or holds_tensors(one)
    }
    names = [name for name in content if not used & set(content.origins(name))]
    if not part.label or part.loose:
        firsts = [".".join(filter(None, (part.label, name.split(".")[0]))) for name in names]
    else:
        firsts = [part.label] * len(names)
    large = {
        first for first, name in zip(firsts, names, strict=True) if content.specs[name].numel > 1
    }
    return left | {first: n for first, n in Counter(firsts).items() if first in large}


def _kind(one: Aside) -> str:
    """Name an object that was not read: by its kind of tensors, or by its class."""
    plain = is_unread(one) or one.name.startswith("a ")
    return one.name if plain else f"a pickled {one.name}"
