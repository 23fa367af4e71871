"""Which averages papers found best, for which schedules, with what gain."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A finding of a paper: the average, its gain, the kind of schedule, the paper.

    `anneals` says whether the learning rate falls to about 0 in it; None for both kinds.
    """

    average: str
    gain: str
    anneals: bool | None
    source: str


PUBLISHED = (
    Published(
        "mean or EMA of about 1 % of the run",
        "18 % fewer steps to a target; final loss 3.0425 -> 3.0413",
        True,
        "Ajroldi et al. 2025, arXiv 2502.06761",
    ),
    Published(
        "EMA of decay .968 to .998 per 16 steps: half-life 341 to 5540 steps",
        "CIFAR-100 accuracy 77.6 -> 78.6 %; with 40 % wrong labels 55.5 -> 65.2 %",
        True,
        "Morales-Brotons et al. 2024, arXiv 2411.18704 (the average stopped early)",
    ),
    Published(
        "mean of the last 25 % of the epochs, constant or cyclic rate",
        "CIFAR-100 accuracy 80.8 -> 81.5 %",
        False,
        "SWA, arXiv 1803.05407",
    ),
    Published(
        "mean of windows of up to 2500 steps",
        "lower loss at a constant rate; does not reach a cooldown's",
        False,
        "Hägele et al. 2024, arXiv 2405.18392",
    ),
    Published(
        "EMA whose half-life is a share of the steps so far",
        "with a rate of 1/sqrt comparable to tuned cosine",
        False,
        "Anytime Pretraining 2026, arXiv 2602.03702 (abstract)",
    ),
    Published(
        "merge of checkpoints in a window",
        "+2 to +4 points at the stable rate; largely gone after the decay",
        None,
        "Nemotron 3 Super 2026, arXiv 2604.12374 (abstract)",
    ),
    Published(
        "power(relative_std=.05) to power(relative_std=.25), best .09 to .13",
        "diffusion models; the best one changes with the configuration",
        False,
        "EDM2, arXiv 2312.02696",
    ),
)


def published(*, anneals: bool) -> tuple[Published, ...]:
    """The findings of papers for schedules that anneal, or for those that do not."""
    return tuple(each for each in PUBLISHED if each.anneals in (None, anneals))
