"""Measures of each average (half-life, lag, ...) as hyper-parameters for a framework's logger."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from polyak.averager import Averager
from polyak.theory import explain

_MOST = 10**8  # steps of a profile


def measures(averager: Averager, steps: float) -> dict[str, Any]:
    """Return the rule, half-life and mean age of each average, both in steps, after `steps` steps.

    If the number of steps is unknown or too large, they are those of a long run.
    """
    known = int(steps) if 1 <= steps <= _MOST else None
    values: dict[str, Any] = {}
    for name, rule in averager.rules.items():
        seen = explain(rule, known, every=averager.every)
        values |= {f"{name}/rule": str(rule), f"{name}/half_life": seen.half_life}
        values |= {f"{name}/mean_age": seen.mean_age}
    return values


def tell(loggers: Iterable[Any], averager: Averager, steps: float) -> None:
    """Give Lightning's loggers the measures as hyper-parameters, beside those that they have.

    A tracker that refuses them ends no training: MLflow refuses a value that a run has already.
    """
    values = measures(averager, steps)
    for logger in loggers:
        known = getattr(logger, "hparams", None)  # TensorBoard shows the last ones alone
        try:
            logger.log_hyperparams({**(known if isinstance(known, Mapping) else {}), **values})
        except NotImplementedError:  # Fabric's CSVLogger has no hyper-parameters
            pass
        except Exception as error:
            text = f"{type(logger).__name__} refused the averages' hyper-parameters: {error}"
            warnings.warn(text, stacklevel=2)


def numbers(averager: Averager, steps: float) -> dict[str, float]:
    """Return the measures without the rules, for a logger that takes no text."""
    values = measures(averager, steps)
    return {name: value for name, value in values.items() if not isinstance(value, str)}
