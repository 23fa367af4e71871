"""Find and call the user's own function, `module:function`, and show its errors as the user's."""

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
from polyak.cli._process import Terminated, prints_on_stderr

if TYPE_CHECKING:
    from torch import Tensor

Better = Literal["lower", "higher"]
BetterOption = Annotated[Better, typer.Option(help="Which quality is better.")]

_OURS = str(Path(__file__).parent.parent)


@contextmanager
def users_function(name: str) -> Iterator[Callable[[dict[str, Tensor]], float]]:
    """The function `module:function` for the time of the block; what it prints goes to stderr.

    Its module may lie in the current directory. What it raises ends the command with its traceback
    and exit code 1.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute.isidentifier():
        raise ValueError(f"{name!r} is not MODULE:FUNCTION, such as judge:loss")
    with prints_on_stderr(), _modules_of(Path.cwd()):
        function = getattr(_imported(module, name), attribute, None)
        if not callable(function):
            raise ValueError(f"module {module} has no function {attribute}")

        def evaluate(weights: dict[str, Tensor]) -> float:
            with _users_errors(name):
                return function(weights)  # type: ignore[no-any-return]  # the library checks it

        yield evaluate


@contextmanager
def _modules_of(folder: Path) -> Iterator[None]:
    """Finds modules in a folder; afterwards they are forgotten, as another folder has others."""
    before, path = set(sys.modules), [*sys.path]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder) and "site-packages" not in file:
                del sys.modules[name]


def _imported(module: str, name: str) -> Any:
    with _users_errors(name):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name
            if missing is None or f"{module}.".find(f"{missing}.") != 0:
                raise
    raise ValueError(f"there is no module {module} in {Path.cwd()} or among the installed packages")


@contextmanager
def _users_errors(name: str) -> Iterator[None]:
    """An exception of the user's code, `sys.exit` too, ends the command with its traceback."""
    try:
        yield
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        traceback.print_exception(error.with_traceback(_of_user(error.__traceback__)))
        fail(f"{name} failed: {type(error).__name__}", YOURS)


def _of_user(frames: TracebackType | None) -> TracebackType | None:
    """The traceback from where the user's code begins."""
    while frames is not None:
        file = frames.tb_frame.f_code.co_filename
        if not file.startswith((_OURS, "<frozen importlib", importlib.__file__)):
            break
        frames = frames.tb_next
    return frames
