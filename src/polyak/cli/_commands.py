"""What all commands share: their errors are one line, and their exit codes mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from polyak.cli._output import say

DIFFERENT, YOURS, WRONG, INTERRUPTED = 1, 1, 2, 130
WIDTH = 100

EPILOG = """\b
Exit codes:
  0    done
  1    `polyak diff` found a difference; your own function (--evaluate, --greedy) failed
  2    wrong usage, a wrong value, a file that does not read or exists already: one line says which
  130  interrupted by Ctrl-C
Results are on stdout (with --json, JSON and nothing else), all other words and progress on stderr.
A file that is written appears when it is complete, or not at all."""

# click's `UsageError`, which newer versions of typer carry within themselves.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_WRONG_INPUT = (ValueError, TypeError, OSError, LookupError, ArithmeticError, RuntimeError)


class Commands(TyperGroup):
    """The commands; whatever goes wrong in one is one line on stderr and an exit code."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _one_line_errors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _one_line_errors():
            return super().invoke(ctx)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors of usage, of what is given and of files, a missing extra, Ctrl-C."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # no errors; typer ends the process quietly
        raise
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except _UsageError as error:
        _fail_usage(error)
    except ModuleNotFoundError as error:
        fail(f'{error.name} is missing: pip install "polyak[study]"')
    except MemoryError as error:
        fail(f"out of memory: {error}")
    except _WRONG_INPUT as error:
        fail(_message(error))


def fail(message: str, code: int = WRONG) -> NoReturn:
    """Ends the command with one line on stderr."""
    say(f"polyak: {message}", err=True)
    raise typer.Exit(code) from None


def _fail_usage(error: Exception) -> NoReturn:
    """An unknown option, a missing or superfluous argument."""
    if type(error).__name__ == "NoArgsIsHelpError":  # not an error: it prints the help
        raise error
    message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "polyak"
    fail(f"{message.rstrip('.')}; see {command} --help")


def _message(error: Exception) -> str:
    """What an error says; a list of differences keeps its lines."""
    if isinstance(error, FileExistsError) and error.errno is None:
        return f"{error}: --force overwrites it"
    if isinstance(error, KeyError):  # it says its key alone
        return f"{error} is missing"
    return str(error) or type(error).__name__
