"""Rules that all commands share: an error is one line on stderr, and exit codes have one meaning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from polyak.cli._output import say
from polyak.cli._process import unchanged_process

DIFFERENT, YOURS, WRONG, INTERRUPTED = 1, 1, 2, 130
WIDTH = 100

EPILOG = """\b
Exit codes:
  0    done
  1    diff found a difference; your function (--evaluate, --greedy) failed; a
       study's run failed, or a published figure does not hold
  2    a wrong option, value or file
  130  interrupted (Ctrl-C)
Results go to stdout, messages and progress to stderr.
Files appear complete or not at all."""

# click's `UsageError`, which newer versions of typer contain.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_WRONG_INPUT = (ValueError, TypeError, OSError, LookupError, ArithmeticError, RuntimeError)


class Commands(TyperGroup):
    """The commands; an error in one is one line on stderr and an exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        with unchanged_process():
            return super().main(*args, **options)

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _one_line_errors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _one_line_errors():
            return super().invoke(ctx)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns errors of usage, of input and of files, missing extras and Ctrl-C into one line."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # not errors; typer ends the process quietly
        raise
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except _UsageError as error:
        _fail_usage(error)
    except ModuleNotFoundError as error:
        fail(f'{error.name} is missing: install polyak with its extra "study"')
    except MemoryError as error:
        fail(f"out of memory: {error}")
    except _WRONG_INPUT as error:
        fail(_message(error))


def fail(message: str, code: int = WRONG) -> NoReturn:
    """Ends the command with one line on stderr."""
    say(f"polyak: {message}", err=True)
    raise typer.Exit(code) from None


def _fail_usage(error: Exception) -> NoReturn:
    """Ends the command for an unknown option, or a missing or superfluous argument."""
    if type(error).__name__ == "NoArgsIsHelpError":  # not an error: it prints the help
        raise error
    message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "polyak"
    fail(f"{message.rstrip('.')}; see {command} --help")


def _message(error: Exception) -> str:
    """The text of an error, in the words of the command line; a list of differences keeps its lines."""
    text = str(error) or type(error).__name__
    if isinstance(error, FileExistsError) and error.errno is None:
        return f"{text.partition(';')[0]}; --force replaces it"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, KeyError):  # its text is the key alone
        return f"{text} is missing"
    return text
