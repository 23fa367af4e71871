"""The multiplier of the peak learning rate at every step of a run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from polyak._checks import require, require_count, require_share
from polyak.theory._merging import SHAPES
from polyak.theory._profiles import Profile

_PEAK = 0.8  # the share of the run after which "wsd" falls
_FASTER = 30.0  # "inverse_sqrt" ends at 1 / sqrt(1 + 30) = 0.18

# The multiplier at a share of the run, from 0 to 1; those that anneal go from 1 to 0.
FACTORS: dict[str, Callable[[Profile], Profile]] = {
    "constant": np.ones_like,
    "inverse_sqrt": lambda x: (1 + _FASTER * x) ** -0.5,
    "cosine": SHAPES["cosine"],
    "linear": SHAPES["linear"],
    "wsd": lambda x: SHAPES["sqrt"](np.maximum(x - _PEAK, 0) / (1 - _PEAK)),
}
ANNEALING = ("cosine", "linear", "wsd")


def learning_rates(
    schedule: str, steps: int, *, final: float = 0.0, warmup: float = 0.0
) -> Profile:
    """Compute the multiplier of the peak learning rate at each step of a run: shape (steps,).

    With x = step / steps: "constant" 1; "inverse_sqrt" 1 / sqrt(1 + 30 x); "linear" 1 - x; "cosine"
    (1 + cos(pi x)) / 2; "wsd" 1, and over the last 20 % of the run 1 - sqrt(the share of these
    steps that is done). The last three fall from 1 to `final`: final + (1 - final) * the formula. In the
    share `warmup` of the run all are multiplied by a linear rise.

    >>> learning_rates("linear", 4), learning_rates("cosine", 4, final=0.5)[-1]
    (array([0.75, 0.5 , 0.25, 0.  ]), np.float64(0.5))
    >>> learning_rates("constant", 4, warmup=0.5)
    array([0.5, 1. , 1. , 1. ])

    Raises `ValueError` for another name, for steps < 1, for a final or warmup outside [0, 1], and for
    a final of a schedule that has no end of its own.
    Source: wsd: Hägele et al. (arXiv 2405.18392); inverse_sqrt: arXiv 2602.03702.
    """
    require(schedule in FACTORS, "schedule", schedule, f"one of {', '.join(FACTORS)}")
    steps = require_count("steps", steps)
    final, warmup = require_share("final", final), require_share("warmup", warmup)
    wanted = f"0: only {', '.join(ANNEALING)} fall to a final learning rate"
    require(final == 0 or schedule in ANNEALING, f"final of {schedule}", final, wanted)
    done = np.arange(1, steps + 1)
    factor = final + (1 - final) * FACTORS[schedule](done / steps)
    return factor * np.minimum(1.0, done / max(warmup * steps, 1.0))
