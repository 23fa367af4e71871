"""Let joblib compute the runs of a study, in processes of this machine or on a Ray cluster."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cloudpickle
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from joblib.parallel import get_active_backend

from polyak._checks import require
from polyak.study._errors import said

BACKENDS = ("loky", "ray")
Killed = tuple[type[Exception], ...]


@contextmanager
def computing_on(backend: str) -> Iterator[Killed]:
    """Let joblib use a backend in the block; it gets the errors that tell of a killed process.

    "ray" joins the cluster of RAY_ADDRESS, or starts Ray on this machine and ends it after the block.

    Raises `ValueError` for an unknown backend, and for "ray" where it is not installed.
    """
    require(backend in BACKENDS, "backend", backend, " or ".join(BACKENDS))
    if backend == "loky":
        # After Ctrl-C joblib warns that the study has too many runs. All threads share the filters, so
        # this one stays.
        warnings.filterwarnings("ignore", r"\d+ tasks which were still being processed")
        yield (TerminatedWorkerError,)
        return
    try:
        import ray
        from ray.util.joblib import register_ray
    except ModuleNotFoundError as error:
        missing = f"backend 'ray' needs {error.name}, which is not installed"
        raise ValueError(f'{missing}: install polyak with its extra "ray"') from None

    register_ray()
    ours = not ray.is_initialized()
    if ours:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    try:
        with parallel_config(backend="ray"):
            yield (ray.exceptions.RayActorError,)
    finally:
        if ours:
            ray.shutdown()


def computed(calls: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """The results of (function, *inputs) in the order in which they finish.

    Ray's backend cannot give results one by one, so it gets as many calls at once as it has workers.

    Raises `ValueError` for a call that cannot be sent to another process.
    """
    if workers > 1:
        _require_sendable(calls[0])
    if get_active_backend()[0].supports_return_generator:
        tasks = (delayed(function)(*inputs) for function, *inputs in calls)
        yield from Parallel(
            workers, return_as="generator_unordered", pre_dispatch="n_jobs", batch_size=1
        )(tasks)
        return
    with Parallel(workers, batch_size=1) as parallel:
        for first in range(0, len(calls), workers):
            sent = (cloudpickle.dumps(call) for call in calls[first : first + workers])
            yield from parallel(delayed(_there)(sys.path, call) for call in sent)


def _require_sendable(call: tuple[Any, ...]) -> None:
    try:
        cloudpickle.dumps(call)
    except Exception as error:
        remedy = "make it inside the function that needs it, or use one process (jobs=1)"
        raise ValueError(
            f"the study cannot be sent to other processes ({said(error)}): {remedy}"
        ) from error


def _there(path: list[str], call: bytes) -> Any:
    """Compute a call where Ray does not know this process's search path, nor what it pickles by value."""
    sys.path[:] = dict.fromkeys([*sys.path, *path])
    function, *inputs = cloudpickle.loads(call)
    return function(*inputs)
