"""Move the live weights towards an average of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from polyak import _tensors as tensors
from polyak._checks import as_number, is_number, require, require_count
from polyak._dtypes import widest
from polyak._engine import open_swaps
from polyak._engine.live import ModelTensors
from polyak._lazy import LazyTensors
from polyak._modes import forget_computed, no_grad


@dataclass(frozen=True)
class Pull:
    """After each `every`-th update, `live <- lerp(live, average, fraction)`, at updates every, 2 every, ...

    Args:
        fraction: how far the weights move. With 1, training continues from the average.
        every: updates from pull to pull. The averager's own `every` says how many steps an update takes.
        name: the average, if there are several.

    | method | with `Averager(model, rule, every=k, pull=...)` |
    |---|---|
    | Switch-EMA, Hare and Tortoise | `Pull(1.0, every=steps between switches)` |
    | Lookahead(k, alpha) | rule `Exponential((1 - alpha) ** (1 / k))`, every=k, `Pull(1.0)`, and `begin()` |

    >>> Pull(0.5, every=10)
    Pull(fraction=0.5, every=10, name=None)

    Raises `ValueError` for a fraction outside (0, 1] and for `every` < 1. `theory.feedback` has the
    variances. Source: arXiv 1907.08610 (Lookahead), 2402.09240 (Switch-EMA), 2406.02596.
    """

    fraction: float
    every: int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fraction", require_fraction(self.fraction))
        object.__setattr__(self, "every", require_count("pull: every", self.every, "updates"))


def require_fraction(fraction: object) -> float:
    """The fraction of a pull as a float, or `ValueError`."""
    number = as_number(fraction)
    holds = is_number(number) and 0 < number <= 1
    require(holds, "fraction", fraction, "a number in (0, 1]; 1 continues from the average")
    return float(number)


def require_pull(pull: object, names: Iterable[str]) -> None:
    """Raises `TypeError` for another object than a `Pull`, and `ValueError` unless it has its average."""
    if pull is None:
        return
    if not isinstance(pull, Pull):
        raise TypeError(f"pull is {pull!r}, wanted polyak.Pull(fraction, every=n)")
    known = list(names)
    if pull.name not in (known if len(known) > 1 else [None, *known]):
        raise ValueError(f"pull is {pull!r}, wanted the name of an average: {', '.join(known)}")


@no_grad
def pull_(live: ModelTensors, average: LazyTensors, fraction: float) -> None:
    """`weights <- lerp(weights, average, fraction)`, one tensor at a time, rounded once at the end.

    The wider of the two dtypes computes it: in bfloat16 a small pull would be rounded away twice.
    """
    open_swaps.refuse_swapped("pull", live.averaged)
    for item in live.averaged:
        weights, towards = item.local(), average.read(item.name)
        wide = widest([weights.dtype, towards.dtype])
        towards = towards.to(weights.device, wide)
        moved = weights.to(wide)  # the weights themselves where the dtype is the same
        alike = tensors.equal_infinities([moved], [towards])
        moved.lerp_(towards, fraction) if fraction < 1 else moved.copy_(towards)
        tensors.keep_(alike)
        if moved is not weights:
            weights.copy_(moved)
    forget_computed()
