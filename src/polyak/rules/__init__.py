"""Rules: what an average is. Each average is two lines of linear algebra; only the scalars differ.

    update :  slot    <- lerp(slot, live, fraction)      for each slot that moves
    readout:  average  = sum of coefficient * slot       coefficients sum to 1; "live" may be a term

A rule gives the scalars. Its clock is a `Tick`, and each update makes the next one:

    tick = rule.tick(tick, elapsed)      n updates so far, the time t after the last, its elapsed time
    rule.fractions(tick)                 {slot: fraction}; slots without a fraction stay
    rule.readout(tick)                   {slot or "live": coefficient}

A fraction of 1 is a copy. The first move of a slot is a copy, so a slot needs no initial value.
A rule sees floats, never a tensor. The averager applies it to the weights of a model, `theory`
applies it to unit impulses, so training and theory cannot disagree.

>>> rule = Exponential(0.75)
>>> first = rule.tick(START, 1.0)
>>> rule.fractions(first), rule.fractions(rule.tick(first, 1.0)), rule.readout(first)
({'average': 1.0}, {'average': 0.25}, {'average': 1.0})

A new rule is one frozen dataclass in this package and one line in `RULES`. A rule of your own is a
frozen dataclass that derives from `Rule`; polyak checks its first updates, and each of its clocks and fractions.
Files store its text, so its fields must be numbers, rules and schedules, or its class sets `SAVABLE = False`.
"""

from __future__ import annotations

from polyak.rules._means import Power, Tail, Uniform, Window
from polyak.rules._published import ArticleEMA, Bema
from polyak.rules._rule import AVERAGE, LIVE, START, Exponential, Rule, Tick, convex

__all__ = [
    "AVERAGE", "LIVE", "RULES", "START", "ArticleEMA", "Bema", "Exponential", "Power", "Rule",
    "Tail", "Tick", "Uniform", "Window", "convex",
]  # fmt: skip

RULES: tuple[type[Rule], ...] = (
    Exponential, Power, Uniform, Window, Bema, Tail, ArticleEMA,
)  # fmt: skip
