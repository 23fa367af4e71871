"""Snapshots that were recorded of a run: what there is in a folder of them, read from their headers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyak._checks import difference, report
from polyak.checkpoints._stored import Stored
from polyak.rules import Rule
from polyak.specs import as_specs

ELAPSED, UPDATES = "times/elapsed", "times/updates"
"""The keys of the times that updates span: so much time each, so many in a row."""

_NAME = re.compile(r"snapshot-\d+(\.safetensors)?")
_MOST = 10**7  # updates whose times a snapshot may tell


@dataclass(frozen=True)
class Snapshot:
    """A stored snapshot: its run, when it was taken, its averages' rules and the slots they have.

    `dtypes` are those in which the slots are stored.
    """

    path: Path
    run: str
    updates: int
    time: float
    rules: dict[str, Rule]
    slots: dict[str, list[str]]
    model: dict[str, Any]
    dtypes: frozenset[torch.dtype]

    def elapsed(self) -> list[float]:
        """The time that each update up to this one spans."""
        return _elapsed(Stored.open(self.path, whole=False), self.updates)

    @property
    def nbytes(self) -> int:
        """The bytes of its file, or of all in its folder."""
        files = self.path.iterdir() if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)


def snapshots(folder: Path | str) -> list[Snapshot]:
    """The snapshots of a folder in the order of time; only their headers are read.

    Raises `ValueError` naming the files for a folder without snapshots, for damaged ones, and for
    snapshots of different runs, rules or models; `FileNotFoundError` without the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of snapshots")
    found = sorted(map(_opened, stored_in(folder)), key=lambda each: each.updates)
    if not found:
        raise ValueError(f"{folder}: no snapshots (snapshot-*); polyak.Recorder writes them")
    last = found[-1]
    for snapshot in found:
        if lines := _foreign(last, snapshot):
            title = f"{snapshot.path} and {last.path.name} do not belong together: keep one run's"
            raise ValueError(report(title, lines))
    return found


def stored_in(folder: Path) -> list[Path]:
    """Where the snapshots of a folder are, files or folders, in the order of their names."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def _opened(path: Path) -> Snapshot:
    stored = Stored.open(path, whole=False)
    if stored.value("kind") != "snapshot":
        raise stored.error(f"it holds an {stored.value('kind')!r}, wanted a snapshot")
    averages = stored.averages()
    ticks = [each.tick for each in averages.values()]
    if not ticks or any(tick[:2] != ticks[0][:2] or tick.n == 0 for tick in ticks):
        raise stored.error("its averages have different clocks, or none")
    return Snapshot(
        path=path,
        run=str(stored.value("run")),
        updates=ticks[0].n,
        time=ticks[0].t,
        rules={name: each.rule for name, each in averages.items()},
        slots={name: each.slots for name, each in averages.items()},
        model=stored.model(),
        dtypes=frozenset(f.dtype for key, f in stored.forms.items() if key.startswith("averages/")),
    )


def _foreign(a: Snapshot, b: Snapshot) -> list[str]:
    """How two snapshots differ in what those of one run share; no lines if they do not."""
    if a.run != b.run:
        return [f"run {b.run}, wanted {a.run}"]
    return [*difference(as_specs(a.rules), as_specs(b.rules)), *difference(a.model, b.model)]


def _elapsed(stored: Stored, updates: int) -> list[float]:
    spans, counts = stored[ELAPSED], stored[UPDATES]
    plain = spans.dtype == torch.float64 and counts.dtype == torch.int64
    if not plain or spans.dim() != 1 or spans.shape != counts.shape:
        raise stored.error("the times of its updates do not read")
    if (
        updates > _MOST
        or int(counts.sum()) != updates
        or not (counts > 0).all()
        or not (spans > 0).all()
    ):
        raise stored.error(f"the times of its updates are not those of {updates} updates")
    times: list[float] = torch.repeat_interleave(spans, counts).tolist()
    return times
