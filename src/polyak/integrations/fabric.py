"""Averages in a loop of Lightning Fabric: an averager of what `setup` has made.

    model, optimizer = fabric.setup(model, optimizer)
    averager = average(fabric, model, "exponential(half_life=500)", optimizer)
    ...
    with averager.applied():
        evaluate(model)
    fabric.save("last.ckpt", {"model": model, "optimizer": optimizer, "averager": averager})

`fabric.load` with the same mapping resumes bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyak.averager import Averager
from polyak.integrations._arguments import is_named
from polyak.integrations._extra import extra
from polyak.integrations._measures import tell
from polyak.rules import Rule

with extra("fabric", "lightning"):
    from lightning.fabric import Fabric

__all__ = ["average"]


def average(
    fabric: Fabric,
    model: Any,
    rule: Rule | str | Mapping[str, Rule | str],
    optimizers: Any,
    *,
    steps: float = 0,
    **options: Any,
) -> Averager:
    """Return an averager of a model that Fabric has set up; it updates after each optimizer step.

    Names are those of the plain model. A step that Fabric's `GradScaler` skips makes no update, and
    gradient accumulation with `no_backward_sync` counts optimizer steps. Each average's rule, half-life
    and mean age go to Fabric's loggers as hyper-parameters.

    Args:
        model: what `fabric.setup` or `fabric.setup_module` returned.
        optimizers: one or several, as `averager.attach` takes them.
        steps: the steps of the whole training, for the hyper-parameters; 0 if unknown.
        options: the other arguments of `Averager`.

    `fabric.save` takes the averager as any object with a state, but keeps only the first rank's part of
    a sharded one: save that with `polyak.save`.

    Raises `TypeError` for a model that Fabric has not set up or another `fabric`, and what `Averager` and `attach` raise.
    """
    if not is_named(fabric, "Fabric"):
        got = type(fabric).__name__
        raise TypeError(f"average: fabric is of type {got}, wanted lightning.Fabric")
    if not is_named(getattr(model, "_orig_mod", model), "_FabricModule"):
        got = type(model).__name__
        raise TypeError(f"model is a plain {got}, wanted what fabric.setup(model, ...) returned")
    # Fabric's wrapper has the model under two names.
    averager = Averager(model.module, rule, **options)
    averager.attach(optimizers, getattr(fabric.strategy.precision, "scaler", None))
    tell(fabric.loggers, averager, steps)
    return averager
