"""Which tensors an averager averages, which it copies, and which it leaves to the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from torch import nn

from polyak._checks import named, require
from polyak._dtypes import dtype_name, is_wrapper
from polyak._engine.tracking import Policy, Tracked, averageable, is_statistic

Given = Literal["average", "copy", "skip"]
Buffers = Literal["auto", "average", "copy"] | Mapping[str, Given]
Select = Callable[[str], bool] | str | Sequence[str]
TRAINABLE = "trainable"


@dataclass
class Choose:
    """The averager's choice, by its options `buffers` and `select`.

    "average": floating-point and complex parameters, and BatchNorm's running statistics. "copy":
    integers, and every other buffer. "frozen": parameters without gradients, with
    `select="trainable"`, unless all are. "skip": tensors that are not selected, and buffers that
    their module does not save.

    The first model decides which names are frozen, so that later looks and other models agree.

    Raises `ValueError` for patterns that match nothing, `TypeError` for one that is not a string.
    """

    buffers: Buffers = "auto"
    select: Select = TRAINABLE
    _frozen: frozenset[str] | None = field(default=None, init=False)

    def __call__(self, found: Sequence[Tracked]) -> list[tuple[Policy, str]]:
        names = {name: item for item in found for name in item.names}
        overrides = _overrides(self.buffers, names)
        selected = _selector(self.select, names)
        if self._frozen is None:
            self._frozen = _frozen(found) if self.select == TRAINABLE else frozenset()
        frozen = self._frozen
        return [_choose(item, self.buffers, overrides, selected, frozen) for item in found]


def _frozen(found: Sequence[Tracked]) -> frozenset[str]:
    """The parameters that do not train. If none trains, that says nothing of them: then no name."""
    parameters = [item for item in found if isinstance(item.found(), nn.Parameter)]
    frozen = [item for item in parameters if not item.trains]
    names = (name for item in frozen for name in item.names)
    return frozenset(names if len(frozen) < len(parameters) else ())


def _choose(
    item: Tracked,
    buffers: Buffers,
    overrides: dict[str, Policy],
    selected: Callable[[str], bool],
    frozen: frozenset[str],
) -> tuple[Policy, str]:
    """The policy of one tensor, and why."""
    if not any(selected(entry.name) for entry in item.entries):
        return "skip", "not selected"
    if item.name in overrides:
        return overrides[item.name], "by the pattern given"
    if item.name in frozen:
        if is_wrapper(item.local()):
            return "skip", f"requires_grad=False, {type(item.local()).__name__}: left to the model"
        return "frozen", "requires_grad=False: read from the model"
    if not item.persistent:
        return "skip", "a buffer that its module does not save"
    tensor = item.local()
    if not averageable(tensor):
        return "copy", f"{dtype_name(tensor.dtype)} is copied, not averaged"
    if item.kind != "buffer":
        return "average", item.kind
    if buffers in ("average", "copy"):
        return cast(Policy, buffers), f'buffers="{buffers}"'
    if is_statistic(item.name):
        return "average", "running statistics belong to the weights"
    return "copy", "a buffer that is not a running statistic"


def _overrides(buffers: Buffers, names: Mapping[str, Tracked]) -> dict[str, Policy]:
    """First name -> policy; the first pattern that matches one of a tied tensor's names decides."""
    if not isinstance(buffers, Mapping):
        wanted = '"auto", "average", "copy" or a mapping pattern -> policy'
        require(buffers in ("auto", "average", "copy"), "buffers", buffers, wanted)
        return {}
    decided: dict[str, Policy] = {}
    for pattern, policy in buffers.items():
        wanted = '"average", "copy" or "skip"'
        require(policy in get_args(Given), f"buffers[{pattern!r}]", policy, wanted)
        for item in _matches(pattern, names, "buffers"):
            if policy == "average" and not averageable(item.local()):
                raise ValueError(
                    f'buffers[{pattern!r}] is "average", and {item.name} is {item.local().dtype}, which '
                    'has no average; wanted "copy" or "skip"'
                )
            decided.setdefault(item.name, policy)
    return decided


def _matches(pattern: object, names: Mapping[str, Tracked], option: str) -> list[Tracked]:
    """The tensors that a name or pattern means; a name in full means that tensor alone."""
    if not isinstance(pattern, str):
        raise TypeError(f"{option} has the pattern {pattern!r}, wanted a string: a name or a glob")
    matching = [names[name] for name in named(pattern, names)]
    if not matching:
        first = ", ".join(list(names)[:5])
        raise ValueError(
            f"{option} pattern {pattern!r} matches no tensor; the names begin with {first}"
        )
    return matching


def _selector(select: Select, names: Mapping[str, Tracked]) -> Callable[[str], bool]:
    if callable(select):
        return select
    if select == TRAINABLE:
        return names.__contains__
    patterns = [select] if isinstance(select, str) else list(select)
    chosen = {item.name for pattern in patterns for item in _matches(pattern, names, "select")}
    return chosen.__contains__
