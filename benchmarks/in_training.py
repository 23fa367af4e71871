"""What the comparisons beside frameworks' own averages measure alike: time, memory, and how far averages are."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

State = dict[str, Tensor]
T = TypeVar("T")


def furthest(a: State, b: State) -> float:
    """The largest difference between tensors of one name, of those in `b`."""
    return max((a[name] - tensor).abs().max().item() for name, tensor in b.items())


def in_turns(
    make: Mapping[str, T], rounds: int, steps: Callable[[T], list[float]]
) -> dict[str, float]:
    """The time of a step: the median over rounds that take turns, of the medians within them."""
    found: dict[str, list[float]] = {name: [] for name in make}
    for _ in range(rounds):
        for name, each in make.items():
            found[name].append(statistics.median(steps(each)))
    return {name: statistics.median(each) for name, each in found.items()}


def held(train: Callable[[], object]) -> int:
    """The bytes of all tensors after a training, while what it returns is there."""
    gc.collect()
    kept = train()
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    del kept
    return sum(storages.values())
