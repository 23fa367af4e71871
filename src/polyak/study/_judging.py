"""Judging: each claim of a study becomes an interval over seeds, and the one rule gives its verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polyak.study._result import Result, Seed
from polyak.study._statistics import ClaimVerdict, Interval, bootstrap, share, verdict
from polyak.study._study import Claim
from polyak.study._text import FORMS, between


@dataclass(frozen=True)
class Judged:
    """A claim, its interval over seeds, and the number of seeds for which its quantity has no value."""

    claim: Claim
    interval: Interval
    missing: int

    @property
    def wanted(self) -> str:
        """The region in words, in the form of the quantity."""
        return self.claim.region.words(FORMS[self.claim.form])

    @property
    def figure(self) -> str:
        """The mean over seeds with its interval as text."""
        return between(self.interval, FORMS[self.claim.form])

    @property
    def verdict(self) -> ClaimVerdict:
        """The verdict on the claim."""
        return verdict(self.interval, self.claim.region)


def judge(result: Result) -> list[Judged]:
    """Judge every claim of a study over its seeds."""
    return [_judged(claim, result.seeds) for claim in result.study.claims]


def over_seeds(quantity: Callable[[Seed], float], seeds: Sequence[Seed]) -> list[float]:
    """The quantity of every seed that has one."""
    values = [float(quantity(seed)) for seed in seeds]
    return [value for value in values if not math.isnan(value)]


def interval(values: Sequence[float]) -> Interval:
    """The mean with its bootstrap interval; of zeros and ones the share with its exact interval."""
    if set(values) <= {0.0, 1.0}:
        return share([value == 1.0 for value in values])
    return bootstrap(values, "mean" if all(map(math.isfinite, values)) else "median")


def _judged(claim: Claim, seeds: Sequence[Seed]) -> Judged:
    values = over_seeds(claim.quantity, seeds)
    return Judged(claim, interval(values), len(seeds) - len(values))


def as_json(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """For each claim its sentence, verdict, estimate, interval, seeds and region, for JSON."""
    return [
        {
            "claim": each.claim.sentence,
            "source": each.claim.source,
            "verdict": each.verdict,
            "holds if": str(each.claim.region),
            **each.interval.as_dict(),
            "seeds without a value": each.missing,
        }
        for each in judged
    ]
