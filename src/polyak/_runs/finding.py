"""Find the checkpoints in a run's folder, up to three levels down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from polyak.checkpoints._dcp.metadata import METADATA
from polyak.checkpoints._file_names import SUFFIX, UNFINISHED, folders, holder, is_beside, named
from polyak.checkpoints._open.handles import kept_elsewhere

_LEVELS = 4
_SHOWN = 6
_PART = re.compile(
    r"\d-of-\d|(rank|shard)[-_]?[1-9]", re.IGNORECASE
)  # of one checkpoint, whose first rank is 0
_FIRST = re.compile(r"((rank|shard)[-_]?)0", re.IGNORECASE)
_OF_RUN = r"(?:version|run|exp|seed|trial|fold|rank|worker|ws)[-_=]?\d+"
OF_RUN = re.compile(rf"(?<![a-z]){_OF_RUN}", re.IGNORECASE)
"""The part of a name that says which run a checkpoint belongs to."""
_NO_CHECKPOINT = re.compile(rf"{_OF_RUN}(\.\w+)?", re.IGNORECASE)
_RECOVERY = re.compile(
    r"(?<![a-z])(recover(y)?|interrupt(ed)?|on_exception|crash(ed)?|emergency|preempt(ed|ion)?|autosave)(?![a-z])",
    re.IGNORECASE,
)
_SAFE = ".safetensors"
_EMPTY = "it holds no weights: its save may have been interrupted"
_NOTHING = (
    f"no checkpoints were found, here or up to {_LEVELS - 1} levels down: wanted files or folders whose "
    "name has a step, an epoch or another number"
)


class Entry(NamedTuple):
    """A checkpoint of a run: the file or folder that its trainer named, and what holds the weights."""

    named: Path
    weights: Path

    @property
    def folder(self) -> Path | None:
        """Its own folder, which may hold its metrics; None for a file."""
        return self.named if self.named.is_dir() else None


class RunFolder(NamedTuple):
    """The checkpoints of one folder, and what was left out: path -> why."""

    folder: Path
    entries: list[Entry]
    aside: dict[Path, str]


def found(run: Path, file: str | None = None) -> RunFolder:
    """The checkpoints of a run: those of the first level below it that has some.

    `file` names the file of the weights within each checkpoint's folder, where it has several.

    Raises `ValueError` where there are none, and where several folders of one level have some: then
    they are several runs. `FileNotFoundError` for a missing folder.
    """
    level, one, aside = [run], None, dict[Path, str]()
    for _ in range(_LEVELS):
        holders = [_in_folder(folder, file) for folder in level]
        several = [candidate for candidate in holders if len(_of_a_run(candidate)) > 1]
        if len(several) > 1:
            listed = ", ".join(str(candidate.folder) for candidate in several[:_SHOWN])
            raise ValueError(f"{run} has the checkpoints of several runs ({listed}): give one")
        if several:
            return several[0]
        one = one or next((candidate for candidate in holders if _of_a_run(candidate)), None)
        aside |= {path: why for candidate in holders for path, why in candidate.aside.items()}
        level = [
            each for candidate in holders for each in folders(candidate.folder) if each not in aside
        ]
    if one is not None:
        return one
    nothing = _NOTHING if file is None else f"no folder of a checkpoint in it has {file}"
    place, why = next(iter(aside.items()), (run, nothing))
    raise ValueError(f"{place}: {why}")


def entry(path: Path, file: str | None) -> Entry:
    """A checkpoint that was named: a file, or a folder with what holds its weights.

    Raises `FileNotFoundError` if it is neither, nor a part of a folder of torch.distributed.checkpoint.
    """
    if not path.exists() and not (path.parent / METADATA).exists():
        why = f": {kept}" if (kept := kept_elsewhere(path)) else ""
        raise FileNotFoundError(f"no such file or folder: {path}{why}")
    within = _weights(path, file) if path.is_dir() else None
    return Entry(path, within or path)


def _of_a_run(held: RunFolder) -> list[Entry]:
    """The entries that may be one of a series: their names have a number, or repeat such a one."""
    return [
        entry for entry in held.entries if (about := named(entry.named)).numbered or about.repeats
    ]


def _in_folder(folder: Path, file: str | None) -> RunFolder:
    entries, aside, empty = [], dict[Path, str](), []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or is_beside(path):
            continue
        absent = path.with_suffix("") if path.suffix == ".dvc" else path
        if (kept := kept_elsewhere(absent)) and named(absent).numbered:
            aside[absent] = kept
        elif why := _why_aside(path):
            aside[path] = why
        elif _is_weights(path):
            entries.append(Entry(path, path))
        elif path.is_dir() and _may_be_checkpoint(path):
            try:
                held = _weights(path, file)
            except ValueError as error:
                aside[path] = str(error)
            else:
                entries += [Entry(path, held)] if held else []
                empty += [] if held else [path]
    # Alone, or beside files, they may be folders that hold a run, or its records.
    beside = any(entry.folder is not None for entry in entries)
    return RunFolder(folder, entries, aside | dict.fromkeys(empty if beside else (), _EMPTY))


def _is_weights(path: Path) -> bool:
    is_part = _PART.search(path.name) is not None
    return path.is_file() and SUFFIX.search(path.name) is not None and not is_part


def _why_aside(path: Path) -> str:
    """Why a file or folder with the name of a checkpoint is left out; "" for all others."""
    if path.is_dir() and path.suffix in UNFINISHED and named(path).numbered:
        return "its save was interrupted, or is not done"
    if not _is_weights(path):
        return ""
    if _FIRST.search(path.name) and path.with_name(_FIRST.sub(r"\g<1>1", path.name)).exists():
        return (
            "there are parts of it by other ranks: average the files of each rank by a command of its own, "
            "or let its trainer merge them"
        )
    weights = path.with_name(SUFFIX.sub(_SAFE, path.name))
    if weights != path and weights.exists():
        return f"its weights lie in {weights.name}"
    if _RECOVERY.search(path.name):
        return "its name says that it is for going on after a crash"
    return ""


def _may_be_checkpoint(folder: Path) -> bool:
    about = named(folder)
    counted = about.numbered and _NO_CHECKPOINT.fullmatch(folder.name) is None
    return counted or about.repeats


def _weights(folder: Path, file: str | None) -> Path | None:
    """The file or folder that holds the weights of a checkpoint's folder; None if there is none."""
    if file is None:
        return holder(folder)
    place = folder / file
    return place if place.exists() else None
