"""Decay schedules: the weight of the old average as a function of time.

A schedule is a number that changes. `schedule(t)` is the decay per unit of time at time `t`, the
time *after* the update: 1 at the first update of a loop that counts steps. An update that spans
`elapsed` units of time uses `schedule(t) ** elapsed`, so a coarser cadence keeps the half-life.

>>> ramp = Ratio(max_decay=0.999)
>>> [round(ramp(t), 3) for t in (1, 2, 10, 100_000)]
[0.1, 0.182, 0.526, 0.999]

Each rule that takes a decay takes a schedule: `Exponential(Ratio(max_decay=0.999))`.
A new schedule is a frozen dataclass in this package and one line in `SCHEDULES`.
"""

from __future__ import annotations

from polyak.decays._ramps import Cosine, HalfLifeRamp, InversePower, Ratio, inverse_power
from polyak.decays._schedule import Constant, Schedule, Told, rate_of
from polyak.decays._tails import AnytimeTail, Polynomial

__all__ = [
    "SCHEDULES", "AnytimeTail", "Constant", "Cosine", "HalfLifeRamp", "InversePower",
    "Polynomial", "Ratio", "Schedule", "Told", "inverse_power", "rate_of",
]  # fmt: skip

SCHEDULES: tuple[type[Schedule], ...] = (
    Constant, InversePower, Ratio, Cosine, HalfLifeRamp, AnytimeTail, Polynomial, Told,
)  # fmt: skip
