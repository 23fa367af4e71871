"""Options that choose checkpoints of a run, and what they choose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from polyak._checks import listed
from polyak.cli._options import Part, given
from polyak.cli._output import note
from polyak.cli._users_function import Better

if TYPE_CHECKING:
    from polyak.offline import Choice

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_SHOWN = 5


class Wanted(NamedTuple):
    """Which checkpoints of a run are taken."""

    last: Annotated[
        int | None, typer.Option(metavar="N", help="Take the last N checkpoints of a run.", min=1)
    ] = None
    best: Annotated[
        int | None,
        typer.Option(metavar="N", help="Take the N best checkpoints of a run, by --by.", min=1),
    ] = None
    by: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help="A metric that the trainer wrote, such as eval_loss."),
    ] = None
    steps: Annotated[
        str | None,
        typer.Option(metavar="FIRST:LAST:DISTANCE", help="Take these steps of a run (: for all)."),
    ] = None
    window_tokens: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Take the last TOKENS tokens of a run, such as 125B."),
    ] = None
    tokens_per_step: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Tokens per step, such as 4M, for --window-tokens."),
    ] = None
    file: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the weight file in each checkpoint's folder."),
    ] = None

    @property
    def some(self) -> bool:
        """Whether any option chooses."""
        return any(value is not None for value in self._replace(file=None))

    def of(self, files: Sequence[Path], better: Better | None, *, judged: bool = False) -> Choice:
        """The checkpoints of a run's folder, or of a list; what was left out is noted.

        `better` is that of `by`. If something else is `judged` by it too, it counts only for a metric
        whose name does not say.
        """
        if judged and better is not None:
            try:
                return self.of(files, None)
            except ValueError:
                pass
        from polyak import offline

        choice = offline.choose(
            files[0] if len(files) == 1 and files[0].is_dir() else files,
            last=self.last,
            best=self.best,
            by=self.by,
            better=better if self.best else None,
            steps=None if self.steps is None else steps_of(self.steps),
            window=self._window(),
            file=self.file,
        )
        note_aside(choice)
        return choice

    def _window(self) -> float | None:
        if (self.window_tokens is None) != (self.tokens_per_step is None):
            raise ValueError("--window-tokens and --tokens-per-step belong together: give both")
        if self.window_tokens is None or self.tokens_per_step is None:
            return None
        tokens = count_of(self.window_tokens, "--window-tokens")
        return tokens / count_of(self.tokens_per_step, "--tokens-per-step")


def stored(
    folder: Path | None, wanted: Wanted, part: Part, better: Better | None = None
) -> Path | Choice | None:
    """A folder of snapshots or of a run, or the chosen checkpoints of a run.

    Raises `ValueError` for options that choose or name what a folder of snapshots does not have.
    """
    from polyak.checkpoints._snapshots import stored_in

    typed = given({**wanted._asdict(), **part._asdict()})
    if folder is not None and typed and folder.is_dir() and stored_in(folder):
        raise ValueError(
            f"{folder} has snapshots of polyak.Recorder, and these options are for plain checkpoints: "
            f"leave {typed} out"
        )
    if not any(value is not None for value in wanted):
        return folder
    if folder is None:
        raise ValueError(f"to use {given(wanted._asdict())}, give the folder of a run")
    return wanted.of([folder], better, judged=True)


def in_order(files: Sequence[Path]) -> Sequence[Path]:
    """Listed files in the order of their steps, if all lie in one folder and have a step each.

    A shell sorts step-1000 before step-900.
    """
    from polyak import offline

    if len({file.absolute().parent for file in files}) > 1 or len(files) == 1:
        return files
    try:
        choice = offline.choose(files)
    except (ValueError, OSError):  # they have no order of their own, or reading them will say more
        return files
    chosen = [file.path for file in choice.files]
    if choice.aside:
        return files
    if not all(path.is_relative_to(file) for path, file in zip(chosen, files, strict=True)):
        note(f"the files are taken in the order of their {choice.unit}s")
    return chosen


def require_chosen(folder: Path) -> None:
    """Raises `ValueError` with what to type if a folder has several checkpoints of a run.

    It may have weights of its own beside them, such as the last ones.
    """
    from polyak import offline

    try:
        files = offline.choose(folder).files
    except (ValueError, OSError):
        return
    if len(files) > 1:
        raise ValueError(
            f"{folder} is the folder of a run with {len(files)} checkpoints, {files[0].path.name} to "
            f"{files[-1].path.name}: say which (--last N, --best N --by METRIC, --steps : for all)"
        )


def note_aside(choice: Choice) -> None:
    """Tells what was found in a run and not taken."""
    whys: dict[str, list[str]] = {}
    for path, why in choice.aside.items():
        whys.setdefault(why, []).append(path.name)
    for why, names in whys.items():
        note(f"not used: {listed(names, _SHOWN)} ({why})")


def steps_of(text: str) -> tuple[int | None, int | None, int | None]:
    """FIRST:LAST:DISTANCE, each an integer or nothing."""
    parts = text.split(":")
    if not 2 <= len(parts) <= 3 or not all(re.fullmatch(r"\s*\d*\s*", part) for part in parts):
        raise ValueError(
            f"--steps is {text!r}, wanted FIRST:LAST:DISTANCE, such as 2000:20000:2000, 5000: or :"
        )
    first, last, distance = [int(part) if part.strip() else None for part in [*parts, ""][:3]]
    return first, last, distance


def count_of(text: str, option: str) -> float:
    """A number of tokens: "125B" is 125 * 10^9, "4M" is 4 * 10^6."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([KMBGT]?)\s*", text, re.IGNORECASE)
    number = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if number <= 0:
        raise ValueError(f"{option} is {text!r}, wanted a number above 0, such as 125B or 4M")
    return number
