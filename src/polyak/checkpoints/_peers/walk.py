"""Find every state dict in the content of a file, and what each is for.

Three things show it: the keys on the way to a state dict, the layouts of averages that describe
themselves, and what lies beside it. `AVERAGES`, `OPTIMIZERS` and `LIVE_KEYS` are the words that count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from polyak._lazy import LazyTensors, Renamed, renamed
from polyak.checkpoints._checkpoint import Checkpoint
from polyak.checkpoints._peers.common import holds_tensors, is_state, is_unread, state
from polyak.checkpoints._torch_save.files import StoredTensors
from polyak.checkpoints._torch_save.pickles import Aside
from polyak.checkpoints._torch_save.tensors import StoredTensor
from polyak.checkpoints._unfit import packed

Role = Literal["average", "optimizer", "other"]

AVERAGES = frozenset(
    {"ema", "emas", "swa", "lawa", "shadow", "avg", "average", "averages", "averaged", "averager",
     "averaging", "polyak"}
)  # fmt: skip
"""Words of a key under which an average lies."""
OPTIMIZERS = frozenset({"opt", "optim", "optims", "optimizer", "optimizers"})
"""Words of a key under which an optimizer's state lies."""
_KEPT = frozenset({"backup", "backups", "collected"})
"""Words of a key, beside an average, of the live weights that were kept while the model had the average."""
LIVE_KEYS = (
    "", "state_dict", "model", "model_state_dict", "net", "weights", "module", "params",
)  # fmt: skip
"""Keys of live weights; of two the first counts."""
_MOMENTS = frozenset(
    {"exp_avg", "exp_avg_sq", "exp_inf", "max_exp_avg_sq", "momentum_buffer", "square_avg",
     "grad_avg", "acc_delta", "fp32_param", "master_param"}
)  # fmt: skip
_NO_WEIGHTS = ("a sparse tensor", "a nested tensor")
_MOST_PARTS = 1000  # of an average: more are not joined
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


class Part(NamedTuple):
    """Tensors that lie together in a file.

    `held` is a state dict, a list with tensors, or an object of an unknown class that was made of tensors.
    `label` is what messages call it. `beside` is the mapping in which it lies. `reading` is set where the
    part describes itself. The tensors of a `loose` part lie among other things: no state dict holds them.
    """

    path: tuple[str, ...]
    label: str
    held: Any
    role: Role
    beside: Mapping[Any, Any]
    reading: Checkpoint | None = None
    loose: bool = False

    @property
    def named(self) -> bool:
        """Whether it is a state dict."""
        return not self.loose and is_state(self.held)

    def tensors(self) -> LazyTensors:
        """Its tensors by name or position, without those that only unknown code could make."""
        if isinstance(self.held, LazyTensors):
            return self.held
        pairs = self.held.items() if isinstance(self.held, dict) else enumerate(self.held)
        return StoredTensors({str(k): t for k, t in pairs if isinstance(t, StoredTensor)})


def words(key: object) -> frozenset[str]:
    """The words of a key, in small letters: of "netG_ema" they are net, g and ema."""
    return frozenset(word.lower() for word in _WORD.findall(str(key)))


def walk(
    value: Any,
    describe: Callable[[Mapping[str, Any]], Checkpoint | None] = lambda _: None,
    keys: str = "",
) -> Iterator[Part]:
    """The parts of a file's content, in its order; `describe` reads a part that describes itself.

    `keys` are those on the way to the content. What was asked for by its keys is a state dict, whatever
    else lies beside its tensors.
    """
    role: Role = "average" if words(keys) & AVERAGES else "other"
    for part in _walk(value, describe, (), role, "", {}):
        yield part._replace(loose=False) if keys and not part.path else part


def _walk(
    value: Any,
    describe: Callable[[Mapping[str, Any]], Checkpoint | None],
    path: tuple[str, ...],
    role: Role,
    optimizer: str,
    beside: Mapping[Any, Any],
) -> Iterator[Part]:
    label = optimizer or ".".join(path)
    if isinstance(value, dict) and {"state", "param_groups"} <= value.keys():
        role, optimizer = "optimizer", label or "optimizer"
    part = Part(path, optimizer or label, value, role, beside)
    if not isinstance(value, (Mapping, list, tuple)):
        return
    reading = describe(value) if isinstance(value, Mapping) and role != "optimizer" else None
    if reading is not None:
        yield part._replace(role="average", reading=reading)
    elif isinstance(value, LazyTensors):
        yield from _flat(part)
    elif is_state(value) or (isinstance(value, Aside) and not value and holds_tensors(value)):
        yield part
    else:
        inner = _inner(value)
        loose = {
            key: one
            for key, one in inner.items()
            if isinstance(one, StoredTensor) or is_unread(one)
        }
        if any(isinstance(one, StoredTensor) for one in loose.values()):
            listed = isinstance(value, (list, tuple))
            alone = not listed and not any("." in key for key in loose)
            if not listed and not alone:  # a state dict: what only code could make is refused there
                loose |= {name: one for name in inner for one in _lost(name, inner[name], role)}
            yield part._replace(held=list(loose.values()) if listed else loose, loose=alone)
        for key, one in inner.items():
            kind, root = _role(key, role), optimizer
            if kind == "optimizer":
                root = optimizer or ".".join((*path, key))
            yield from _walk(one, describe, (*path, key), kind, root, inner)


def _inner(value: Any) -> dict[str, Any]:
    """The values in a mapping or a list, by text: a key that is an object has the name of its place."""
    if isinstance(value, (list, tuple)):
        return {str(place): one for place, one in enumerate(value)}
    if not isinstance(value, dict):
        return {}
    return {
        str(key) if type(key) in (str, int, float) else f"[{place}]": one
        for place, (key, one) in enumerate(value.items())
    }


def _lost(name: str, value: Any, role: Role) -> list[Aside]:
    """The weights that only code could make, in a state dict's value or in a tuple in its place.

    A sparse or nested tensor in a tuple is a graph or a batch: torch packs no weights so.
    """
    if "." not in name or _role(name, role) != role:
        return []
    if not isinstance(value, (list, tuple)):
        return [value] if holds_tensors(value) else []
    return [one for one in value if holds_tensors(one) and one.name not in _NO_WEIGHTS]


def _role(key: str, role: Role) -> Role:
    """The role of what lies under a key, within a part of this role."""
    found = words(key)
    if role == "optimizer" or found & OPTIMIZERS:
        return "optimizer"
    if found & _KEPT:
        return "other"
    return "average" if role == "average" or found & AVERAGES else "other"


def _flat(part: Part) -> Iterator[Part]:
    """A flat mapping; what optimizers keep in it, as in folders of Megatron, is a part of its own."""
    moments = {name: name for name in part.held if _is_moment(name)}
    if not moments or part.role == "optimizer":
        yield part
        return
    rest = {name: name for name in part.held if name not in moments}
    label = ".".join(filter(None, (part.label, next(iter(moments)).split(".")[0])))
    yield part._replace(held=renamed(part.held, moments), role="optimizer", label=label)
    if rest:
        yield part._replace(held=renamed(part.held, rest))


def _is_moment(name: str) -> bool:
    """Whether a flat name is that of an optimizer's state."""
    keys = name.split(".")
    states = "state" in keys or "param_groups" in keys or bool(_MOMENTS & set(keys))
    return keys[-1] in _MOMENTS or (bool(OPTIMIZERS & set(keys[:2])) and states)


def under_keys(value: Any, keys: str) -> Any:
    """The part under a path of keys, joined by dots; a key may contain dots itself.

    Raises `ValueError` with the keys that there are.
    """
    rest = keys
    while rest:
        if isinstance(value, LazyTensors):
            inner = {n.removeprefix(f"{rest}."): n for n in value if n.startswith(f"{rest}.")}
            value, has = renamed(value, inner) if inner else None, list(value)
            found = rest if inner else None
        else:
            of_key = _inner(value)
            has = list(of_key)
            fits = [k for k in of_key if rest == k or rest.startswith(f"{k}.")]
            found = max(fits, key=len, default=None)
            value = of_key.get(found) if found is not None else None
        if found is None:
            shown = ", ".join(map(repr, has[:12])) or "nothing"
            raise ValueError(f"key={keys!r}: there is no {rest!r}; it holds {shown}")
        rest = rest[len(found) + 1 :]
    return value


def live_part(parts: Sequence[Part], averages: Sequence[Part]) -> Part | None:
    """The part that is the live weights; None if there is none, or the file does not say.

    It is the state dict under one of `LIVE_KEYS`, at the outermost place; else those that lie together
    under such a key, as one; else the one that an average has its name from, as "g" and "g_ema"; else
    the only one.
    """
    live = _live_state(parts, averages)
    return None if live is None else _with_packed(live, parts)


def _with_packed(live: Part, parts: Sequence[Part]) -> Part:
    """The live weights with those that lie packed among other things beside them, as HQQ's layers do."""
    root = _root(live.path)
    loose = [part for part in parts if part.role == "other" and part.loose]
    below = [part for part in loose if part.path[: len(root)] == root]
    whole = _joined([live, *below], root)
    only_there = below and packed(whole.held.specs) and not packed(state(live.held).specs)
    return whole if only_there else live


def _live_state(parts: Sequence[Part], averages: Sequence[Part]) -> Part | None:
    states = [part for part in parts if part.role == "other" and part.named]
    keyed = [part for part in states if not part.path or set(LIVE_KEYS) & set(part.path)]
    if keyed:
        root = min((_root(part.path) for part in keyed), key=_order)
        below = [part for part in keyed if part.path[: len(root)] == root]
        alone = [part for part in below if set(part.path[len(root) :]) <= set(LIVE_KEYS)]
        return min(alone, key=lambda part: _order(part.path)) if alone else _joined(below, root)
    averaged = {_plain_words(part.path) for part in averages}
    named = [part for part in states if _plain_words(part.path) in averaged]
    if len(named) == 1:
        return named[0]
    return states[0] if len(states) == 1 and not named else None


def _root(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path to the first of `LIVE_KEYS`."""
    return path[: 1 + next((i for i, key in enumerate(path) if key in LIVE_KEYS), -1)]


def _order(path: tuple[str, ...]) -> tuple[int, int]:
    """The outermost first; of equal ones by their last key."""
    return len(path), LIVE_KEYS.index(path[-1] if path else "")


def _joined(parts: Sequence[Part], root: tuple[str, ...]) -> Part:
    """State dicts under a key as one, their names behind the keys that lead to them."""
    held = {
        ".".join((*part.path[len(root) :], name)): (tensors, name)
        for part in parts
        for tensors in [state(part.held)]
        for name in tensors
    }
    return parts[0]._replace(path=root, label=".".join(root), held=Renamed(held))


def joined_like(parts: Sequence[Part], live: Part | None) -> list[Part]:
    """Join averages that each hold a part of the joined live weights."""
    named = [part for part in parts if part.reading is None and part.named]
    if live is None or len(named) > _MOST_PARTS:
        return list(parts)
    names = set(live.tensors())
    for root in dict.fromkeys(part.path[:i] for part in named for i in range(len(part.path))):
        below = [part for part in named if part.path[: len(root)] == root]
        if len(below) > 1 and names <= set((whole := _joined(below, root)).tensors()):
            rest = [part for part in parts if not any(part is other for other in below)]
            return [*rest, whole]
    return list(parts)


def _plain_words(path: tuple[str, ...]) -> tuple[frozenset[str], ...]:
    """The words of the keys on a path without those of averages."""
    return tuple(filter(None, (words(key) - AVERAGES for key in path)))
