"""Averages that lie in the state dict of the model that they average.

A module may keep an average of itself, or of a part of it, as a submodule: `ema.`, `model_ema.`,
`net_ema.ema_model.`. It is known by a word of its name, and only if each of its tensors has a
counterpart of the same shape among the other tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from polyak._lazy import LazyTensors, joined, renamed
from polyak.checkpoints._checkpoint import Clock
from polyak.checkpoints._peers.common import count
from polyak.checkpoints._peers.walk import AVERAGES, words
from polyak.decays import Ratio
from polyak.rules import AVERAGE, Exponential, Rule

_COUNTERS = frozenset({"decay", "num_updates", "n_averaged", "initted", "step", "updates"})
_DEEPEST = (
    3  # submodules between an average and the model's copy: `ema.module.`, `ema.ema_model.module.`
)
_MOST = 100  # places at which a copy may belong; more are not compared
_MOST_GROUPS = 1000  # submodules that may be averages; of more, none is taken for one

Names = dict[str, str]
"""A name of the model -> the key of its average."""


class Split(NamedTuple):
    """A state dict without the averages in it, these averages, and what is known of them."""

    live: LazyTensors
    averages: Mapping[str, LazyTensors]
    refused: dict[str, str]
    rules: dict[str, Rule]
    clock: Clock | None


def split(held: LazyTensors) -> Split:
    """Tell a model's state dict from the averages that it keeps in it.

    What an average does not hold, such as frozen weights and buffers, it has from the live weights, as
    when the module that keeps it applies it.
    """
    groups = _groups(held)
    within = {key for keys in groups.values() for key in keys}
    rest = renamed(held, {name: name for name in held if name not in within})
    matched: dict[str, Names] = {}
    refused: dict[str, str] = {}
    for prefix, keys in groups.items():
        try:
            names = _matched(rest, held, prefix, keys)
        except ValueError as error:
            refused[prefix[:-1]] = str(error)
        else:
            if names:
                matched[prefix] = names
    ours = {k for p, keys in groups.items() if p in matched or p[:-1] in refused for k in keys}
    live = renamed(held, {name: name for name in held if name not in ours})
    averages = {p[:-1]: joined(live, renamed(held, names)) for p, names in matched.items()}
    clocks = [_clock(held, prefix) for prefix in matched]
    rules = {p[:-1]: rule for p in matched if (rule := _rule(held, p)) is not None}
    if _apart(matched):
        every = {name: key for names in matched.values() for name, key in names.items()}
        averages = {AVERAGE: joined(live, renamed(held, every))}
        rules = {AVERAGE: next(iter(rules.values()))} if len({*rules.values()}) == 1 else {}
    return Split(live, averages, refused, rules, clocks[0] if len({*clocks}) == 1 else None)


def _groups(held: LazyTensors) -> dict[str, list[str]]:
    """The prefix of each submodule whose name has a word for averages -> its keys."""
    groups: dict[str, list[str]] = {}
    for name in held:
        parts = name.split(".")[:-1]
        place = next((i for i, part in enumerate(parts) if words(part) & AVERAGES), None)
        if place is not None:
            groups.setdefault(".".join(parts[: place + 1]) + ".", []).append(name)
    return groups if len(groups) <= _MOST_GROUPS else {}


def _apart(matched: Mapping[str, Names]) -> bool:
    """Whether there are averages, and each is of other tensors than the others."""
    named = [name for names in matched.values() for name in names]
    return bool(named) and len({*named}) == len(named)


def _matched(live: LazyTensors, held: LazyTensors, prefix: str, keys: list[str]) -> Names:
    """Which tensor of the model each key averages; empty if they are no copies of it.

    Raises `ValueError` if they may be copies of several parts of it.
    """
    rests = {key.removeprefix(prefix): key for key in keys}
    rests = {rest: key for rest, key in rests.items() if rest not in _COUNTERS}
    copies = {rest: key for rest, key in rests.items() if rest.startswith("ema_model.")}
    rests = copies or rests
    if not rests:
        return {}
    flat = {"decay", "num_updates"} <= {key.removeprefix(prefix) for key in keys}
    if flat and not any("." in rest for rest in rests):
        return _without_dots(live, held, prefix, rests)
    return _with_dots(live, held, prefix, rests)


def _with_dots(
    live: LazyTensors, held: LazyTensors, prefix: str, rests: Mapping[str, str]
) -> Names:
    """Copies under the model's own names, from some submodule on."""
    longest = max(rests, key=len).split(".")
    for skip in range(min(len(longest), _DEEPEST + 1)):
        front = "".join(f"{part}." for part in longest[:skip])
        if not all(rest.startswith(front) for rest in rests):
            return {}
        inner = {rest.removeprefix(front): key for rest, key in rests.items()}
        first = ".".join(longest[skip:])
        places = [n[: -len(first)] for n in live if n == first or n.endswith(f".{first}")]
        fits = [
            place
            for place in places[:_MOST]
            if all(_alike(live, place + name, held, key) for name, key in inner.items())
        ]
        if fits:
            _require_one(prefix, fits)
            return {fits[0] + name: key for name, key in inner.items()}
    return {}


def _without_dots(
    live: LazyTensors, held: LazyTensors, prefix: str, rests: Mapping[str, str]
) -> Names:
    """Copies whose names have lost their dots, as those of `LitEma`; raises if none or several fit."""
    longest = max(rests, key=len)
    places = {
        name[: len(name) - len(end)]
        for name in live
        for end in _ends(name)
        if end.replace(".", "") == longest
    }
    fits = {}
    for place in sorted(places)[:_MOST]:
        found: dict[str, list[str]] = {}
        for name in live:
            if name.startswith(place):
                found.setdefault(name.removeprefix(place).replace(".", ""), []).append(name)
        names = {
            rest: [n for n in found.get(rest, ()) if _alike(live, n, held, key)]
            for rest, key in rests.items()
        }
        if all(names.values()):
            fits[place] = names
    if not fits:
        raise ValueError(f"the names under {prefix!r} have no dots, and fit no part of the model")
    _require_one(prefix, list(fits))
    (names,) = fits.values()
    for rest, several in names.items():
        if len(several) > 1:
            raise ValueError(
                f"{prefix + rest!r} may be the average of {' or of '.join(map(repr, several))}: the "
                "file does not tell"
            )
    return {several[0]: rests[rest] for rest, several in names.items()}


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _alike(live: LazyTensors, name: str, held: LazyTensors, key: str) -> bool:
    return name in live and live.specs[name].shape == held.specs[key].shape


def _require_one(prefix: str, places: list[str]) -> None:
    if len(places) > 1:
        shown = " or of ".join(map(repr, places[:4]))
        raise ValueError(f"what lies under {prefix!r} may be the average of {shown}")


def _clock(held: LazyTensors, prefix: str) -> Clock | None:
    """The clock beside an average: that of `AveragedModel`, ema-pytorch's `EMA` or `LitEma`."""
    if prefix + "n_averaged" in held:
        return Clock(count("n_averaged", held[prefix + "n_averaged"]))
    if {prefix + "initted", prefix + "step"} <= set(held):
        return Clock(count("step", held[prefix + "step"]), "calls")
    counted = held.get(prefix + "num_updates")
    if counted is None or counted.numel() != 1 or int(counted) < 0:
        return None
    return Clock(int(counted), ahead=1)


def _rule(held: LazyTensors, prefix: str) -> Rule | None:
    """The rule of a `LitEma`: the decay is min(decay, (1 + n) / (10 + n)) if it counts its updates."""
    if not {prefix + "decay", prefix + "num_updates"} <= set(held):
        return None
    decay = held[prefix + "decay"]
    if decay.numel() != 1 or not 0 <= float(decay) < 1:
        return None
    exact = float(str(np.float32(float(decay))))  # .9999 was rounded to a float32
    return Exponential(exact if _clock(held, prefix) is None else Ratio(exact))
