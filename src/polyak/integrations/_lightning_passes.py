"""One pass of a Lightning evaluation loop that nothing but its own metrics notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch

from polyak.integrations._arguments import is_named
from polyak.integrations._extra import extra

with extra("lightning", "lightning", "torchmetrics"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.seed import isolate_rng
    from torchmetrics import Metric, MetricCollection

Contents = list[dict[str, Any]]
"""The attributes of each of a module's torchmetrics."""


def wrap(owner: Any, method: str, wrapper: partial[Any]) -> None:
    """Let a method of one object be called through a wrapper, once for all callbacks."""
    inner = getattr(owner, method)
    if getattr(inner, "func", None) is not wrapper.func:
        vars(owner)[method] = partial(wrapper, inner)


@contextmanager
def unnoticed(
    trainer: Trainer, loop: Any, callbacks: list[Callback], own: Contents
) -> Iterator[None]:
    """A block in which a loop can run once more, with these callbacks alone.

    The training draws the same random numbers as without it. `own` keeps what the module's
    torchmetrics hold at its end, and gives it to them at the next block.
    """
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(_alone(trainer, loop, callbacks))
        stack.enter_context(_metrics_of(trainer.lightning_module, own))
        yield


@contextmanager
def _alone(trainer: Any, loop: Any, callbacks: list[Callback]) -> Iterator[None]:
    """A block that other callbacks, and the loop's progress, do not notice; a progress bar shows it."""
    kept = trainer.callbacks, loop.batch_progress, loop.restarting
    # A bar draws itself in a thread of its own, which looks for it among the callbacks.
    bars = [each for each in trainer.callbacks if is_named(each, "ProgressBar")]
    trainer.callbacks = [*bars, *callbacks]
    loop.batch_progress, loop.restarting = deepcopy(loop.batch_progress), False
    try:
        yield
    finally:
        trainer.callbacks, loop.batch_progress, loop.restarting = kept


@contextmanager
def renaming(module: LightningModule, rename: Callable[[str], str]) -> Iterator[None]:
    """A block in which `module.log` gives every metric another name; blocks may be nested.

    The finder of the largest batch runs the loop again while it runs.
    """
    log, own = module.log, vars(module).get("log")

    # A compiled step that calls it would be compiled again for every name.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def renamed(name: str, *args: Any, **kwargs: Any) -> None:
        log(rename(name), *args, **kwargs)

    vars(module)["log"] = renamed
    try:
        yield
    finally:
        del vars(module)["log"]
        if own is not None:
            vars(module)["log"] = own


@contextmanager
def _metrics_of(module: LightningModule, own: Contents) -> Iterator[None]:
    """A block in which the module's torchmetrics have an average's contents, which `own` keeps."""
    metrics = [m for m in module.modules() if isinstance(m, (Metric, MetricCollection))]
    live = [dict(vars(metric)) for metric in metrics]
    if not own:
        for metric in metrics:
            states = metric.metric_state if isinstance(metric, Metric) else {}
            # `reset` empties a list in place, and this one is the live weights'.
            vars(metric).update((n, []) for n, state in states.items() if isinstance(state, list))
        for metric in metrics:
            metric.reset()
    for metric, content in zip(metrics, own, strict=False):
        vars(metric).update(content)
    try:
        yield
    finally:
        own[:] = [dict(vars(metric)) for metric in metrics]
        for metric, content in zip(metrics, live, strict=True):
            vars(metric).update(content)
