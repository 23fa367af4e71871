"""Averages of other libraries as states of our averagers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from polyak._checks import difference, prefixed, report, require_count
from polyak._dtypes import can_hold
from polyak._engine.slots import COMPENSATION, tick_data
from polyak._engine.states import STATE_FORMAT
from polyak._engine.tracking import Tracked
from polyak._lazy import Held, LazyTensors, Renamed, TensorSpec
from polyak._ranks.shard_geometry import box, whole
from polyak._ranks.sharding import as_distributed, is_distributed, local
from polyak.averager import Averager
from polyak.checkpoints._checkpoint import Checkpoint, Clock
from polyak.checkpoints._names import named
from polyak.checkpoints._read import read_source
from polyak.checkpoints._sniff import Source
from polyak.rules import AVERAGE, Power, Rule
from polyak.specs import as_specs


def foreign_state(
    source: Source | Checkpoint,
    averager: Averager,
    *,
    names: Sequence[str] | None,
    count: int | None,
    change_rule: bool,
) -> dict[str, Any]:
    """The state for this averager from a file of another library; raises as `load`."""
    found = _read(source, averager, names)
    if count is not None and found.live is not None and not found.averages:
        found = replace(found, live=None, averages={AVERAGE: found.live})
    rules = averager.rules
    assumed_rules = {name: found.rules.get(name, rules.get(name)) for name in found.averages}
    require_rules(found.path, rules, assumed_rules, change_rule)
    _say_assumed(found, rules)
    clock = _clock(found, count)
    tracked = averager.tracked
    weights = {name: _complete(found, name, tracked) for name in rules}
    with prefixed(found.path):
        averages = {
            name: {
                "rule": str(rule),
                "tick": tick_data(_clock_under(found, clock, rule).tick(rule, averager.every)),
                "slots": _slots(weights[name], averager.slot_specs(name)),
            }
            for name, rule in rules.items()
        }
    since = clock.since(averager.every)
    last = weights[next(iter(rules))]
    return {
        "format": STATE_FORMAT,
        "calls": since,
        "elapsed": float(since),
        "skipped": 0,
        "copies": {item.name: last[item.name] for item in tracked if item.policy == "copy"},
        "averages": averages,
    }


def _say_assumed(found: Checkpoint, rules: Mapping[str, Rule]) -> None:
    """Warn if the file names no rule: the averager's rules are assumed."""
    assumed = {name: rule for name, rule in rules.items() if name not in found.rules}
    if assumed:
        listed = ", ".join(f"{name}: {rule}" for name, rule in as_specs(assumed).items())
        warn(
            f"{found.path}: this {found.format} file does not name its rule, so this averager's is assumed "
            f"({listed}). If another rule made the file, make the averager with that rule: "
            "polyak.theory.from_library(call) gives it for the library's call",
            stacklevel=5,
        )


def require_rules(
    path: Path, wanted: Mapping[str, Rule], got: Mapping[str, Rule | None], change_rule: bool
) -> None:
    """Raise `ValueError` for missing or extra averages, and for different rules unless `change_rule`."""
    lines = difference(dict.fromkeys(wanted), dict.fromkeys(got))
    if lines:
        raise ValueError(report(f"{path}: the file has other averages than this averager", lines))
    if lines := [] if change_rule else difference(as_specs(wanted), as_specs(got)):
        title = f"{path}: the file has other rules than this averager; pass change_rule=True to continue with this averager's"
        raise ValueError(report(title, lines))


def _read(
    source: Source | Checkpoint, averager: Averager, names: Sequence[str] | None
) -> Checkpoint:
    """Read the file; tensors without names get those of the model's parameters, in order."""
    found = read_source(source, names or "positions") if isinstance(source, Source) else source
    parameters = [item for item in averager.tracked if item.kind != "buffer"]
    trainable = [item.name for item in parameters if item.local().requires_grad]
    averages = {}
    for name, weights in found.averages.items():
        if names is None and list(weights) == [str(i) for i in range(len(weights))]:
            every = [item.name for item in parameters]
            order = trainable if len(weights) == len(trainable) else every
            with prefixed(found.path):
                weights = named(weights, order)
        averages[name] = weights
    return replace(found, averages=averages)


def _clock(found: Checkpoint, count: int | None) -> Clock:
    """The clock of the file's average, from the file or from the count given."""
    if count is not None:
        return Clock(require_count("count", count, "updates made so far"))
    if found.clock is None:
        raise ValueError(
            f"{found.path}: this {found.format} file does not say how many updates its average had; "
            "pass count=N (--count N)"
        )
    return found.clock


def _clock_under(found: Checkpoint, clock: Clock, rule: Rule) -> Clock:
    """The clock as our rule counts it. ema-pytorch's KarrasEMA, stored like its EMA, is one update ahead."""
    if found.format == "ema-pytorch" and isinstance(rule, Power):
        return Clock(clock.count, "updates", ahead=1)
    return clock


def _complete(found: Checkpoint, name: str, tracked: list[Tracked]) -> dict[str, Tensor]:
    """The average of a file, completed by live weights for what the library does not average.

    Sharded tensors are this rank's parts.
    """
    average, live = found.averages[name], found.live
    known = {item.name for item in tracked} | {n for item in tracked for n in item.aliases}
    extra = [each for each in average if each not in known]
    mine = Held({item.name: item.held() for item in tracked})
    tracked = [item for item in tracked if item.stored]
    givers = {item.name: _giver(item, average, live, mine) for item in tracked}
    complete = {name: giver for name, giver in givers.items() if giver is not None}
    if len(complete) < len(givers) or extra:
        wanted = dict.fromkeys(item.name for item in tracked)
        got = dict.fromkeys([*complete, *extra])
        raise ValueError(
            report(
                f"{found.path}: the file has other tensors than this averager",
                difference(wanted, got),
            )
        )
    shards = {item.name: item.held() for item in tracked}
    return local_parts(found.path, name, Renamed(complete), shards)


def _giver(
    item: Tracked, average: LazyTensors, live: LazyTensors | None, mine: LazyTensors
) -> tuple[LazyTensors, str] | None:
    """The source of a tensor, and its name there; None for a weight that the average must have and lacks."""
    for name in (item.name, *item.aliases):
        if name in average:
            return average, name
    if _learns(item):
        return None
    return live if live is not None and item.name in live else mine, item.name


def _learns(item: Tracked) -> bool:
    return item.kind != "buffer" and item.held().requires_grad


def _slots(
    weights: Mapping[str, Tensor], specs: Mapping[str, Mapping[str, TensorSpec]]
) -> dict[str, dict[str, Tensor]]:
    """The slots of an average from its weights; only for a rule whose one slot is the average."""
    plain = [slot for slot in specs if not slot.endswith(COMPENSATION)]
    if plain != [AVERAGE]:
        raise ValueError(
            "the file of another library holds the average alone, and this averager's rule needs the "
            f"slots {', '.join(plain)}: give it a rule of one slot, such as exponential(0.999)"
        )
    slots = {AVERAGE: {n: _widened(n, weights[n], s.dtype) for n, s in specs[AVERAGE].items()}}
    for slot in specs.keys() - slots.keys():
        slots[slot] = {
            n: as_distributed(torch.zeros_like(local(tensor)), tensor)
            for n, tensor in slots[AVERAGE].items()
        }
    return slots


def _widened(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a slot's dtype, which must be able to hold its values."""
    if not can_hold(dtype, tensor.dtype):
        raise ValueError(
            f"{name} is {tensor.dtype}, and the averager's slots are {dtype}, which would round it; "
            f"make the averager with dtype={tensor.dtype}"
        )
    return as_distributed(local(tensor).to(dtype), tensor)


def local_parts(
    path: Path, where: str, tensors: LazyTensors, held: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """This rank's part of each tensor, spread like the tensor of that name in `held`.

    A tensor that is whole in `held`, or not there, is read whole. Raises `ValueError` for a shape that
    is not that of the sharded tensor.
    """
    sharded = {name: held[name] for name in tensors if is_distributed(held.get(name))}
    wanted = {name: tuple(tensor.shape) for name, tensor in sharded.items()}
    if lines := difference(wanted, {name: tensors.specs[name].shape for name in wanted}):
        raise ValueError(report(f"{path}: {where}: the tensors differ", lines))
    return {name: _local_part(tensors, name, sharded.get(name)) for name in tensors}


def _local_part(tensors: LazyTensors, name: str, like: Tensor | None) -> Tensor:
    if like is None:
        return tensors[name]
    assert is_distributed(like)
    part = tensors.read(name, box(like).within(whole(like.shape)))
    return part if is_distributed(part) else as_distributed(part, like)
