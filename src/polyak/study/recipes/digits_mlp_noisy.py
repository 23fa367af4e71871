"""Digits by the same MLP, with 40 % of the training labels wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from polyak.study import Claim, Region, gain
from polyak.study.recipes import digits_mlp
from polyak.study.recipes._arms import USUAL
from polyak.study.recipes._digits import digits

LABEL_NOISE = Claim(
    "With 40 % wrong training labels and a constant rate, the EMA over 10 % of the run names at least 10 % "
    "fewer images wrongly than the live weights.",
    gain("ema_10%", metric="error", schedule="constant"),
    Region.above(0.10),
    "the sign: Morales-Brotons et al. 2024 (arXiv 2411.18704), section 4.3; the bound is ours",
)

study = replace(
    digits_mlp.study,
    name="digits_mlp_noisy",
    title="Digits, MLP 64-128-128-10, 40 % wrong training labels",
    data=partial(digits, noise=0.4),
    claims=(*USUAL, LABEL_NOISE),
)
