"""The values of a quantity for which a claim is true."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """The values of a quantity for which a sentence is true, bounds included.

    >>> 0.0 in Region.above(0), 0.5 in Region.above(0), str(Region.between(0, 2))
    (False, True, 'from 0 to 2')
    """

    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def above(cls, bound: float) -> Region:
        """Values > bound."""
        return cls(low=math.nextafter(bound, math.inf))

    @classmethod
    def below(cls, bound: float) -> Region:
        """Values < bound."""
        return cls(high=math.nextafter(bound, -math.inf))

    @classmethod
    def between(cls, low: float, high: float) -> Region:
        """Values from low to high, both included."""
        return cls(low, high)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return self.words(lambda bound: f"{bound:.6g}")

    def words(self, form: Callable[[float], str]) -> str:
        """The region in words; `form` writes a bound."""
        # An open bound at 0 is the smallest number above or below it.
        low, high = (form(0.0 if abs(b) <= math.ulp(0.0) else b) for b in (self.low, self.high))
        if math.isinf(self.low):
            return f"below {high}"
        return f"above {low}" if math.isinf(self.high) else f"from {low} to {high}"
