"""Profiles: what an average averages, found by running its rule.

A rule is fed one unit impulse per update; what comes out is the coefficient of every step's live
weights in the average. No formula of any average stands here: a rule that `Averager` can train
with has a profile, and the two are the same numbers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polyak._checks import is_integer, require
from polyak.rules import LIVE, START, Rule, Tick
from polyak.specs import as_rule

Profile = npt.NDArray[np.float64]

# Steps of the longest profile: 0.8 GB of coefficients.
LONGEST = 10**8

# A weight below this is 0: its square would be a denormal number, and those are slow.
NOTHING = 1e-150


def profile(rule: Rule | str, steps: int, *, every: int = 1) -> Profile:
    """The coefficient of each step's live weights in the average after `steps` steps.

    `average = sum_i profile[i] * live[i]`: shape (steps,), float64, index 0 is step 1; sums to 1.
    The rule is updated at steps `every`, 2 `every`, ... with elapsed time `every`, and read out
    after step `steps`; the other steps have coefficient 0. A rule with a term in the live weights
    (`Bema`) has it on the last step.

    >>> profile("exponential(0.5)", 4)
    array([0.125, 0.125, 0.25 , 0.5  ])
    >>> profile("exponential(0.5)", 4, every=2)
    array([0.  , 0.25, 0.  , 0.75])

    The first update copies, so it carries the weight of the start: decay ** (updates - 1).
    A million steps take about a second. Raises `ValueError` unless 1 <= every <= steps <= 10^8.
    """
    rule = as_rule(rule)
    require_steps(steps, every)
    updates = steps // every
    sampled, live = _impulse_response(rule, [float(every)] * updates)
    result = np.zeros(steps)
    result[every - 1 : updates * every : every] = sampled
    result[-1] += live
    return result


def coefficients(rule: Rule | str, elapsed: Sequence[float], *, convex: bool = False) -> Profile:
    """The coefficient of each update's live weights, for updates at any times.

    `elapsed[i]` > 0 is the time from the update before (or from the start) to update i, in the
    rule's unit: steps, samples, tokens. Shape (updates,), float64; sums to 1. With `convex` they
    are the coefficients of running statistics (`Rule.convex_readout`), none below 0.

    >>> coefficients("power(0)", [1, 1, 2])
    array([0.25, 0.25, 0.5 ])

    Raises `ValueError` for no update, or for a time that is not finite and above 0.
    """
    result, live = _impulse_response(as_rule(rule), checked_times(elapsed), convex=convex)
    result[-1] += live
    return result


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


def require_steps(steps: int, every: int) -> None:
    """Raises `ValueError` unless an update happens within the steps, and they fit an array."""
    for name, value in (("every", every), ("steps", steps)):
        require(is_count(value), name, value, "an integer >= 1")
        wanted = f"at most {LONGEST:,}: a profile holds a coefficient for every step"
        require(value <= LONGEST, name, value, wanted)
    if steps < every:
        raise ValueError(
            f"steps is {steps} and every is {every}: no update has happened yet, so there is no"
            f" average; ask for {every} steps or more"
        )


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1, of Python or of numpy."""
    return is_integer(int(value) if isinstance(value, np.integer) else value, 1)


class Moves(NamedTuple):
    """Of one slot: the updates that moved it, counted from 0, and its fraction at each; a copy is 1."""

    updates: npt.NDArray[np.int64]
    fractions: Profile


def run(rule: Rule, elapsed: list[float]) -> tuple[dict[str, Moves], Tick]:
    """All that a rule does: the moves of each slot that has any, and the clock after the last."""
    done: dict[str, tuple[array[int], array[float]]] = {}
    tick, next_tick, fractions_at = START, rule.tick, rule.fractions
    for update, time in enumerate(elapsed):
        tick = next_tick(tick, time)
        for slot, fraction in fractions_at(tick).items():
            if slot not in done:
                _require_copy(rule, slot, fraction)
                done[slot] = array("q"), array("d")
            updates, fractions = done[slot]
            updates.append(update)
            fractions.append(fraction)
    return {slot: Moves(*map(np.array, each)) for slot, each in done.items()}, tick


def response(fractions: Profile) -> tuple[Profile, float]:
    """What moves leave in a slot: the coefficient of each one's live weights, and of the old value.

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
    for slot, coefficient in readout.items():
        if slot == LIVE:
            live = coefficient
        else:
            updates, fractions = moves[slot]
            result[updates] += coefficient * response(fractions)[0]
    return result, live


def _require_copy(rule: Rule, slot: str, fraction: float) -> None:
    if fraction != 1:
        raise ValueError(
            f"{rule} first moves slot {slot!r} by a fraction of {fraction}, wanted 1: a slot has no"
            " value before its first copy"
        )
