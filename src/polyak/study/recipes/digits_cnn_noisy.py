"""Digits by the same convolutional network, with 40 % of the training labels wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from polyak.study.recipes import digits_cnn
from polyak.study.recipes._digits import digits

study = replace(
    digits_cnn.study,
    name="digits_cnn_noisy",
    title="Digits, convolutions with BatchNorm, 40 % wrong training labels",
    data=partial(digits, noise=0.4),
)
