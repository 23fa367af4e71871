"""The factor of the learning rate over a run.

A schedule is a function of the share of the run that is done: 0 at the first step, (steps - 1) / steps at
the last. `Plateau` follows the validation of an arm instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from polyak._checks import is_integer, require, require_not_negative, require_positive
from polyak.rules import LIVE
from polyak.study._errors import said
from polyak.theory._rates import FACTORS

Factor = Callable[[float], float]


def constant(share: float) -> float:
    """Return 1 at every share of the run."""
    return _factor("constant", share)


def inverse_sqrt(share: float) -> float:
    """Return `(1 + 30 share)^-1/2`: from 1 to .18, as in Anytime Pretraining (arXiv 2602.03702)."""
    return _factor("inverse_sqrt", share)


def cosine(share: float) -> float:
    """Return `(1 + cos(pi share)) / 2`: from 1 to 0."""
    return _factor("cosine", share)


def linear(share: float) -> float:
    """Return `1 - share`: from 1 to 0."""
    return _factor("linear", share)


def wsd(share: float) -> float:
    """Return 1 for 80 % of the run, then `1 - sqrt` of the share of the rest: from 1 to 0."""
    return _factor("wsd", share)


@lru_cache(maxsize=256)  # stacked runs ask for the same step one after another
def _factor(schedule: str, share: float) -> float:
    return float(FACTORS[schedule](np.asarray(share)))


@dataclass(frozen=True)
class Plateau:
    """Lower the learning rate when the validation of an arm stalls, and stop when it stalls for longer.

    Args:
        arm: the arm whose validation value of the main metric decides.
        factor: what the learning rate is multiplied with.
        patience: evaluations without an improvement before it is lowered, as torch's
            `ReduceLROnPlateau` counts them.
        stop: evaluations in a row without a strictly better value before the run stops; None never
            stops.
        after: evaluations for which the run continues after the stop. They are recorded as
            "after_stop", and are not part of the run.

    Raises `ValueError` for a factor outside (0, 1) and for counts that are not positive.
    """

    arm: str = LIVE
    factor: float = 0.5
    patience: int = 10
    stop: int | None = None
    after: int = 0

    def __post_init__(self) -> None:
        require_positive("factor", self.factor)
        require(self.factor < 1, "factor", self.factor, "a number below 1")
        require(is_integer(self.patience, 0), "patience", self.patience, "an integer >= 0")
        require(is_integer(self.after, 0), "after", self.after, "an integer >= 0")
        wanted = "an integer >= 1, or None"
        require(self.stop is None or is_integer(self.stop, 1), "stop", self.stop, wanted)


Schedule = Factor | Plateau
PLACES = tuple(i / 200.025 for i in range(201))
"""The shares of a run at which a schedule is tried; every 25th is shown."""


def factor_at(name: str, schedule: Factor, share: float) -> float:
    """The factor of a schedule at a share of the run. Raise `ValueError` unless it is finite and >= 0."""
    where = f"schedule {name!r}, with {share:.3g} of the run done,"
    return require_not_negative(where, schedule(share), "a finite factor >= 0")


def require_factors(name: str, schedule: Factor) -> None:
    """Raise `ValueError` unless a schedule has a factor at all `PLACES`."""
    require(
        callable(schedule), f"schedule {name!r}", schedule, "a function of the share, or Plateau"
    )
    for share in PLACES:
        try:
            factor_at(name, schedule, share)
        except ValueError:
            raise
        except Exception as error:
            where = f"at the share {share:.3g}"
            raise ValueError(f"schedule {name!r} raised {said(error)} {where}") from error


def described(schedule: Schedule) -> str:
    """A schedule as text, so that two can be compared: its factor at nine places, and the mean over more."""
    if isinstance(schedule, Plateau):
        return repr(schedule)
    factors = [float(schedule(share)) for share in PLACES]
    shown = " ".join(f"{factor:.4g}" for factor in factors[::25])
    return f"{shown}, mean {math.fsum(factors) / len(factors):.6g}"
