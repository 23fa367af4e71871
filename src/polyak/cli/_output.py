"""The output of commands: JSON, tables, sizes; and progress, on a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from polyak._checks import listed
from polyak._shown import Table, terminal_width

if TYPE_CHECKING:
    from polyak._lazy import LazyTensors
    from polyak.rules import Rule

Progress = Callable[[int, int], object]
_MOST = 12


def say(text: str, *, err: bool = False) -> None:
    """Prints text; control characters, such as in the names of a hostile file, are shown escaped."""
    typer.echo("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text), err=err)


def print_json(data: Any) -> None:
    """Prints data as JSON and nothing else; infinity and NaN, which JSON lacks, are null."""
    typer.echo(json_text(data))


def json_text(data: Any) -> str:
    """Data as JSON that every reader accepts."""
    return json.dumps(_finite(data), indent=2, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Prints aligned columns, within the terminal if there is one; the first `left` columns are words."""
    for line in Table(header, rows, left).lines(terminal_width()):
        say(line)


def save_chart(chart: Any, folder: Path, name: str, *, err: bool) -> None:
    """Writes a chart into a folder, and says where it is."""
    from polyak import charts

    charts.save(chart, folder, name)
    say(f"chart: {folder}/{name}.html (also .png, .svg)", err=err)


def print_equivalents(rule: Rule) -> None:
    """Prints the calls of other libraries that give the same average, and how to use them."""
    from polyak.theory import CONVENTIONS, equivalents

    calls = equivalents(rule)
    other = "in other libraries, updated every step:"
    say(f"\n{rule} {other}" if calls else f"\nNo other library known has {rule}.")
    for library, call in calls.items():
        say(f"  {call}" + (f"   # {CONVENTIONS[library]}" if library in CONVENTIONS else ""))


def note(message: str) -> None:
    """Prints a line for people on stderr, beside the results."""
    say(f"note: {message}", err=True)


def note_norms(norms: Sequence[str]) -> None:
    """Reminds of `recalibrate` if averaged weights have norms with running statistics."""
    if norms:
        count = f"{len(norms)} norm{'s' if len(norms) > 1 else ''}"
        note(
            f"{count} with running statistics ({listed(norms, 3)}): estimate them again "
            "for the averaged weights with polyak.recalibrate(model, batches)"
        )


def note_left(left: Mapping[str, int]) -> None:
    """Names the parts of a file that were read neither as live weights nor as an average."""
    if left:
        note(f"not used: {left_text(left)}")


def from_live_text(name: str, tensors: Sequence[str], count: int) -> str:
    """Which of the `count` tensors of an average are live weights."""
    share = f"{len(tensors)} of {count} tensors are live weights"
    return f"{name}: {share}, because the file does not have their average: {listed(tensors, 3)}"


def note_tied(weights: LazyTensors) -> None:
    """Names the tensors that are not in a file under all their names."""
    from polyak._lazy import distinct

    written = distinct(weights)
    if tied := [name for name in weights if name not in written]:
        note(
            f"tied tensors are written once, without {listed(tied, 3)}: load the file with "
            "safetensors' load_model, or from_pretrained"
        )


def left_text(left: Mapping[str, int]) -> str:
    """The contents that were left out, each with its number of tensors if that is known."""
    shown = [
        f"{what} ({n} tensor{'s' if n > 1 else ''})" if n else what for what, n in left.items()
    ]
    return listed(shown, _MOST)


@contextmanager
def progress_shown(what: str, *, bytes: bool = True) -> Iterator[Progress | None]:
    """A progress bar with the time left on stderr; None if stderr is not a terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    amount = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    columns = (
        progress.TextColumn(what),
        progress.BarColumn(),
        *(amount if bytes else (progress.MofNCompleteColumn(),)),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
