"""The methods of a transformers Trainer that must know of averages: `evaluate`, `save_model`, `train`.

A callback does not get the Trainer. It is called for each evaluation set separately, for a save only after
the push to the hub, and not for a save on SIGTERM. So `hook` wraps these methods of one Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper, wraps
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from polyak.integrations._states import NO_DEEPSPEED, require_apart

Callbacks = Callable[[], list[Any]]
Metrics = dict[str, float]


def hook(trainer: Any, kind: type) -> None:
    """Wrap the methods of a Trainer, once; they ask the callbacks of a kind that it has then."""

    def callbacks() -> list[Any]:
        return [each for each in trainer.callback_handler.callbacks if isinstance(each, kind)]

    if not isinstance(trainer.evaluate, _Evaluate):
        trainer.evaluate = _Evaluate(trainer, callbacks)
        trainer.save_model = _saving(trainer, callbacks)
        trainer.train = _training(trainer, callbacks)


def require_possible(callback: Any, args: Any, state: Any, best: str | None) -> None:
    """Raise `ValueError` for a training that the callback cannot follow; `best` lacks its metric."""
    if args.deepspeed or getattr(
        args, "hf_deepspeed_config", None
    ):  # accelerate's launcher sets it
        raise ValueError(NO_DEEPSPEED)
    if best is not None:
        raise ValueError(
            f"metric_for_best_model is {args.metric_for_best_model!r}, but a callback alone evaluates "
            f"no average {best!r}: call attach(trainer)"
        )
    sets = getattr(callback.trainer, "eval_dataset", None)
    if isinstance(sets, dict):
        for name in callback.rules:
            _require_free(f"eval_{name}", [f"eval_{each}_loss" for each in sets])
    begun = vars(state).setdefault("averages", {})  # each training has its own TrainerState
    others = [list(each.rules) for each in begun if each is not callback]
    require_apart(list(callback.rules), others, "two callbacks of this training")
    begun[callback] = None


def owner(metric: str, names: Iterable[str]) -> str | None:
    """The average that a metric, without its "eval_", belongs to: the longest name that it begins with."""
    return max((n for n in names if metric.startswith(f"{n}_")), key=len, default=None)


def require_trained(model: torch.nn.Module, trainer: Any) -> None:
    """Raise `RuntimeError` if the Trainer has a model other than the one that was trained and averaged."""
    if trainer is not None and trainer.model is not model:
        raise RuntimeError(
            "trainer.model is not the model that was trained and averaged: call train(), or "
            "trainer.remove_callback() with the AveragerCallback"
        )
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):  # of PEFT
        raise RuntimeError(
            "an adapter is merged into the base weights, where its average has no effect: call "
            "model.unmerge_adapter() first"
        )


class _Evaluate:
    """Evaluates the live weights, then every average as `<prefix>_<name>`; all metrics in one result."""

    def __init__(self, trainer: Any, callbacks: Callbacks) -> None:
        self._trainer, self._callbacks, self._evaluate = trainer, callbacks, trainer.evaluate
        self._inside = False
        update_wrapper(self, trainer.evaluate)

    def __call__(self, *args: Any, **kwargs: Any) -> Metrics:
        if self._inside:  # the Trainer evaluates each set of a dictionary by this method again
            result: Metrics = self._evaluate(*args, **kwargs)
            return result
        self._inside = True
        try:
            return self._evaluate_all(*args, **kwargs)
        finally:
            self._inside = False

    def _evaluate_all(self, *args: Any, **kwargs: Any) -> Metrics:
        due = [(each, name) for each in self._callbacks() for name in each.ready()]
        names = [name for _, name in due]
        live: Metrics = self._evaluate(*args, **kwargs)
        metrics = dict(live)
        for callback, name in due:
            prefix, call = self._prefixed(name, args, kwargs)
            own = f"{prefix}_{name}"
            _require_free(own, live)
            rename = partial(_renamed, prefix, own)
            with ExitStack() as stack:
                stack.enter_context(callback.averager.applied(name))
                stack.enter_context(_same_randomness(self._trainer.args.device))
                stack.enter_context(_telling(self._trainer, rename))
                found = rename(call())
            for key in [key for key in found if key.startswith(own)]:
                _require_owner(key.removeprefix(f"{prefix}_"), name, names)
                metrics[key] = found[key]
        return metrics

    def _prefixed(self, name: str, args: Any, kwargs: Any) -> tuple[str, Callable[[], Metrics]]:
        """The prefix of the live weights' metrics, and a call like theirs with the average's, if it takes one."""
        parameters = signature(self._evaluate).parameters
        own = parameters.get("metric_key_prefix")
        prefix = own.default if own is not None else "eval"
        prefix = args[2] if len(args) > 2 else kwargs.get("metric_key_prefix", prefix)
        if own is None and all(each.kind is not each.VAR_KEYWORD for each in parameters.values()):
            return prefix, partial(self._evaluate, *args, **kwargs)
        options = {**kwargs, "metric_key_prefix": f"{prefix}_{name}"}
        return prefix, partial(self._evaluate, *args[:2], **options)


def _renamed(prefix: str, own: str, metrics: Metrics) -> Metrics:
    """An average's metrics, each under a name of its own, also where a Trainer writes "eval_" by itself."""

    def name(key: str) -> str:
        others = key.startswith(f"{prefix}_") and not key.startswith(f"{own}_")
        return own + key.removeprefix(prefix) if others else key

    return dict(zip(map(name, metrics), metrics.values(), strict=True))


@contextmanager
def _telling(trainer: Any, rename: Callable[[Metrics], Metrics]) -> Iterator[None]:
    """A block in which callbacks and the log get metrics under other names."""
    handler, state = trainer.callback_handler, trainer.state
    call, before = handler.call_event, len(state.log_history)

    def renamed(event: str, *args: Any, **kwargs: Any) -> Any:
        for key in {"logs", "metrics"} & kwargs.keys():
            kwargs[key] = rename(kwargs[key])
        return call(event, *args, **kwargs)

    handler.call_event = renamed
    try:
        yield
    finally:
        del handler.call_event
        state.log_history[before:] = map(rename, state.log_history[before:])


def _require_free(own: str, live: Iterable[str]) -> None:
    """Raise `ValueError` if a metric of the live weights could be taken for one of the average."""
    if taken := [key for key in live if key.startswith(f"{own}_")]:
        raise ValueError(
            f"the live weights have the metric {taken[0]!r} already, so metrics of the average would "
            f"begin with {own!r} too: give the average another name, or the evaluation set or metric"
        )


def _require_owner(metric: str, name: str, names: Iterable[str]) -> None:
    """Raise `ValueError` if a metric of one average could be taken for another's."""
    if (other := owner(metric, names)) != name:
        raise ValueError(
            f"{metric!r} is a metric of the average {name!r}, but its name is that of a metric of {other!r}: "
            "give one of the averages another name, or the evaluation set or metric"
        )


@contextmanager
def _same_randomness(device: torch.device) -> Iterator[None]:
    """A block that leaves torch's generators as they were: every DataLoader draws a seed from them."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _saving(trainer: Any, callbacks: Callbacks) -> Callable[..., None]:
    save_model = trainer.save_model

    @wraps(save_model)
    def saving(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        for callback in callbacks():
            folder = Path(trainer.args.output_dir if output_dir is None else output_dir)
            callback.write(folder, lambda path: save_model(str(path), _internal_call=True))
        save_model(output_dir, *args, **kwargs)

    return saving


def _training(trainer: Any, callbacks: Callbacks) -> Callable[..., Any]:
    train = trainer.train

    @wraps(train)
    def training(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        is_path = isinstance(resume_from_checkpoint, (str, PathLike))
        for callback in callbacks():
            callback.resume_from = Path(resume_from_checkpoint) if is_path else None
        return train(resume_from_checkpoint, *args, **kwargs)

    return training
