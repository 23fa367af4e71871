"""The user's own function, `module:function`, and its own errors."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polyak.cli._commands import YOURS, fail

if TYPE_CHECKING:
    from torch import Tensor

Better = Annotated[
    Literal["lower", "higher"], typer.Option(help="Which end of the quality is good.")
]

_OURS = str(Path(__file__).parent.parent)


def function_of(name: str) -> Callable[[dict[str, Tensor]], float]:
    """The function `module:function`; modules are found in the current directory too.

    What it raises is the user's to see: its traceback, and exit code 1.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute.isidentifier():
        raise ValueError(f"{name!r} is no function, wanted MODULE:FUNCTION such as judge:loss")
    function = getattr(_imported(module, name), attribute, None)
    if not callable(function):
        raise ValueError(f"module {module} has no function {attribute}")

    def evaluate(weights: dict[str, Tensor]) -> float:
        with _users_errors(name):
            return function(weights)  # type: ignore[no-any-return]  # the library checks it

    return evaluate


def _imported(module: str, name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))
    with _users_errors(name):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name
            if missing is None or f"{module}.".find(f"{missing}.") != 0:
                raise
    raise ValueError(f"there is no module {missing} in {Path.cwd()}, nor among those installed")


@contextmanager
def _users_errors(name: str) -> Iterator[None]:
    """An exception of the user's code ends the command with its traceback."""
    try:
        yield
    except Exception as error:
        own = error.with_traceback(_of_user(error.__traceback__))
        traceback.print_exception(own)
        fail(f"{name} failed: {type(error).__name__}", YOURS)


def _of_user(frames: TracebackType | None) -> TracebackType | None:
    """The traceback from where the user's code begins."""
    while frames is not None:
        file = frames.tb_frame.f_code.co_filename
        if not file.startswith((_OURS, "<frozen importlib", importlib.__file__)):
            break
        frames = frames.tb_next
    return frames
