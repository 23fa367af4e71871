"""Judging: the quality that a user's function gives to weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from polyak._checks import require

Better = Literal["lower", "higher"]
Evaluate = Callable[[dict[str, Tensor]], float]


def sign_of(better: Better) -> int:
    """What makes a quality one of which the higher is better; `ValueError` for another word."""
    require(better in get_args(Better), "better", better, '"lower" or "higher"')
    return 1 if better == "higher" else -1


def quality_of(evaluate: Evaluate, weights: dict[str, Tensor], where: str) -> float:
    """The quality of weights; `ValueError` with `where` unless it is a finite number."""
    quality = evaluate(weights)
    try:
        number = float(quality)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"evaluate gave {quality!r} {where}, wanted a finite number")
    return number
