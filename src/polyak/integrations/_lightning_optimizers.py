"""The optimizers of a Lightning training, attached to an averager."""

from __future__ import annotations

from typing import Any

from polyak._engine.attachment import Attachment
from polyak._engine.optimizers import movers
from polyak.averager import Averager
from polyak.integrations._arguments import is_named
from polyak.integrations._extra import extra

with extra("lightning", "lightning"):
    from lightning.pytorch.utilities import rank_zero_warn


def warn_if_waiting(averager: Averager | None, attachment: Attachment | None) -> None:
    """Warn if the first update waits for an optimizer that takes no step."""
    if averager and averager.count == 0 and attachment is not None and attachment.waiting:
        rank_zero_warn(
            "there is no average yet. Several optimizers move averaged weights, so an update waits until each "
            "of them has stepped. One has not stepped. To average the weights of one optimizer, name them: "
            'select="generator.*"'
        )


def attach_all(averager: Averager, trainer: Any) -> Attachment:
    """Attach the optimizers that move averaged weights.

    The trainer has all optimizers there are. So weights that none of them has need no warning.

    Raises `ValueError` if the module has none, and what `Averager.attach` raises.
    """
    if any(is_named(each, "_MockOptimizer") for each in trainer.optimizers):
        raise ValueError(
            "configure_optimizers returned no optimizer, so no step would update the averages: "
            "return one, or remove the AveragerCallback"
        )
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return averager._attach(movers(averager.tracked, trainer.optimizers), scaler, complete=True)
