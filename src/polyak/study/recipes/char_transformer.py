"""A small transformer that learns to predict the next character of real text."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from polyak.study import Metric, Study, constant, cosine, inverse_sqrt
from polyak.study.recipes._arms import USUAL, averages
from polyak.study.recipes._characters import SOURCE, text
from polyak.study.recipes._transformer import CONTEXT, transformer

STEPS = 400


def next_character(model: nn.Module, rows: Tensor) -> Tensor:
    """The mean cross entropy of the next character, in nats."""
    return nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


study = Study(
    name="char_transformer",
    title="Next character of the Python Language Reference, transformer of 2 blocks",
    model=transformer,
    data=partial(text, length=CONTEXT + 1, validation=100, test=500),
    loss=next_character,
    metrics={"loss": Metric(next_character, title="cross entropy (nats a character)")},
    learning_rates=(0.003, 0.01),
    schedules={"constant": constant, "inverse_sqrt": inverse_sqrt, "cosine": cosine},
    arms=averages(STEPS),
    claims=USUAL,
    steps=STEPS,
    batch_size=8,
    evaluations=5,
    quick={"steps": 100, "arms": averages(100), "seeds": 3},
    source=SOURCE,
)
