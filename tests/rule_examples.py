"""Examples of every rule, for the laws that hold of all; a rule without one fails a test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polyak import decays
from polyak.rules import (
    ArticleEMA,
    Bema,
    Exponential,
    Power,
    Rule,
    Tail,
    Uniform,
    Window,
)
from quick import some_quick

SCHEDULE_EXAMPLES: dict[type[decays.Schedule], list[decays.Schedule]] = {
    decays.Constant: [decays.Constant(0.9), decays.Constant(0.0), decays.Constant(1.0)],
    decays.InversePower: [decays.InversePower(), decays.InversePower(5.0, 1.0, 0.1, 0.8)],
    decays.Ratio: [decays.Ratio(0.8), decays.Ratio(1.0)],
    decays.Cosine: [decays.Cosine(0.5, steps=30), decays.Cosine(1.0, steps=30, end=0.0)],
    decays.HalfLifeRamp: [decays.HalfLifeRamp(8.0, ratio=0.3)],
    decays.AnytimeTail: [decays.AnytimeTail(0.3)],
    decays.Polynomial: [decays.Polynomial(2.0)],
    decays.Told: [decays.Told(0.8)],
}

RULE_EXAMPLES: dict[type[Rule], list[Rule]] = {
    Exponential: [
        Exponential(0.9),
        Exponential(0.0),
        Exponential(0.9, debias=True),
        Exponential(0.0, debias=True),
        Exponential(1.0),
        Exponential(1.0, debias=True),
        *(Exponential(s) for examples in SCHEDULE_EXAMPLES.values() for s in examples),
    ],
    Power: [Power(3.0), Power(0.0), Power(-0.3), Power.from_relative_std(0.1)],
    Uniform: [Uniform()],
    Window: [Window(1), Window(5), Window(100)],
    Bema: [Bema(), Bema(kappa=0.7, eta=0.3, gamma=2.0, rho=1.0)],
    Tail: [Tail(Uniform(), 10), Tail(Window(4), 7), Tail(Tail(Bema(), 3), 6.5)],
    ArticleEMA: [ArticleEMA(0.9, 5), ArticleEMA(0.9, 0, 2.0, 0.75, 0.2, first_copy=False)],
}

_QUICK = [
    *(examples[0] for examples in RULE_EXAMPLES.values()),
    Exponential(0.9, debias=True),
    Exponential(decays.InversePower()),
]


def each_rule(rules: Iterable[Rule]) -> list[Any]:
    """Rules for a law; the quick tests try one of each class, one debiased, one with a schedule."""
    return some_quick(rules, lambda rule: rule in _QUICK)  # a law may have fewer rules
