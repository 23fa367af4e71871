"""Boards: the numbers in TensorBoard's files of events, which the package `tensorboard` reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path

from polyak._runs.tables import Row

_EVENTS = "events.out.tfevents.*"
_PLACES = ("", "*/", "*/*/")  # as of transformers (runs/DATE) and espnet (tensorboard/train)
_OF_ONE_RUN = re.compile(
    r"version_\d+|.*(20\d\d[-_.]?\d\d[-_.]?\d\d|\d\d[-_.:]\d\d[-_.:]\d\d|\d{6}[-_]\d{6}|\d{10}).*"
)  # names by a version, a date or a time: a resumed run has several


def events(places: Iterable[Path]) -> tuple[Path, list[Path]]:
    """The first of some folders that has files of events, in it or up to two levels down, and these files."""
    for place in places:
        if found := sorted(path for front in _PLACES for path in place.glob(front + _EVENTS)):
            return place, found
    return Path(), []


def rows(place: Path, files: Iterable[Path], epochs: set[float]) -> list[Row]:
    """A row for each step; a name begins with the file's folder, as "valid/loss", unless that is of a version or a date.

    If a step has two numbers, the one that was written later counts. A series whose largest step is at most one
    above the largest of `epochs` counts epochs. `epochs` are those of checkpoints without steps.

    Raises `ModuleNotFoundError` with what to do if the package is not installed.
    """
    scalars = [
        (written, f"{_front(path.parent, place)}{tag}", step, number)
        for path in files
        for written, tag, step, number in _scalars(path)
    ]
    series: dict[str, dict[int, float]] = {}
    for _, name, step, number in sorted(scalars, key=itemgetter(0)):
        series.setdefault(name, {})[step] = number
    found: dict[tuple[str, int], Row] = {}
    for name, numbers in series.items():
        unit = "epoch" if max(numbers) <= max(epochs, default=-2) + 1 else "step"
        for count, number in numbers.items():
            found.setdefault((unit, count), {unit: count})[name] = number
    return list(found.values())


def _front(folder: Path, place: Path) -> str:
    return "" if folder == place or _OF_ONE_RUN.fullmatch(folder.name) else f"{folder.name}/"


def _scalars(path: Path) -> Iterator[tuple[float, str, int, float]]:
    """The time of writing, the tag, the step and the number of each scalar."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]
        from tensorboard.util.tensor_util import make_ndarray  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the metrics in {path} need the package {error.name}, which is not installed: install tensorboard",
            name=error.name,
        ) from None
    tags = set()  # only the first value of a tag need say what it is
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "scalars":
                tags.add(value.tag)
            if value.tag in tags:
                yield event.wall_time, value.tag, event.step, float(make_ndarray(value.tensor))
