"""The contract of a rule, checked where a rule is run: in training and in theory.

A rule of a user may be wrong in ways that no check of its options sees: a fraction outside [0, 1] or
NaN, an unknown slot, a readout that does not sum to 1. Each error names the rule and the tick.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from typing import Any

from polyak._checks import as_number, is_integer, is_number
from polyak.rules import LIVE, RULES, Rule, Tail, Tick

_CHECKED = 3  # updates of the whole contract; later ones leave out names and readouts
_SLACK = 1e-6  # of a sum of coefficients, for rounding


def is_ours(rule: Rule) -> bool:
    """Whether a rule is of this library, where tests hold the contract."""
    while type(rule) is Tail:  # not a user's class that derives from it
        rule = rule.rule
    return type(rule) in RULES


def checked_fraction(rule: Rule, tick: Tick, slot: str, fraction: Any) -> float:
    """A fraction in [0, 1] as a Python float; raises `ValueError` for anything else."""
    number = as_number(fraction)
    if not is_number(number) or not 0 <= number <= 1:
        wanted = "wanted a fraction in [0, 1]"
        raise _error(rule, tick, f"moves slot {slot!r} by {fraction!r}, {wanted}")
    return float(number)


def require_copy(rule: Rule, tick: Tick, slot: str, fraction: float) -> None:
    """Raise `ValueError` unless a slot is one of the rule, and its first move a copy."""
    if not is_ours(rule) and slot not in rule.slots:  # a window's names may be a million
        raise _error(rule, tick, f"moves slot {slot!r}, wanted one of {', '.join(rule.slots)}")
    if fraction != 1:
        problem = f"first moves slot {slot!r} by {fraction!r}, wanted 1"
        raise _error(rule, tick, f"{problem}: a slot has no value before its first copy")


def checked_update(
    rule: Rule, before: Tick, elapsed: float, held: Collection[str]
) -> tuple[Tick, Mapping[str, float]]:
    """The next tick of a rule and its fractions; `held` are the slots that were moved before.

    Raises `ValueError` unless the clock counts one update more and does not go back, and the fractions
    are a mapping. The first updates check their slots and both readouts (`checked_readout`), too.
    """
    given: Any = rule.tick(before, elapsed)
    tick = _as_tick(given)
    if tick is None or tick.n != before.n + 1:
        wanted = "wanted a polyak.rules.Tick with n + 1, n an integer, and with finite numbers"
        raise _error(rule, given, f"follows {before!r}, {wanted}")
    if not (before.t <= tick.t and 0 < tick.elapsed <= tick.t):
        raise _error(rule, tick, f"follows {before!r}, wanted no smaller t, and 0 < elapsed <= t")
    first = before.n < _CHECKED
    if first:
        _require_names(rule, tick)
    fractions: Any = rule.fractions(tick)
    if not isinstance(fractions, Mapping) or (first and not set(fractions) <= set(rule.slots)):
        wanted = f"a mapping slot -> fraction, for slots of {', '.join(rule.slots)}"
        raise _error(rule, tick, f"has the fractions {fractions!r}, wanted {wanted}")
    if first:
        moved = {*held, *fractions}
        checked_readout(rule, tick, rule.readout(tick), moved)
        checked_readout(rule, tick, rule.convex_readout(tick), moved, convex=True)
    return tick, fractions


def _as_tick(value: Any) -> Tick | None:
    """A clock of the same class with Python's numbers, which files hold; None for anything else."""
    if not isinstance(value, Tick):
        return None
    inner = None if value.inner is None else _as_tick(value.inner)
    n, t, elapsed = map(as_number, value[:3])
    plain = is_integer(n, 0) and is_number(t) and is_number(elapsed)
    if not plain or (inner is None) != (value.inner is None):
        return None
    if all(map(operator.is_, (n, t, elapsed, inner), value)):
        return value
    return value._replace(n=n, t=t, elapsed=elapsed, inner=inner)


def _require_names(rule: Rule, tick: Tick) -> None:
    """Raises `ValueError` unless the slots of a rule have names that tell them apart everywhere."""
    slots: Any = rule.slots
    listed = isinstance(slots, tuple | list) and all(isinstance(slot, str) for slot in slots)
    taken = listed and [s for s in slots if s == LIVE or "/" in s or s.endswith(".compensation")]
    if not listed or taken or len(set(slots)) < len(slots):
        wanted = f"a tuple of different names, each without '/', not {LIVE!r} and not ending in '.compensation'"
        raise _error(rule, tick, f"has the slots {slots!r}, wanted {wanted}")


def checked_readout(
    rule: Rule, tick: Tick, readout: Any, held: Collection[str], *, convex: bool = False
) -> dict[str, float]:
    """Coefficients as Python floats: finite, of slots that are held or `live`, of sum 1.

    Those of a convex readout are not below 0. Raises `ValueError` for anything else.
    """
    if is_ours(rule):
        return readout  # type: ignore[no-any-return]
    problem = f"has the {'convex readout' if convex else 'readout'} {readout!r}, wanted"
    known = {*held, LIVE}
    if not isinstance(readout, Mapping) or not set(readout) <= known:
        wanted = f"a mapping slot -> coefficient, for slots of {', '.join(sorted(known))}"
        raise _error(rule, tick, f"{problem} {wanted}")
    coefficients = {slot: as_number(c) for slot, c in readout.items()}
    finite = all(map(is_number, coefficients.values()))
    if not finite or abs(math.fsum(coefficients.values()) - 1) > _SLACK:
        raise _error(rule, tick, f"{problem} finite numbers that sum to 1")
    if convex and min(coefficients.values()) < 0:
        raise _error(rule, tick, f"{problem} no coefficient below 0")
    return coefficients


def _error(rule: Rule, tick: Any, problem: str) -> ValueError:
    return ValueError(f"{rule} at {tick!r} {problem}")
