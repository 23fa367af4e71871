"""The snapshots of a run in a folder, from their headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyak._checks import difference, report
from polyak.checkpoints._own_format import Stored
from polyak.checkpoints._sniff import SNAPSHOT
from polyak.rules import Rule
from polyak.specs import as_specs

ELAPSED, UPDATES = "times/elapsed", "times/updates"
"""The keys of the times that updates span: a time, and how many updates in a row have it."""

_MOST = 10**7  # updates; more times are not expanded from a file


@dataclass(frozen=True)
class Snapshot:
    """A stored snapshot; only its header is read.

    Attributes:
        path: its file or folder.
        run: the id of the run.
        updates, time: the averager's clock when it was taken.
        rules: the rule of each average.
        slots: the names of the slots of each average.
        model: name -> shape, dtype, policy and other names of the model's tensors.
        dtypes: the dtypes of the stored slots.
        live: the keys of the live weights and of what is copied, by name, other names of tied weights
            too; none if it has no live weights.
    """

    path: Path
    run: str
    updates: int
    time: float
    rules: dict[str, Rule]
    slots: dict[str, list[str]]
    model: dict[str, Any]
    dtypes: frozenset[torch.dtype]
    live: dict[str, str]

    def elapsed(self) -> list[float]:
        """The time that each update up to this one spans."""
        return _elapsed(Stored.open(self.path), self.updates)

    @property
    def nbytes(self) -> int:
        """The bytes of its file, or of all files in its folder."""
        files = self.path.iterdir() if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)


def snapshots(folder: Path | str) -> list[Snapshot]:
    """List the snapshots in a folder, in the order of time; read only their headers.

    Raises `ValueError` that names the files if there are no snapshots, for damaged snapshots, and if
    they are of different runs, rules or models; `FileNotFoundError` if there is no folder.
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
            title = f"{snapshot.path} and {last.path.name} do not belong together: keep those of one run"
            raise ValueError(report(title, lines))
    return found


def stored_in(folder: Path) -> list[Path]:
    """The paths of the snapshots in a folder, files or folders, in the order of their names."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if SNAPSHOT.fullmatch(path.name))


def _opened(path: Path) -> Snapshot:
    stored = Stored.open(path)
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
        dtypes=frozenset(f.dtype for key, f in stored.specs.items() if key.startswith("averages/")),
        live=_live(stored),
    )


def _live(stored: Stored) -> dict[str, str]:
    """The keys of a snapshot's live weights by name, if it has them all."""
    model = stored.model()
    parts = {n: "copies" if e["policy"] == "copy" else "live" for n, e in model.items()}
    keys = {n: f"{part}/{n}" for n, part in parts.items()}
    aliases = {alias: keys[n] for n, e in model.items() for alias in e["aliases"]}
    return keys | aliases if all(key in stored.specs for key in keys.values()) else {}


def _foreign(a: Snapshot, b: Snapshot) -> list[str]:
    """Lines that say why two snapshots are not of one run; no lines if they may be."""
    if a.run != b.run:
        return [f"run {b.run}, wanted {a.run}"]
    return [*difference(as_specs(a.rules), as_specs(b.rules)), *difference(a.model, b.model)]


def _elapsed(stored: Stored, updates: int) -> list[float]:
    spans, counts = stored[ELAPSED], stored[UPDATES]
    plain = spans.dtype == torch.float64 and counts.dtype == torch.int64
    if not plain or spans.dim() != 1 or spans.shape != counts.shape:
        raise stored.error("the times of its updates cannot be read")
    if (
        updates > _MOST
        or int(counts.sum()) != updates
        or not (counts > 0).all()
        or not (spans > 0).all()
    ):
        raise stored.error(f"the times of its updates are not those of {updates} updates")
    times: list[float] = torch.repeat_interleave(spans, counts).tolist()
    return times
