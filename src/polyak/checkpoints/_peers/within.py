"""Averages that lie in the state dict of the model that they average.

A module may keep an average of itself, or of a part of it, as a submodule: `ema.`, `model_ema.`,
`net_ema.ema_model.`; or as tensors beside its own: `ema_conv_weight`, `conv.weight_ema`. It is known by a
word of its name, and only if its tensors have counterparts of the same shapes among the other tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from polyak._engine.tracking import is_statistic
from polyak._lazy import LazyTensors, joined, renamed
from polyak.checkpoints._checkpoint import Clock
from polyak.checkpoints._names import Names, NamesNeededError, named
from polyak.checkpoints._peers.libraries import clock_beside, rule_beside
from polyak.checkpoints._peers.walk import AVERAGES, words
from polyak.rules import AVERAGE, Rule

_COUNTERS = frozenset({"decay", "num_updates", "n_averaged", "initted", "step", "updates"})
_DEEPEST = 3  # submodules between an average and the model's copy: `ema.ema_model.module.`
_MOST = 100  # places at which a copy may belong; more are not compared
_MOST_GROUPS = 1000  # submodules that may be averages; of more, none is taken for one

_T = TypeVar("_T")
Keys = dict[str, str]
"""A name, of the model or within an average -> the key of the average's tensor."""


class Split(NamedTuple):
    """A state dict without the averages in it, these averages, and what is known of them."""

    live: LazyTensors
    averages: Mapping[str, LazyTensors]
    refused: dict[str, str]
    rules: dict[str, Rule]
    clock: Clock | None


def split(held: LazyTensors, names: Names = None) -> Split:
    """Tell a model's state dict from the averages that it keeps in it.

    What an average does not hold, such as frozen weights and buffers, it has from the live weights, as
    when the module that keeps it applies it. `names` are those of an average whose tensors have only
    an order.
    """
    groups = _groups(held)
    within = {key for keys in groups.values() for key in keys.values()}
    rest = renamed(held, {name: name for name in held if name not in within})
    matched: dict[str, Keys] = {}
    listed: dict[str, LazyTensors] = {}
    refused: dict[str, str] = {}
    for mark, keys in groups.items():
        try:
            if order := _in_order(rest, held, keys):
                listed[mark] = named(renamed(held, order), names)
            elif found := _matched(rest, held, mark, keys):
                matched[mark] = found
        except NamesNeededError as error:
            refused[mark] = f"{mark.strip('._')}: {error}"
        except ValueError as error:
            refused[mark] = str(error)
    _drop_few(rest, matched)
    ours = {*_keys(matched, groups), *(k for m in (*listed, *refused) for k in groups[m].values())}
    live = renamed(held, {name: name for name in held if name not in ours})
    averages = {m: joined(live, renamed(held, names)) for m, names in matched.items()} | listed
    clocks = [clock_beside(held, groups[mark]) for mark in averages]
    rules = {m: rule for m in averages if (rule := rule_beside(held, groups[m])) is not None}
    if not listed and _apart(matched):
        every = {name: key for names in matched.values() for name, key in names.items()}
        averages = {AVERAGE: joined(live, renamed(held, every))}
        rules = {AVERAGE: next(iter(rules.values()))} if len({*rules.values()}) == 1 else {}
    clock = clocks[0] if len({*clocks}) == 1 else None
    return Split(live, _plain(averages), _plain(refused), _plain(rules), clock)


def _plain(found: Mapping[str, _T]) -> dict[str, _T]:
    """By the names of averages: their marks without dots and "_" around them."""
    return {mark.strip("._"): one for mark, one in found.items()}


def _groups(held: LazyTensors) -> dict[str, Keys]:
    """The mark of each average -> the names of its tensors without the mark -> their keys."""
    groups: dict[str, Keys] = {}
    for key in held:
        mark, name = _marked(key)
        if mark:
            groups.setdefault(mark, {})[name] = key
    return groups if len(groups) <= _MOST_GROUPS else {}


def _marked(key: str) -> tuple[str, str]:
    """The part of a key that says that it is an average's, with its dot or "_", and the rest of the key.

    >>> [_marked(key) for key in ("net_ema.w", "ema_net_w", "net.w_ema", "net.w.ema", "net.w")]
    [('net_ema.', 'w'), ('ema_', 'net_w'), ('_ema', 'net.w'), ('.ema', 'net.w'), ('', 'net.w')]
    """
    *path, leaf = key.split(".")
    place = next((i for i, part in enumerate(path) if words(part) & AVERAGES), None)
    if place is not None:
        mark = ".".join(path[: place + 1]) + "."
        return mark, key.removeprefix(mark)
    first, _, behind = leaf.partition("_")
    before, _, last = leaf.rpartition("_")
    if behind and first.lower() in AVERAGES:
        return f"{first}_", ".".join((*path, behind))
    if before and last.lower() in AVERAGES:
        return f"_{last}", ".".join((*path, before))
    return (f".{leaf}", ".".join(path)) if path and leaf.lower() in AVERAGES else ("", key)


def _keys(matched: Mapping[str, Keys], groups: Mapping[str, Keys]) -> set[str]:
    """The keys of averages that were matched; all of a submodule's, since what it has beside is its own."""
    whole = [
        groups[mark].values() if _is_submodule(mark) else matched[mark].values() for mark in matched
    ]
    return {key for keys in whole for key in keys}


def _is_submodule(mark: str) -> bool:
    return mark.endswith(".")


def _apart(matched: Mapping[str, Keys]) -> bool:
    """Whether there are averages, and each is of other tensors than the others."""
    every = [name for names in matched.values() for name in names]
    return bool(every) and len({*every}) == len(every)


def _drop_few(live: LazyTensors, matched: dict[str, Keys]) -> None:
    """Drop tensors that are averages by their names, unless most of the model's have one.

    A layer may keep an average of one tensor for its own use, as `embed_avg` of a quantizer.
    """
    beside = [mark for mark in matched if not _is_submodule(mark)]
    if not beside:
        return
    averaged = {name for names in matched.values() for name in names}
    weights = {
        name
        for name, spec in live.specs.items()
        if spec.dtype.is_floating_point and not is_statistic(name)
    }
    if 2 * len(weights & averaged) <= len(weights):
        for mark in beside:
            del matched[mark]


def _in_order(live: LazyTensors, held: LazyTensors, keys: Keys) -> Keys:
    """The tensors of an average that have only numbers for names, in their order; or nothing."""
    tensors = {name: key for name, key in keys.items() if name not in _COUNTERS}
    numbers = [name.rpartition(".")[2] for name in tensors]
    fronts = {name.rpartition(".")[0] for name in tensors}
    if len(fronts) != 1 or not all(number.isdecimal() for number in numbers):
        return {}
    shapes = [spec.shape for spec in live.specs.values()]
    of_average = [held.specs[key].shape for key in tensors.values()]
    if any(of_average.count(shape) > shapes.count(shape) for shape in {*of_average}):
        return {}
    pairs = sorted(zip(map(int, numbers), tensors.values(), strict=True))
    return {str(number): key for number, key in pairs}


def _matched(live: LazyTensors, held: LazyTensors, mark: str, keys: Keys) -> Keys:
    """Which tensor of the model each key averages; empty if they are not copies of it.

    Raises `ValueError` if they may be copies of several parts of it.
    """
    names = {name: key for name, key in keys.items() if name not in _COUNTERS}
    copies = {name: key for name, key in names.items() if name.startswith("ema_model.")}
    names = copies or names
    if not names:
        return {}
    if not _is_submodule(mark):
        return _beside(live, held, names)
    has_dots = any("." in name for name in names)
    counted = {"decay", "num_updates"} <= keys.keys()
    if has_dots or not counted:
        found = _with_dots(live, held, mark, names)
        if found or has_dots:
            return found
    return _without_dots(live, held, mark, names, required=counted)


def _beside(live: LazyTensors, held: LazyTensors, names: Keys) -> Keys:
    """Copies beside the model's own tensors: under their names, or with "_" for each dot, as mmcv's."""
    found = {name: key for name, key in names.items() if _alike(live, name, held, key)}
    if found:
        return found
    flat: dict[str, list[str]] = {}
    for name in live:
        flat.setdefault(name.replace(".", "_"), []).append(name)
    fits = {
        key: [one for one in flat.get(name, ()) if _alike(live, one, held, key)]
        for name, key in names.items()
    }
    return _only({key: several for key, several in fits.items() if several})


def _with_dots(live: LazyTensors, held: LazyTensors, mark: str, names: Keys) -> Keys:
    """Copies under the model's own names, from some submodule on."""
    longest = max(names, key=len).split(".")
    for skip in range(min(len(longest), _DEEPEST + 1)):
        front = "".join(f"{part}." for part in longest[:skip])
        if not all(name.startswith(front) for name in names):
            return {}
        inner = {name.removeprefix(front): key for name, key in names.items()}
        first = ".".join(longest[skip:])
        places = [n[: -len(first)] for n in live if n == first or n.endswith(f".{first}")]
        fits = [
            place
            for place in places[:_MOST]
            if all(_alike(live, place + name, held, key) for name, key in inner.items())
        ]
        if fits:
            place = _one(mark, fits)
            return {place + name: key for name, key in inner.items()}
    return {}


def _without_dots(
    live: LazyTensors, held: LazyTensors, mark: str, names: Keys, *, required: bool
) -> Keys:
    """Copies whose names have lost their dots, as those of `LitEma`.

    Raises `ValueError` if several parts of the model fit, and where one is `required` if none does.
    """
    longest = max(names, key=len)
    places = {
        name[: len(name) - len(end)]
        for name in live
        for i in range(1 + name.count("."))
        if (end := name.split(".", i)[-1]).replace(".", "") == longest
    }
    fits = {}
    for place in sorted(places)[:_MOST]:
        found: dict[str, list[str]] = {}
        for name in live:
            if name.startswith(place):
                found.setdefault(name.removeprefix(place).replace(".", ""), []).append(name)
        several = {
            key: [one for one in found.get(name, ()) if _alike(live, one, held, key)]
            for name, key in names.items()
        }
        if all(several.values()):
            fits[place] = several
    if not fits and required:
        raise ValueError(f"the names under {mark!r} have no dots, and fit no part of the model")
    return _only(fits[_one(mark, list(fits))] if fits else {})


def _only(fits: Mapping[str, list[str]]) -> Keys:
    """The one tensor of the model that each key averages; raises `ValueError` if one fits several."""
    for key, several in fits.items():
        if len(several) > 1:
            raise ValueError(
                f"{key!r} may be the average of {' or of '.join(map(repr, several))}: the file does not "
                "say"
            )
    return {several[0]: key for key, several in fits.items()}


def _alike(live: LazyTensors, name: str, held: LazyTensors, key: str) -> bool:
    return name in live and live.specs[name].shape == held.specs[key].shape


def _one(mark: str, places: list[str]) -> str:
    """The place that an average belongs to: of several the one that its mark names, as `g.` and `g_ema.`.

    Raises `ValueError` if its mark names none of them.
    """
    *front, last = mark.strip(".").split(".")
    called = [*front, "_".join(part for part in last.split("_") if not words(part) & AVERAGES)]
    named = [place for place in places if place.strip(".").split(".") == called]
    if len(places) > 1 and not named:
        shown = " or of ".join(map(repr, places[:4]))
        raise ValueError(
            f"the tensors under {mark!r} may be the average of {shown}: the file does not say"
        )
    return (named or places)[0]
