"""The founding article: a small regression, with an EMA whose validation loss sets the rate and the stop."""

from __future__ import annotations

from functools import partial
from itertools import chain, pairwise

import torch
from torch import nn

from polyak.rules import ArticleEMA, Uniform, Window
from polyak.study import Arm, Ensemble, Plateau, Study
from polyak.study.recipes._article_claims import CLAIMS, EMA
from polyak.study.recipes._article_published import PUBLISHED
from polyak.study.recipes._regression import CAVEATS, METRICS, SOURCE, data, mse

EPOCH = 50  # steps: 1600 rows in batches of 32


def network() -> nn.Module:
    """20-64-32-1 with ReLU and dropout, and Xavier's weights."""
    linear = [nn.Linear(*sizes) for sizes in pairwise((20, 64, 32, 1))]
    for layer in linear:
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    hidden = ((layer, nn.ReLU(), nn.Dropout(0.2)) for layer in linear[:-1])
    return nn.Sequential(*chain.from_iterable(hidden), linear[-1])


study = Study(
    name="article",
    title="The founding article's regression",
    model=network,
    data=data,
    loss=mse,
    metrics=METRICS,
    optimizer=partial(torch.optim.Adam, weight_decay=1e-5),
    learning_rates=(1e-3,),
    schedules={"plateau": Plateau(EMA, factor=0.5, patience=10, stop=20, after=25)},
    arms={
        EMA: Arm(ArticleEMA(beta=0.999, update_after_step=100, power=2 / 3)),
        **{f"ema_{decay}": f"exponential({decay})" for decay in (0.9, 0.99, 0.995, 0.999)},
        "ema_0.999_debiased": "exponential(0.999, debias=True)",
        **{f"sma_{size}": f"window({size})" for size in (100, 500, 1000)},
        **{f"lawa_{size}": Arm(Window(size), every=EPOCH) for size in (5, 10, 20)},
        "swa_75": Arm(Uniform(), every=EPOCH, start=75 / 500),
        **{f"ensemble_{size}": Ensemble(size, every=EPOCH) for size in (5, 10, 20)},
    },
    claims=CLAIMS,
    published=PUBLISHED,
    caveats=CAVEATS,
    steps=500 * EPOCH,
    evaluations=500,
    batch_size=32,
    seeds=64,
    stacked=32,
    quick={"seeds": 8},
    source=SOURCE,
)
