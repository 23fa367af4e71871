"""Digits by the same MLP, with 40 % of the training labels wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from polyak.study.recipes import digits_mlp
from polyak.study.recipes._digits import digits

study = replace(
    digits_mlp.study,
    name="digits_mlp_noisy",
    title="Digits, MLP 64-128-128-10, 40 % wrong training labels",
    data=partial(digits, noise=0.4),
)
