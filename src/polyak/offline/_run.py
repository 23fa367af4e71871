"""Everything that was stored of a training run, from its snapshots and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from polyak._checks import require, require_count
from polyak._engine.tracking import is_statistic
from polyak._lazy import LazyTensors, renamed
from polyak._runs.choosing import Choice, choose
from polyak.checkpoints._checkpoint import Checkpoint
from polyak.checkpoints._own_format import Stored
from polyak.checkpoints._read import read
from polyak.checkpoints._snapshots import Snapshot, snapshots, stored_in
from polyak.offline._average import opened
from polyak.offline._findings import Source
from polyak.rules import LIVE
from polyak.theory._synthesis import Column

Read = Callable[[Path], Checkpoint]
_FINEST = 50_000  # updates into which the time of a run with checkpoints only is divided


class StoredSlot(NamedTuple):
    """A slot of an average in one file, or its live weights: its column for the fit, and its time."""

    column: Column
    path: Path
    average: str
    time: float

    @property
    def place(self) -> tuple[Path, str, str]:
        """Where its tensors are stored: the file, the average, the slot."""
        return self.path, self.average, self.column.slot


@dataclass(frozen=True, eq=False)
class Run:
    """All slots that were stored of a run, in the order of time, and the times that its updates span.

    `model` has the dtype, the policy and the other names of each tensor, if there are snapshots.
    `live` are the live weights, of checkpoints and of snapshots, which those of snapshots are not fitted
    with; `keys` are their names in snapshots. `read` reads a checkpoint. `opened` holds the snapshots
    that are open, so that several averages share them. `copy` names the tensors that come from the last
    checkpoint.
    """

    slots: list[StoredSlot]
    elapsed: list[float]
    model: Mapping[str, Any]
    dtypes: frozenset[torch.dtype]
    live: list[StoredSlot]
    keys: Mapping[Path, Mapping[str, str]] = field(default_factory=dict)
    read: Read = read
    opened: dict[Path, Stored] = field(default_factory=dict)
    copy: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        folder: Path | str | Choice | None,
        checkpoints: Mapping[int, Path | str],
        read: Read = read,
        copy: Sequence[str] = (),
    ) -> Run:
        """Find what a folder of snapshots or a run, and checkpoints (time -> file), hold; reads headers only."""
        recorded_in, checkpoints = _sources(folder, checkpoints)
        recorded = [] if recorded_in is None else snapshots(recorded_in)
        if recorded and copy:
            raise ValueError(
                f"copy (--copy) is {list(copy)}, wanted none for snapshots: they copy what their averager copied"
            )
        elapsed = recorded[-1].elapsed() if recorded else _grid(checkpoints)
        plain = [
            StoredSlot(Column(None, LIVE, _update_at(elapsed, time)), Path(path), LIVE, float(time))
            for time, path in sorted(checkpoints.items())
        ]
        slots = [*(slot for snapshot in recorded for slot in _slots(snapshot)), *plain]
        in_order = sorted(slots, key=lambda slot: slot.column.updates)
        if not recorded:
            return cls(
                in_order, elapsed, {}, frozenset({torch.bfloat16}), plain, read=read, copy=copy
            )
        dtypes = frozenset().union(*(snapshot.dtypes for snapshot in recorded))
        keys = {snapshot.path: snapshot.live for snapshot in recorded if snapshot.live}
        live = plain or [_live(snapshot) for snapshot in recorded if snapshot.live]
        return cls(in_order, elapsed, recorded[-1].model, dtypes, live, keys, read)

    @property
    def precision(self) -> float:
        """Of the coarsest stored dtype: the distance from 1 to the next number."""
        return max(torch.finfo(dtype).eps for dtype in self.dtypes)

    def snapshot(self, path: Path) -> Stored:
        """A snapshot, opened; raises `ValueError` for a damaged header."""
        if path not in self.opened:
            self.opened[path] = Stored.open(path)
        return self.opened[path]

    def live_weights(self, slot: StoredSlot) -> LazyTensors:
        """The live weights at one of the places in `live`."""
        if slot.path in self.keys:
            return renamed(self.snapshot(slot.path), self.keys[slot.path])
        return self.source(slot.path).weights

    def source(self, path: Path) -> Source:
        """The weights of a checkpoint."""
        return opened([self.read(path)], None, self.copy)[0]

    def has_statistics(self) -> bool:
        """Whether the model has running statistics, or may have: checkpoints alone do not say."""
        return not self.model or any(map(is_statistic, self.model))

    def elapsed_until(self, at: float) -> list[float]:
        """The times that updates span, up to the last update that is not after `at`."""
        times = list(accumulate(self.elapsed))
        slack = 1e-9 * times[-1]
        wanted = f"a time up to {times[-1]:g}, the last known"
        require(0 < at <= times[-1] + slack, "at", at, wanted)
        return self.elapsed[: int(np.searchsorted(times, at + slack, side="right"))]


def _sources(
    folder: Path | str | Choice | None, checkpoints: Mapping[int, Path | str]
) -> tuple[Path | str | None, Mapping[int, Path | str]]:
    """The folder of snapshots, if there is one, and all checkpoints by their steps; refuses what is not there."""
    if isinstance(folder, Choice):
        checkpoints, folder = {**_by_time(folder), **checkpoints}, None
    elif folder is not None and not stored_in(Path(folder)):
        checkpoints, folder = {**_of_folder(Path(folder)), **checkpoints}, None
    if folder is None and not checkpoints:
        raise ValueError(
            "nothing to make an average of: give a folder of snapshots, or checkpoints"
        )
    checkpoints = {
        require_count("checkpoints time", time, "in steps"): path
        for time, path in checkpoints.items()
    }
    if missing := [str(path) for path in checkpoints.values() if not Path(path).exists()]:
        raise FileNotFoundError(f"no such checkpoints: {', '.join(missing)}")
    return folder, checkpoints


def _live(snapshot: Snapshot) -> StoredSlot:
    """The live weights in a snapshot."""
    return StoredSlot(Column(None, LIVE, snapshot.updates), snapshot.path, LIVE, snapshot.time)


def _of_folder(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run's folder by their times."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of snapshots or of a run")
    try:
        return _by_time(choose(folder))
    except ValueError as error:
        raise ValueError(
            f"{folder} has no snapshots of polyak.Recorder; as a run, {error}"
        ) from None


def _by_time(choice: Choice) -> dict[int, Path]:
    """Chosen checkpoints by their steps; where none are known, by their place in the order."""
    counts = [int(file.at) for file in choice.files]
    known = choice.unit != "time" and counts[0] > 0
    return {
        count if known else place: file.path
        for place, (count, file) in enumerate(zip(counts, choice.files, strict=True), 1)
    }


def _slots(snapshot: Snapshot) -> Iterator[StoredSlot]:
    """The slots that a snapshot holds of each average."""
    for average, rule in snapshot.rules.items():
        for slot in snapshot.slots[average]:
            if slot in rule.slots:
                column = Column(rule, slot, snapshot.updates)
                yield StoredSlot(column, snapshot.path, average, snapshot.time)


def _grid(checkpoints: Mapping[int, Path | str]) -> list[float]:
    """Equal times of updates such that each checkpoint lies on one; finer makes no difference."""
    common, last = gcd(*checkpoints), max(checkpoints)
    parts = max(1, min(common, _FINEST * common // last))
    return [common / parts] * (last // common * parts)


def _update_at(elapsed: list[float], time: float) -> int:
    """The number of the update at a time."""
    times = np.cumsum(elapsed)
    nearest = int(np.abs(times - time).argmin())
    wanted = f"the time of an update of the run, such as {times[nearest]:g}"
    holds = abs(times[nearest] - time) <= elapsed[nearest] / 2
    require(bool(holds), "checkpoints time", time, wanted)
    return nearest + 1
