"""Boards: the numbers in TensorBoard's files of events, which the package `tensorboard` reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from polyak._runs.tables import Row

_EVENTS = "events.out.tfevents.*"
_PLACES = ("", "*/", "*/*/")  # as of transformers (runs/DATE) and espnet (tensorboard/train)


def events(places: Iterable[Path]) -> tuple[Path, list[Path]]:
    """The first of some folders that has files of events, in it or up to two levels down, and these files."""
    for place in places:
        if found := sorted(path for front in _PLACES for path in place.glob(front + _EVENTS)):
            return place, found
    return Path(), []


def rows(place: Path, files: Iterable[Path], epochs: set[float]) -> list[Row]:
    """A row for each step; a name begins with the file's folder, as "valid/loss".

    What has no step beyond `epochs`, those of checkpoints without steps, counts epochs.

    Raises `ModuleNotFoundError` with what to do if the package is not installed.
    """
    series: dict[str, dict[int, float]] = {}
    for path in files:
        folder = path.parent.name
        dated = path.parent == place or any(map(str.isdigit, folder))
        for tag, step, number in _scalars(path):
            series.setdefault(tag if dated else f"{folder}/{tag}", {})[step] = number
    found: dict[tuple[str, int], Row] = {}
    for name, numbers in series.items():
        unit = "epoch" if max(numbers) <= max(epochs, default=-2) + 1 else "step"
        for count, number in numbers.items():
            found.setdefault((unit, count), {unit: count})[name] = number
    return list(found.values())


def _scalars(path: Path) -> Iterator[tuple[str, int, float]]:
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]
        from tensorboard.util.tensor_util import make_ndarray  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the metrics in {path} need the package {error.name}, which is not installed: install tensorboard",
            name=error.name,
        ) from None
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "scalars":
                yield value.tag, event.step, float(make_ndarray(value.tensor))
