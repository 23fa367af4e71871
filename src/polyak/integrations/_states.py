"""The exact states of averagers in a framework's checkpoint: in its folder, or in its file.

`folder/averages/<names>.safetensors` is the state of one averager, named after its averages. If it is
sharded it is a folder, `<names>.dcp`, which all ranks write.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from polyak.averager import Averager
from polyak.checkpoints import load, save
from polyak.integrations._arguments import LONGEST

NO_DEEPSPEED = "DeepSpeed keeps the weights where no averager sees them: use FSDP2"
AVERAGES = "averages"
_SUFFIXES = (".safetensors", ".dcp")


def save_state(folder: Path, averager: Averager, *, writes: bool) -> None:
    """Save an averager in a checkpoint folder; `writes` says whether this process writes files."""
    if writes or averager.sharded:
        save(_path(folder, averager, _SUFFIXES[averager.sharded]), averager, overwrite=True)
    if writes:  # what a run of the other kind has left there would be loaded in its place
        other = _path(folder, averager, _SUFFIXES[not averager.sharded])
        if other.is_dir():
            shutil.rmtree(other)
        else:
            other.unlink(missing_ok=True)


def load_state(
    folder: Path, averager: Averager, *, change_rule: bool = False, cure: str | None = None
) -> None:
    """Load what `save_state` saved on any number of ranks; without a `cure` it may be missing.

    Raises `FileNotFoundError` with the cure if it is, and what `polyak.load` raises.
    """
    for path in (_path(folder, averager, suffix) for suffix in _SUFFIXES):
        if path.exists():
            load(path, averager, change_rule=change_rule)
            return
    there = [p.name for p in (folder / AVERAGES).glob("*") if p.suffix in _SUFFIXES]
    if cure is not None:
        raise FileNotFoundError(
            f"{folder} has no state of the averages {', '.join(averager.rules)} (there: "
            f"{', '.join(sorted(there)) or 'none'}); {cure}"
        )


def take(
    state: Mapping[str, Any], averager: Averager, checkpoint: object, *, change_rule: bool
) -> None:
    """Load a state that a checkpoint's file had; with `change_rule` it may be of other rules.

    Raises `ValueError`, with the checkpoint's name, for a state that does not fit.
    """
    own = averager.rules if change_rule else {}
    if change_rule:
        state = {name: value for name, value in state.items() if name not in ("every", "pull")}
    try:
        for name in own:  # the state loads by its own rules
            averager.change_rule(state["averages"][name]["rule"], name)
        averager.load_state_dict(state)
        for name, rule in own.items():
            averager.change_rule(rule, name)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def require_apart(
    names: Sequence[str], others: Iterable[Sequence[str]], who: str, remedy: str = ""
) -> None:
    """Raise `ValueError` if an averager with these averages would write a file of another averager.

    `others` has the averages of each of the others.
    """
    for other in others:
        if both := sorted(_file_names(names) & _file_names(other)):
            raise ValueError(
                f"{who} have files of the name {both[0]!r}: one has the averages {', '.join(other)}, the "
                f"other {', '.join(names)}; give the averages other names, as in a mapping name -> rule{remedy}"
            )


def _file_names(names: Sequence[str]) -> set[str]:
    """The names of an averager's files and folders, as a system compares them that ignores case."""
    joined = file_name(names)
    return {name.casefold() for name in (*names, joined, *(joined + end for end in _SUFFIXES))}


def file_name(names: Iterable[str]) -> str:
    """The names of averages as the name of one file, which systems limit to 255 bytes."""
    joined = "-".join(names)
    return joined if len(joined) <= LONGEST else f"{joined[:40]}-{crc32(joined.encode()):08x}"


def _path(folder: Path, averager: Averager, suffix: str) -> Path:
    return folder / AVERAGES / f"{file_name(averager.rules)}{suffix}"
