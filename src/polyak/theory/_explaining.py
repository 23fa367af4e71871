"""Explaining: every measure of a rule at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from polyak.rules import Rule
from polyak.specs import as_rule
from polyak.theory._measures import (
    cutoff,
    effective_window,
    half_life,
    initial_weight,
    mean_age,
    noise_gain,
    ramp_lag,
    relative_std,
)
from polyak.theory._profiles import profile, require_steps

_ROWS = (
    ("half_life", "half-life", "steps"),
    ("mean_age", "mean age", "steps"),
    ("effective_window", "effective window", "steps"),
    ("noise_gain", "noise gain", "of the variance of white noise"),
    ("relative_std", "relative std", "of the steps so far"),
    ("initial_weight", "weight of the first update", "of 1"),
    ("cutoff", "-3 dB cutoff", "rad/step"),
    ("ramp_lag", "lag on a ramp", "steps"),
)
_SHORTEST = 1000


@dataclass(frozen=True)
class Explanation:
    """What a rule averages after `steps` steps, updated every `every`: the measures of its profile.

    `cutoff` is None where the gain never falls to -3 dB, `relative_std` where there is no spread.

    >>> print(explain("window(100)", 1000))
    window(100) after 1000 steps, updated every step
      half-life                   50         steps
      mean age                    49.5       steps
      effective window            100        steps
      noise gain                  0.01       of the variance of white noise
      relative std                0.0288661  of the steps so far
      weight of the first update  0          of 1
      -3 dB cutoff                0.0278323  rad/step
      lag on a ramp               49.5       steps
    """

    rule: Rule
    steps: int
    every: int
    half_life: float
    mean_age: float
    effective_window: float
    noise_gain: float
    relative_std: float | None
    initial_weight: float
    cutoff: float | None
    ramp_lag: float

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, value to six digits or "none", unit) of every measure, for a table."""
        return [
            (name, "none" if value is None else f"{value:.6g}", unit)
            for field, name, unit in _ROWS
            for value in (getattr(self, field),)
        ]

    def as_dict(self) -> dict[str, str | int | float | None]:
        """Everything by name, the rule as its spec: ready for JSON."""
        return {
            field.name: str(self.rule) if field.name == "rule" else getattr(self, field.name)
            for field in fields(self)
        }

    def title(self) -> str:
        """The rule, the steps and the cadence in one line."""
        cadence = "step" if self.every == 1 else f"{self.every} steps"
        return f"{self.rule} after {self.steps} steps, updated every {cadence}"

    def __str__(self) -> str:
        rows = [f"  {name:26}  {value:9}  {unit}" for name, value, unit in self.rows()]
        return "\n".join([self.title(), *rows])


def explain(rule: Rule | str, steps: int | None = None, *, every: int = 1) -> Explanation:
    """Every measure of a rule's profile after `steps` steps, updated every `every` steps.

    Without `steps`: enough of them for the start to be forgotten (some 17 mean ages), or 10 000 for
    a rule whose window grows with the run.

    >>> round(explain("exponential(0.99)").half_life, 2), explain("uniform()").steps
    (68.97, 10000)

    Raises `ValueError` unless 1 <= every <= steps <= 10^8, and for a spec that does not parse.
    """
    rule = as_rule(rule)
    require_steps(every if steps is None else steps, every)
    if steps is None:
        steps = settled(rule, every=every, tolerance=1e-6, longest=2**18) or every * -(
            -10_000 // every
        )
    c = profile(rule, steps, every=every)
    return Explanation(
        rule=rule,
        steps=int(steps),  # of numpy's integers JSON knows none
        every=int(every),
        half_life=half_life(c),
        mean_age=mean_age(c),
        effective_window=effective_window(c),
        noise_gain=noise_gain(c),
        relative_std=relative_std(c),
        initial_weight=initial_weight(c, every=every),
        cutoff=cutoff(c),
        ramp_lag=ramp_lag(c),
    )


def settled(rule: Rule, *, every: int = 1, tolerance: float, longest: int) -> int | None:
    """Steps after which twice as many leave the mean age as it is; None where it grows with the run.

    The relative change is below `tolerance`; `longest` bounds the search. A mean age of 0 does not
    count: it is the live weights, which may be a burn-in (`Tail`).

    >>> settled(as_rule("exponential(0.99)"), tolerance=1e-3, longest=8000)
    1000
    >>> settled(as_rule("uniform()"), tolerance=1e-3, longest=8000) is None
    True
    """
    steps = every * -(-_SHORTEST // every)
    age = mean_age(profile(rule, steps, every=every))
    while steps < longest:
        later = mean_age(profile(rule, 2 * steps, every=every))
        if age > 0 and math.isclose(age, later, rel_tol=tolerance):
            return steps
        steps, age = 2 * steps, later
    return None
