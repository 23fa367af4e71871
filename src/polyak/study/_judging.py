"""Turn each claim of a study into an interval over seeds, and decide its verdict.

Claims with one sentence are the parts of a judgement, which holds if all of them hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polyak.study._claims import Claim
from polyak.study._errors import placed
from polyak.study._result import PairedQuantity, Result, Seed
from polyak.study._statistics import (
    FEWEST_SEEDS,
    ClaimVerdict,
    Interval,
    Statistic,
    bootstrap,
    combined,
    known,
    share,
    verdict,
)
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
        """The mean or median over seeds with its interval as text."""
        return between(self.interval, FORMS[self.claim.form])

    @property
    def quantity(self) -> str:
        """Describe the figure: its statistic, its number of seeds, and how many have no value."""
        note = getattr(self.claim.quantity, "note", "")
        why = f" ({note})" if note else ""
        missing = f", {self.missing} more without a value{why}" if self.missing else ""
        said = f"{self.claim.what}, " if self.claim.what else ""
        geometric = "geometric " if self.claim.form in ("factor", "percent") else ""
        few = ", too few for a verdict" if self.too_few else ""
        over = f"over {self.interval.seeds} seed{'s' * (self.interval.seeds != 1)}{missing}{few}"
        return f"{said}{geometric}{self.claim.statistic} {over}"

    @property
    def too_few(self) -> bool:
        """Whether the claim is undecided whatever its interval, since it has too few seeds."""
        return self.interval.seeds < FEWEST_SEEDS

    @property
    def verdict(self) -> ClaimVerdict:
        """The verdict on the claim alone."""
        return verdict(self.interval, self.claim.region)


@dataclass(frozen=True)
class Judgement:
    """A sentence with its parts, all of which it needs."""

    sentence: str
    parts: tuple[Judged, ...]

    @property
    def source(self) -> str:
        """Where the sentence comes from."""
        return self.parts[0].claim.source

    @property
    def verdict(self) -> ClaimVerdict:
        """The verdict on the sentence."""
        return combined([part.verdict for part in self.parts])


def judge(result: Result) -> list[Judgement]:
    """Judge every claim of a study over its seeds."""
    sentences: dict[str, list[Judged]] = {}
    for claim in result.study.claims:
        sentences.setdefault(claim.sentence, []).append(_judged(claim, result.seeds))
    return [Judgement(sentence, tuple(parts)) for sentence, parts in sentences.items()]


def over_seeds(what: str, quantity: Callable[[Seed], float], seeds: Sequence[Seed]) -> list[float]:
    """The quantity of every seed that has one. Raise `ValueError` that names `what` if it is not a number."""
    values = []
    for seed in seeds:
        try:
            values.append(float(quantity(seed)))
        except Exception as error:
            mend = "correct it and run the study again: its records are kept"
            where = f"the quantity of {what}, for seed {seed.number}"
            raise ValueError(f"{where}, raised {placed(error)}; {mend}") from error
    return known(values)


def interval(
    values: Sequence[float], statistic: Statistic = "mean", quantity: object = None
) -> Interval:
    """The mean or median with its bootstrap interval; for zeros and ones the share with its exact interval.

    If a value is not finite, it is the median. A comparison of equal arms is 0, which is not a share.
    """
    if set(values) <= {0.0, 1.0} and not isinstance(quantity, PairedQuantity):
        return share([value == 1.0 for value in values])
    return bootstrap(values, statistic if all(map(math.isfinite, values)) else "median")


def _judged(claim: Claim, seeds: Sequence[Seed]) -> Judged:
    values = over_seeds(f"the claim {claim.sentence!r}", claim.quantity, seeds)
    return Judged(
        claim, interval(values, claim.statistic, claim.quantity), len(seeds) - len(values)
    )


def as_json(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """For each claim its sentence, verdict, and parts with estimate, interval, seeds and region, for JSON."""
    return [
        {
            "claim": judgement.sentence,
            "source": judgement.source,
            "verdict": judgement.verdict,
            "parts": [
                {
                    "quantity": part.quantity,
                    "verdict": part.verdict,
                    "holds if": str(part.claim.region),
                    **part.interval.as_dict(),
                    "seeds without a value": part.missing,
                }
                for part in judgement.parts
            ],
        }
        for judgement in judgements
    ]
