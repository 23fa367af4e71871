"""A diffusion model of eight Gaussians in the plane, judged by its loss and by the points that it draws."""

from __future__ import annotations

from polyak.study import Claim, Metric, Region, Study, constant, cosine, difference
from polyak.study.recipes import _samples as samples
from polyak.study.recipes._arms import (
    AFTER_ANNEALING,
    AT_A_CONSTANT_RATE,
    EMAS,
    averages,
    longer_runs_want_longer_averages,
)
from polyak.study.recipes._diffusion import Denoiser, denoising_loss, mixture, of_samples

STEPS, BATCH = 2000, 128


def larger_decay(metric: str, direction: str, region: Region) -> Claim:
    """The claim that the slowest EMA has a lower or higher metric than the fastest."""
    return Claim(
        f"At a constant rate the EMA over 30 % of the run has a {direction} {metric} than that over 1 %.",
        difference(EMAS[-1], against=EMAS[0], metric=metric, schedule="constant"),
        region,
        "said of image models in 2026: larger decays trade recall for precision",
    )


study = Study(
    name="diffusion_2d",
    title="Diffusion model of eight Gaussians in the plane",
    model=Denoiser,
    data=mixture(STEPS * BATCH),
    loss=denoising_loss,
    metrics={
        "loss": Metric(denoising_loss, title="denoising loss"),
        "mmd": Metric(of_samples(samples.squared_mmd), title="squared MMD of 400 samples"),
        "precision": Metric(of_samples(samples.precision), lower_is_better=False),
        "recall": Metric(of_samples(samples.recall), lower_is_better=False),
    },
    learning_rates=(0.003, 0.01),
    schedules={"constant": constant, "cosine": cosine},
    arms=averages(STEPS),
    claims=(
        AT_A_CONSTANT_RATE,
        AFTER_ANNEALING,
        longer_runs_want_longer_averages("mmd"),
        larger_decay("precision", "higher", Region.above(0)),
        larger_decay("recall", "lower", Region.below(0)),
    ),
    steps=STEPS,
    batch_size=BATCH,
    evaluations=4,
    quick={"steps": 600, "arms": averages(600), "seeds": 3},
    source="drawn from a mixture with equal weights, centres on the unit circle, deviation .1",
)
