"""The clock of a rule after many updates, without a step for each where the rule's clock is known."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat

from polyak.rules._means import Tail
from polyak.rules._published import Bema
from polyak.rules._rule import START, Rule, Tick

MOST_STEPS = 10**7
"""The most updates that are stepped one by one: some ten seconds."""


def tick_after(rule: Rule, count: int, first: float, elapsed: float) -> Tick:
    """The clock after `count` updates: `first` is the time of the first, `elapsed` that between others.

    Raises `ValueError` for more than `MOST_STEPS` updates of a rule of a user that has its own `tick`.
    """
    clock = type(rule).tick
    if count == 0:
        return START
    tick = Tick(count, first + (count - 1) * elapsed, first if count == 1 else elapsed)
    if clock is Rule.tick:
        return tick
    if isinstance(rule, Tail) and clock is Tail.tick:
        before = 0 if first > rule.start else int((rule.start - first) // elapsed) + 1
        before = min(count - 1, before)  # the updates after which the inner clock began again
        time = elapsed if before else first
        return tick._replace(inner=tick_after(rule.rule, count - before, time, elapsed))
    if clock is Bema.tick:
        since = Tick(count - 1, (count - 1) * elapsed, elapsed) if count > 1 else START
        return tick._replace(inner=since)
    if count > MOST_STEPS:
        raise ValueError(
            f"{rule} has its own tick(), so polyak steps its clock once for each update: got {count} "
            f"updates, wanted at most {MOST_STEPS}. Load a saved state of this rule, or pass a smaller count"
        )
    return ticked(rule, chain([first], repeat(elapsed, count - 1)))


def ticked(rule: Rule, elapsed: Iterable[float]) -> Tick:
    """The clock of a rule after updates that span these times."""
    tick = START
    for time in elapsed:
        tick = rule.tick(tick, time)
    return tick
