"""Arms and claims that most recipes share."""

from __future__ import annotations

import math

from polyak.rules import Exponential, Power, Uniform, Window
from polyak.study import Arm, Claim, Region, Seed, gain

HALF_LIVES = (0.01, 0.03, 0.1, 0.3)
EMAS = tuple(f"ema_{share:.0%}" for share in HALF_LIVES)


def averages(steps: int) -> dict[str, Arm]:
    """EMAs with half-lives of 1 to 30 % of a run of `steps` steps, and four averages of other shapes.

    They are means of the last 10 and 50 %, LAWA's mean of the last 5 of 50 snapshots, and EDM2's power
    function of relative width .1.
    """
    emas = (Arm(Exponential.from_half_life(share * steps)) for share in HALF_LIVES)
    means = {f"mean_{share:.0%}": Arm(Uniform(), start=1 - share) for share in (0.1, 0.5)}
    lawa = Arm(Window(5), every=max(steps // 50, 1))
    power = Arm(Power.from_relative_std(0.1))
    return {**dict(zip(EMAS, emas, strict=True)), **means, "lawa": lawa, "power": power}


AT_A_CONSTANT_RATE = Claim(
    "At a constant learning rate the EMA over 3 % of the run has a loss at least 5 % lower than the live "
    "weights.",
    gain("ema_3%", schedule="constant"),
    Region.above(0.05),
    "the sign: Nemotron 3 Super (arXiv 2604.12374); the bound is ours",
)
AFTER_ANNEALING = Claim(
    "After a cosine to 0 the same EMA changes the loss by at most 2 %.",
    gain("ema_3%", schedule="cosine"),
    Region.between(-0.02, 0.02),
    "the sign: Ajroldi et al. 2025 (arXiv 2502.06761); the bound is ours",
)


def in_place_of_cosine(schedule: str) -> Claim:
    """The claim that averaging under a schedule that needs no end does what annealing does."""

    def quantity(seed: Seed) -> float:
        averaged, annealed = (
            seed.value("ema_3%", schedule=schedule),
            seed.value("live", schedule="cosine"),
        )
        return averaged / annealed - 1

    return Claim(
        f"The EMA over 3 % of the run under the schedule {schedule} has a loss at most 2 % above the live "
        "weights' after a cosine to 0.",
        quantity,
        Region.below(0.02),
        "the sign: Anytime Pretraining (arXiv 2602.03702); the bound is ours",
    )


USUAL = (AT_A_CONSTANT_RATE, AFTER_ANNEALING, in_place_of_cosine("inverse_sqrt"))


def longer_runs_want_longer_averages(metric: str, schedule: str = "constant") -> Claim:
    """The claim that the best half-life, in steps, is longer at the end than after a quarter of the run."""

    def quantity(seed: Seed) -> float:
        curves = [seed.curve(arm, metric, schedule) for arm in EMAS]
        last = len(curves[0])
        best = [min(range(len(EMAS)), key=lambda i: curves[i][n - 1]) for n in (last // 4, last)]
        return math.log2(HALF_LIVES[best[1]] / HALF_LIVES[best[0]])

    return Claim(
        "The EMA that is best at the end has a longer half-life than the one that is best after a quarter "
        "of the run (log2 of the ratio; validation).",
        quantity,
        Region.above(0),
        "the sign: Karras et al. 2023 (arXiv 2312.02696)",
        form="number",
    )
