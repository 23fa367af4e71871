"""Averages in ignite: an evaluator for each average, and what `Checkpoint` saves of it.

    averager = polyak.Averager(model, {"ema": "exponential(half_life=500)"})
    averager.attach(optimizer)
    live = make_evaluator()
    engines = evaluators(averager, make_evaluator)
    best = Checkpoint({"model": Weights(averager, "ema")}, folder, score_function=...)
    engines["ema"].add_event_handler(Events.COMPLETED, best)
    last = Checkpoint({"trainer": trainer, "model": model, "averager": averager}, folder)

`averager.attach` counts optimizer steps, so gradient accumulation and a `GradScaler` are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from polyak.averager import Averager
from polyak.integrations._arguments import require_kind
from polyak.integrations._extra import extra
from polyak.integrations._measures import numbers

with extra("ignite", "ignite"):
    from ignite.engine import Engine, Events
    from ignite.handlers.base_logger import BaseLogger

__all__ = ["Weights", "evaluators", "log_measures"]

Apply = Callable[[], AbstractContextManager[object]]
"""Makes a block in which the model has an average."""


def evaluators(averager: Averager, make: Callable[[], Engine]) -> dict[str, Engine]:
    """Return an evaluator for each average; while it runs, the model has the average's weights.

    `make` returns a new evaluator of the model, with its metrics. The model has its live weights again
    before the handlers of `Events.COMPLETED`, `TERMINATE` and `INTERRUPT` that are added afterwards, and
    before every handler of `Events.EXCEPTION_RAISED`.

    Raises `TypeError` for an averager or engine of another type, and `ValueError` if `make` returns
    one engine twice. A run raises `RuntimeError` before the first update.
    """
    require_kind("evaluators", "averager", averager, Averager)
    engines = {name: make() for name in averager.rules}
    if len(set(map(id, engines.values()))) < len(engines):
        raise ValueError("make returned the same engine twice, wanted a new one at each call")
    for name, engine in engines.items():
        require_kind("evaluators", "what make returned", engine, Engine)
        block, apply = ExitStack(), partial(averager.applied, name)
        # Handlers that are added later, such as a checkpoint's, must see live weights.
        for event in (Events.TERMINATE, Events.INTERRUPT, Events.COMPLETED):
            engine.add_event_handler(event, block.close)
        # With a handler of our own for it, ignite would not raise the exception.
        vars(engine)["_handle_exception"] = partial(_failed, apply, block, engine._handle_exception)
        vars(engine)["run"] = partial(_run, apply, block, engine.run)
    return engines


def _run(apply: Apply, block: ExitStack, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with block:
        block.enter_context(apply())
        return run(*args, **kwargs)


def _failed(
    apply: Apply, block: ExitStack, handle: Callable[[BaseException], None], error: BaseException
) -> None:
    block.close()
    handle(error)
    block.enter_context(apply())  # after an exception that handlers have swallowed, epochs go on


def log_measures(
    logger: BaseLogger, trainer: Engine, averager: Averager, *, steps: float = 0
) -> None:
    """Log each average's half-life and mean age to a logger of ignite when a training starts.

    They are in steps, `averages/<name>/half_life` and `averages/<name>/mean_age`. `steps` is the length of
    the whole training; 0 if it is unknown. Raises `TypeError` for an argument of another type.
    """
    require_kind("log_measures", "averager", averager, Averager)
    require_kind("log_measures", "trainer", trainer, Engine)
    require_kind("log_measures", "logger", logger, BaseLogger)
    logger.attach_output_handler(
        trainer, Events.STARTED, "averages", output_transform=lambda _: numbers(averager, steps)
    )


class Weights:
    """An average as an object that `Checkpoint(to_save=...)` saves under the model's own names.

    `model.load_state_dict` takes what it saves. To resume, save the averager itself.
    """

    def __init__(self, averager: Averager, name: str | None = None) -> None:
        require_kind("Weights", "averager", averager, Averager)
        self._averager, self._name = averager, name

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average as plain tensors; raises `RuntimeError` before the first update."""
        return self._averager.average(self._name)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise `TypeError`: an average cannot continue from weights without a clock."""
        raise TypeError(
            f"{len(state_dict)} weights have no clock, so an average cannot continue from them: save and load "
            "the averager, to_save={'averager': averager}, or load these into the model"
        )
