"""Settings: all numbers of the experiment, with the article's values as defaults.

>>> Settings().learning_rate, Settings(max_epochs=3) == Settings(max_epochs=3)
(0.001, True)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from polyak.rules import ArticleEMA


@dataclass(frozen=True)
class Settings:
    """The article's experiment: data, model, training, average and stopping, in this order.

    `epochs_after_stop` belongs to the study: each run continues for so many epochs after the early
    stop, to see what the stop avoided. They are not part of what the article measures.
    """

    rows: int = 2000
    features: int = 20
    noise: float = 0.1
    data_seed: int = 42
    validation_share: float = 0.2
    batch_size: int = 32
    hidden: tuple[int, ...] = (64, 32)
    dropout: float = 0.2
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    lr_factor: float = 0.5
    lr_patience: int = 10
    max_epochs: int = 500
    stop_patience: int = 20
    ema_beta: float = 0.999
    ema_update_after_step: int = 100
    ema_power: float = 2 / 3
    epochs_after_stop: int = 25

    def article_rule(self) -> ArticleEMA:
        """The article's EMA, which sets the learning rate and the early stop."""
        return ArticleEMA(
            beta=self.ema_beta,
            update_after_step=self.ema_update_after_step,
            power=self.ema_power,
        )


def as_json(settings: Settings) -> dict[str, Any]:
    """The settings as they are after a round trip through JSON: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return plain


def fingerprint(conditions: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that identify the conditions."""
    return hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:12]
