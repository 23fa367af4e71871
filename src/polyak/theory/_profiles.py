"""The coefficients of an average, found by running its rule.

A rule gets one unit impulse per update. The result is the coefficient of every step's live
weights in the average. There is no formula of any average here: each rule that `Averager` can train
with has a profile, and the two are the same numbers.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polyak._checks import require, require_count
from polyak._contract import (
    checked_fraction,
    checked_readout,
    checked_update,
    is_ours,
    require_copy,
)
from polyak.rules import LIVE, START, Rule, Tick
from polyak.specs import as_rule

Profile = npt.NDArray[np.float64]

# Steps of the longest profile: 0.8 GB of coefficients.
LONGEST = 10**8

# A weight below this is 0: its square would be a denormal number, and those are slow.
NOTHING = 1e-150


def profile(rule: Rule | str, steps: int, *, every: int = 1) -> Profile:
    """Compute the coefficient of each step's live weights in the average after `steps` steps.

    `average = sum_i profile[i] * live[i]`: shape (steps,), float64, index 0 is step 1; sums to 1.
    The rule is updated at steps 1, `every` + 1, 2 `every` + 1, ..., as `Averager` does, and read out
    after step `steps`. The other steps have coefficient 0. A rule with a term in the live weights
    (`Bema`) has it on the last step.

    >>> profile("exponential(0.5)", 4)
    array([0.125, 0.125, 0.25 , 0.5  ])
    >>> profile("exponential(0.5)", 4, every=2)
    array([0.25, 0.  , 0.75, 0.  ])

    The first update copies, so its coefficient includes the weight of the start: decay ** (steps - 1).
    A million steps take about a second. Raises `ValueError` unless `every` and `steps` are integers
    from 1 to 10^8, and for a rule that breaks its contract.
    """
    rule = as_rule(rule)
    steps, every = checked_steps(steps, every)
    result = np.zeros(steps)
    later = (steps - 1) // every
    result[::every], live = _impulse_response(rule, [1.0, *[float(every)] * later])
    result[-1] += live
    return result


def coefficients(rule: Rule | str, elapsed: Sequence[float], *, convex: bool = False) -> Profile:
    """Compute the coefficient of each update's live weights, for updates at any times.

    `elapsed[i]` > 0 is the time from the update before (or from the start) to update i, in the
    rule's unit: steps, samples, tokens. Shape (updates,), float64; sums to 1. With `convex` they
    are the coefficients of running statistics (`Rule.convex_readout`), none below 0.

    >>> coefficients("power(0)", [1, 1, 2])
    array([0.25, 0.25, 0.5 ])

    Raises `ValueError` for no update, for a time that is not finite and above 0, and for a rule
    that breaks its contract.
    """
    result, live = _impulse_response(as_rule(rule), checked_times(elapsed), convex=convex)
    result[-1] += live
    return result


def stretches(rule: Rule, steps: int, *, unit: int, every: int) -> tuple[Profile, float]:
    """The coefficients of stretches of `unit` steps each, and that of the first update alone.

    The rule is updated at step 1 and then at the last update of each stretch. For a rule that
    rescales by the elapsed time, these are the sums of its profile over the stretches, so that a
    profile of any length has few numbers. `unit` is a multiple of `every`, and the last of the
    `steps` is an update; the stretch that it ends has `every` - 1 steps more.
    """
    count = -(-steps // unit)
    if unit == every:
        sums = coefficients(rule, [1, *[every] * (count - 1)])
        return sums, float(sums[0])
    times = [1, unit - every, *[unit] * (count - 1)]
    sums = coefficients(rule, times)
    return np.append(sums[0] + sums[1], sums[2:]), float(sums[0])


def checked_times(elapsed: Sequence[float]) -> list[float]:
    """The time that each update spans, or `ValueError`."""
    times = np.asarray(elapsed, dtype=np.float64)
    if times.ndim != 1 or len(times) == 0:
        raise ValueError(
            f"elapsed has shape {times.shape}, wanted (updates,): the time that each update spans"
        )
    if wrong := [time for time in times.tolist() if not 0 < time < float("inf")]:
        raise ValueError(f"elapsed has {wrong[0]!r}, wanted finite numbers > 0")
    result: list[float] = times.tolist()
    return result


def checked_steps(steps: int, every: int) -> tuple[int, int]:
    """Steps and cadence as ints; raises `ValueError` unless a profile of this length fits an array."""
    every, steps = require_count("every", every), require_count("steps", steps)
    for name, value in (("every", every), ("steps", steps)):
        wanted = f"at most {LONGEST:,}: a profile holds a coefficient for every step"
        require(value <= LONGEST, name, value, wanted)
    return steps, every


class Moves(NamedTuple):
    """The moves of one slot: the updates, counted from 0, and the fraction at each; a copy is 1."""

    updates: npt.NDArray[np.int64]
    fractions: Profile


def run(rule: Rule, elapsed: list[float]) -> tuple[dict[str, Moves], Tick]:
    """Run a rule: the moves of each slot that moved, and the clock after the last update."""
    done: dict[str, tuple[array[int], array[float]]] = {}
    tick, next_tick, fractions_at = START, rule.tick, rule.fractions
    fractions: Mapping[str, float]
    ours = is_ours(rule)
    for update, time in enumerate(elapsed):
        if ours:
            tick = next_tick(tick, time)
            fractions = fractions_at(tick)
        else:
            tick, fractions = checked_update(rule, tick, time, done)
        for slot, fraction in fractions.items():
            if not (type(fraction) is float and 0 <= fraction <= 1):
                fraction = checked_fraction(rule, tick, slot, fraction)
            if slot not in done:
                require_copy(rule, tick, slot, fraction)
                done[slot] = array("q"), array("d")
            updates, moved = done[slot]
            updates.append(update)
            moved.append(fraction)
    return {slot: Moves(*map(np.array, moves)) for slot, moves in done.items()}, tick


def response(fractions: Profile) -> tuple[Profile, float]:
    """The content of a slot after moves: the coefficient of each one's live weights, and of the old value.

    `fraction * product of (1 - fraction)` over the later moves; a copy forgets all that was before.
    """
    kept = np.ones(len(fractions) + 1)
    kept[:-1] = np.cumprod((1 - fractions)[::-1])[::-1]
    kept[kept < NOTHING] = 0.0
    return fractions * kept[1:], float(kept[0])


def _impulse_response(
    rule: Rule, elapsed: list[float], *, convex: bool = False
) -> tuple[Profile, float]:
    """The coefficient of every update's live weights, and of the live weights at the readout."""
    moves, tick = run(rule, elapsed)
    result, live = np.zeros(len(elapsed)), 0.0
    readout = rule.convex_readout(tick) if convex else rule.readout(tick)
    for slot, coefficient in checked_readout(rule, tick, readout, moves, convex=convex).items():
        if slot == LIVE:
            live = coefficient
        elif len(moves[slot].updates) == 1:  # a copy; a long window has very many of them
            result[moves[slot].updates[0]] += coefficient
        else:
            updates, fractions = moves[slot]
            result[updates] += coefficient * response(fractions)[0]
    return result, live
