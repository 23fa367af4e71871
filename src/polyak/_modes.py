"""Set torch's grad mode and inference mode for one call, whatever interrupts that call.

torch's own context managers end in Python code. If a signal handler raises there, the mode stays, and the
next backward pass fails. These end in one call of C++, during which Python runs no handler. They call the
names of `torch._C` that torch's own managers call, from 2.6 to 2.14 (docs/versions.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

_P = ParamSpec("_P")
_T = TypeVar("_T")


InferenceMode = torch._C._InferenceMode


def inference(mode: bool) -> Any:
    """`with inference(True):`, as `torch.inference_mode`. torch.compile knows only torch's own."""
    return torch.inference_mode(mode) if is_compiling() else InferenceMode(mode)


def no_grad(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Lets a function run as under `torch.no_grad`."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        before = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return call


def ordinary(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Lets a function make ordinary tensors, also if it is called under `torch.inference_mode`."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with inference(False):
            return function(*args, **kwargs)

    return call


def forget_computed() -> None:
    """Drops what torch keeps of weights that have changed: casts of autocast, cached parametrizations."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()
