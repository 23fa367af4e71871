"""Lines about decisions: whether an average gains under a schedule, and how sure a verdict over few seeds is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from polyak.rules import Exponential
from polyak.study._region import Region
from polyak.study._reproduce import Line
from polyak.theory import learning_rates, profile, quadratic_moments

_BATCHES = 1, 10, 100  # three sizes of the gradient's noise


def lines() -> list[Line]:
    """All lines on decisions; they are exact."""
    return [*_schedules(), *_two_seeds()]


class Least(NamedTuple):
    """The least losses over learning rates: live, the best EMA at that rate, the best EMA at its own."""

    live: float
    same: float
    own: float
    raised: float


@cache
def _least(schedule: str, batch: int, steps: int = 3000) -> Least:
    """Of 300 directions h = 1/i with gradient noise h / batch, after 3000 steps with 1 % warm-up."""
    h, peaks = 1 / np.arange(1, 301), np.geomspace(0.02, 1.9, 20)
    shares = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)
    rules = [Exponential(0.0), *(Exponential(half_life=share * steps) for share in shares)]
    rates = np.outer(peaks, learning_rates(schedule, steps, warmup=0.01))
    moments = quadratic_moments([profile(rule, steps) for rule in rules], rates, h)
    losses = moments.loss(h, h / batch)
    base, emas = int(losses[0].argmin()), losses[1:]
    own = float(peaks[int(emas.min(axis=0).argmin())] / peaks[base])
    return Least(float(losses[0, base]), float(emas[:, base].min()), float(emas.min()), own)


def _gain(measure: str, schedule: str, worst: Callable[[Sequence[float]], float]) -> float:
    """The least or largest gain of an EMA over three noises, as `worst` chooses."""
    found = [_least(schedule, batch) for batch in _BATCHES]
    return worst([1 - getattr(each, measure) / each.live for each in found])


def _schedules() -> Iterator[Line]:
    topic = "schedules on the quadratic, best learning rates, three noises"
    yield Line.claim(
        topic, "constant rate: least gain of an EMA at the live weights' rate",
        "large: Nemotron 3 Super 2026, arXiv 2604.12374", Region.above(0.2), lambda: _gain("same", "constant", min),
    )  # fmt: skip
    yield Line.claim(
        topic, "cosine to 0: largest gain of an EMA at the live weights' rate",
        "gone: arXiv 2604.12374; Ajroldi et al. 2025, arXiv 2502.06761", Region.below(0.09),
        lambda: _gain("same", "cosine", max),
    )  # fmt: skip
    yield Line.claim(
        topic, "cosine to 0: largest gain of an EMA at its own rate", "arXiv 2502.06761", Region.below(0.09),
        lambda: _gain("own", "cosine", max),
    )  # fmt: skip
    yield Line.claim(
        topic, "1/sqrt with an EMA / cosine to 0 without: largest ratio of losses",
        "comparable: Anytime Pretraining 2026, arXiv 2602.03702", Region.below(1.05),
        lambda: max(_least("inverse_sqrt", b).own / _least("cosine", b).live for b in _BATCHES),
    )  # fmt: skip
    yield Line.claim(
        topic, "constant rate with an EMA / cosine to 0 without: largest ratio of losses",
        "comparable: Anytime Pretraining 2026, arXiv 2602.03702", Region.below(1.05),
        lambda: max(_least("constant", b).own / _least("cosine", b).live for b in _BATCHES),
    )  # fmt: skip
    yield Line.claim(
        topic, "constant rate: best rate of an EMA / of the live weights, least",
        "an EMA needs less decay of the rate: arXiv 2411.18704", Region.above(1.5),
        lambda: min(_least("constant", b).raised for b in _BATCHES),
    )  # fmt: skip


# The change of four metrics, in %, by one decay (.999 -> .9995), in two comparisons over 2 seeds each.
_TWICE = ((-0.5, 2.2), (-2.7, -0.4), (-0.4, 2.6), (1.4, 2.7))


def _two_seeds() -> Iterator[Line]:
    topic, source = (
        "one decay, judged over 2 seeds, twice",
        "wandb/senpai, pull requests 2141 and 2244",
    )
    yield Line.claim(
        topic, "metrics of 4 whose sign should flip, by the spread of the 8 figures; 2 did", source,
        Region.between(1, 3), _expected_flips,
    )  # fmt: skip
    yield Line.figure(
        topic, "probability that two such verdicts contradict, for a change that helps in 3 of 4 seeds",
        "2 p (1 - p), p = Phi(sqrt 2 Phi^-1(.75))", 0.282, 0.005, lambda: _contradict(0.75, 2),
    )  # fmt: skip
    yield Line.claim(
        topic, "the same over 16 seeds", "2 p (1 - p), p = Phi(4 Phi^-1(.75))", Region.below(0.01),
        lambda: _contradict(0.75, 16),
    )  # fmt: skip


def _expected_flips() -> float:
    """Each metric's mean is its effect; the difference of a pair has twice the variance of one figure."""
    deviation = math.sqrt(sum((a - b) ** 2 for a, b in _TWICE) / (2 * len(_TWICE)))
    up = [NormalDist().cdf((a + b) / 2 / deviation) for a, b in _TWICE]
    return math.fsum(2 * p * (1 - p) for p in up)


def _contradict(share: float, seeds: int) -> float:
    """Normal differences that help in a share of seeds: two means over this many seeds differ in sign."""
    p = NormalDist().cdf(math.sqrt(seeds) * NormalDist().inv_cdf(share))
    return 2 * p * (1 - p)
