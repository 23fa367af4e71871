"""Seconds of one core that `theory.profile` takes for a million steps of every rule; wanted: under 2.

Run: python benchmarks/profile_speed.py
"""

from __future__ import annotations

import time

from polyak.rules import RULES
from polyak.specs import parse
from polyak.theory import profile

STEPS = 1_000_000
SPECS = (
    "exponential(0.9999)",
    "exponential(0.9999, debias=True)",
    "exponential(constant(0.9999))",
    "exponential(inverse_power(power=2/3))",
    "exponential(ratio(0.9999))",
    "exponential(cosine(0.996, steps=1000000))",
    "exponential(half_life_ramp(10000))",
    "exponential(anytime_tail(0.1))",
    "exponential(polynomial(3))",
    "power(relative_std=0.1)",
    "uniform()",
    "window(1000)",
    "bema()",
    "tail(exponential(inverse_power()), start=1000)",
    "tail(bema(), start=1000)",
    "article_ema()",
)


def main() -> None:
    """Prints one line per rule, and fails if a rule of the library was left out."""
    rules = [parse(spec) for spec in SPECS]
    missing = set(RULES) - {type(rule) for rule in rules}
    assert not missing, f"no spec for {missing}"
    for rule in rules:
        began = time.process_time()
        profile(rule, STEPS)
        print(f"{time.process_time() - began:6.2f} s  {rule}")


if __name__ == "__main__":
    main()
