"""All optimizers of a training, attached to an averager."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from polyak._engine.attachment import Attachment, movers
from polyak.averager import Averager


def attach_all(averager: Averager, optimizers: Sequence[Any], scaler: Any) -> Attachment:
    """Attach the optimizers that move averaged weights.

    A trainer has given all of its optimizers. So weights that none of them has need no warning.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"attach: .* averaged parameters, and not ")
        return averager.attach(movers(averager.tracked, optimizers), scaler)
