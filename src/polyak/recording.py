"""Recording: snapshots of averages while a model trains, from which any other average is made after.

A snapshot is a file of ours (`polyak.checkpoints.native`) with the slots of every average, and with
what synthesis needs beside them: the run it belongs to and the time that each update so far spans.
"""

from __future__ import annotations

import math
import secrets
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.averager import Averager
from polyak.checkpoints import native
from polyak.checkpoints.stored import Stored
from polyak.checkpoints.tensorfile import TensorFile
from polyak.checks import require_flag, require_positive
from polyak.engine import COMPENSATION
from polyak.rules import Rule, Tick
from polyak.sharding import require_whole
from polyak.specs import as_specs
from polyak.tracking import difference, report

SNAPSHOT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 10**7  # updates whose times a snapshot may tell
PATTERN = "snapshot-*.safetensors"


class Recorder:
    """Stores snapshots of an averager's slots in a folder: of the first update, then every so much time.

        recorder = Recorder(averager, "run/snapshots", every=1000)
        for batch in batches:
            train_step(model, batch)
            averager.update()
            recorder.update()

    Some dozens of snapshots of two averages, such as `Power.from_relative_std` of 0.05 and 0.10,
    give any average of the run to a fraction of a percent (`polyak.synthesize` tells how exactly).

    Args:
        averager: whose slots are stored. Its updates are followed from now on: call `update` after
            each, so that the time that each spans is known; where calls are left out, it is taken
            to be spread evenly.
        folder: for the snapshots of this run alone.
        every: time between snapshots, in the rule's unit: steps, samples, tokens.
        dtype: of what is stored: float32, bfloat16 or float16; by default that of the slots. The
            error of rounding to it grows with the synthesis's amplification.
        resume: goes on in the folder of this averager's run, after its state was loaded; states
            carry the run that their recorder gave them.

    Snapshots of updates that are made once more, after an earlier state was loaded, are set aside as
    `*.stale`.

    Raises `ValueError` for a folder with snapshots of another run or without `resume`, for bad
    arguments; `TypeError` for another object than an averager.
    """

    def __init__(
        self,
        averager: Averager,
        folder: Path | str,
        *,
        every: float,
        dtype: torch.dtype | None = None,
        resume: bool = False,
    ) -> None:
        if not isinstance(averager, Averager):
            got = type(averager).__name__
            raise TypeError(f"Recorder: averager is {got}, wanted a polyak.Averager")
        require_whole("Recorder", {item.name: item.held() for item in averager.tracked})
        require_positive("Recorder every", every)
        require_flag("Recorder resume", resume, "whether to go on in the folder of this run")
        if dtype not in (None, *SNAPSHOT_DTYPES):
            wanted = ", ".join(map(str, SNAPSHOT_DTYPES))
            raise ValueError(f"Recorder dtype is {dtype!r}, wanted one of {wanted}")
        self.folder = Path(folder)
        self.every = float(every)
        self._averager = averager
        self._dtype = dtype
        self._elapsed = array("d")
        self._time = 0.0
        self._stored: dict[int, float] = {}  # updates -> time of the run's snapshots, in order
        if averager.mixed:
            raise ValueError(
                "Recorder: the averager went on by another rule than its slots were made with "
                "(change_rule=True), so what they average is not known; begin a new average"
            )
        self.run = self._resumed() if resume else self._begun()
        averager.run = self.run
        self._follow(averager.clock)

    def update(self) -> Path | None:
        """Follows the averager's clock, and stores a snapshot when one is due; its path if so.

        Raises `OSError` where it cannot be written: what was stored before stays as it is.
        """
        tick = self._averager.clock
        self._follow(tick)
        return self.record() if tick.n and self._due(tick.t) else None

    def record(self) -> Path:
        """Stores a snapshot of now, and gives its path.

        Raises `RuntimeError` before the first update and inside `applied()`; `ValueError` for a
        weight that the snapshots' dtype cannot hold.
        """
        if self._averager.count == 0:
            raise RuntimeError("Recorder: there is no average before the first update")
        tick = self._averager.clock
        self._follow(tick)
        path = self._path(tick.n)
        described, stored = native.packed(self._averager, "snapshot")
        described["run"] = self.run
        kept = {key: t for key, t in stored.items() if COMPENSATION not in key.split("/")[2:3]}
        self.folder.mkdir(parents=True, exist_ok=True)
        native.write(path, described, kept | _runs(self._elapsed), narrow=self._dtype)
        self._stored[tick.n] = tick.t
        return path

    def _due(self, time: float) -> bool:
        """At the first update, whose weights an average may keep for long, and at each `every`."""
        last = next(reversed(self._stored.values()), None)
        return last is None or math.floor(time / self.every) > math.floor(last / self.every)

    def _path(self, updates: int) -> Path:
        return self.folder / f"snapshot-{updates:010d}.safetensors"

    def _follow(self, tick: Tick) -> None:
        """Notes the time of updates made since, and forgets one that was taken back (`nonfinite`)."""
        if tick.n == len(self._elapsed) and tick.t == self._time:
            return
        if tick.n <= len(self._elapsed):
            del self._elapsed[max(tick.n - 1, 0) :]
            self._set_aside(tick.n)
        missed = tick.n - 1 - len(self._elapsed)
        if missed > 0:
            between = tick.t - tick.elapsed - math.fsum(self._elapsed)
            self._elapsed.extend([between / missed] * missed)
        if tick.n:
            self._elapsed.append(tick.elapsed)
        self._time = tick.t

    def _set_aside(self, first: int) -> None:
        """Snapshots of this update and of later ones are stale: the updates are made once more."""
        for updates in [each for each in self._stored if each >= first]:
            self._path(updates).rename(self._path(updates).with_suffix(".stale"))
            del self._stored[updates]

    def _begun(self) -> str:
        if found := sorted(self.folder.glob(PATTERN)):
            raise ValueError(
                f"{self.folder} has {len(found)} snapshots, the first {found[0].name}: give an "
                "empty folder, or resume=True to go on with their run from a loaded state"
            )
        return secrets.token_hex(8)

    def _resumed(self) -> str:
        """The run of the folder, its times up to now; later snapshots are set aside."""
        if not any(self.folder.glob(PATTERN)):
            return secrets.token_hex(8)
        found = snapshots(self.folder)
        _require_same(found[-1], self._averager)
        if self._averager.run != found[0].run:
            raise ValueError(
                f"{self.folder} has snapshots of the run {found[0].run}, and the averager is of the "
                f"run {self._averager.run}: load a state that was saved while their recorder was "
                "there, or give an empty folder"
            )
        tick = self._averager.clock
        self._take_times(found, tick)
        self._stored = {snapshot.updates: snapshot.time for snapshot in found}
        self._set_aside(tick.n + 1)
        return found[0].run

    def _take_times(self, found: Sequence[Snapshot], tick: Tick) -> None:
        times = found[-1].elapsed()[: tick.n]
        self._elapsed, self._time = array("d", times), math.fsum(times)
        if len(times) == tick.n and not math.isclose(self._time, tick.t, rel_tol=1e-9):
            raise ValueError(
                f"{self.folder}: its run had come to time {self._time} at update {tick.n}, the "
                f"averager to {tick.t}: it does not go on from there. Load this run's own state, "
                "or give an empty folder"
            )


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


def snapshots(folder: Path | str) -> list[Snapshot]:
    """The snapshots of a folder in the order of time; only their headers are read.

    Raises `ValueError` naming the files for a folder without snapshots, for damaged ones, and for
    snapshots of different runs, rules or models; `FileNotFoundError` without the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of snapshots")
    found = sorted((_opened(path) for path in folder.glob(PATTERN)), key=lambda s: s.updates)
    if not found:
        raise ValueError(f"{folder}: no snapshots ({PATTERN}); polyak.Recorder writes them")
    last = found[-1]
    for snapshot in found:
        if lines := _foreign(last, snapshot):
            title = f"{snapshot.path} and {last.path.name} do not belong together: keep one run's"
            raise ValueError(report(title, lines))
    return found


def _opened(path: Path) -> Snapshot:
    file = TensorFile(path)
    stored = Stored(file, whole=False)
    if stored.get("kind") != "snapshot":
        raise stored.error(f"it holds an {stored.get('kind')!r}, wanted a snapshot")
    averages = stored.averages()
    ticks = [each.tick for each in averages.values()]
    if not ticks or any(tick[:2] != ticks[0][:2] or tick.n == 0 for tick in ticks):
        raise stored.error("its averages have different clocks, or none")
    return Snapshot(
        path=path,
        run=str(stored.get("run")),
        updates=ticks[0].n,
        time=ticks[0].t,
        rules={name: each.rule for name, each in averages.items()},
        slots={name: each.slots for name, each in averages.items()},
        model=stored.model(),
        dtypes=frozenset(f.dtype for key, f in file.forms.items() if key.startswith("averages/")),
    )


def _foreign(a: Snapshot, b: Snapshot) -> list[str]:
    """How two snapshots differ in what those of one run share; no lines if they do not."""
    if a.run != b.run:
        return [f"run {b.run}, wanted {a.run}"]
    return [*difference(as_specs(a.rules), as_specs(b.rules)), *difference(a.model, b.model)]


def _require_same(snapshot: Snapshot, averager: Averager) -> None:
    lines = difference(as_specs(averager.rules), as_specs(snapshot.rules))
    lines += difference(native.described_model(averager.tracked), snapshot.model)
    if lines:
        title = f"{snapshot.path.parent} has snapshots of another averager; give an empty folder"
        raise ValueError(report(title, lines))


def _runs(elapsed: Sequence[float]) -> dict[str, Tensor]:
    """The times of updates as tensors: how many in a row span how much time."""
    times = torch.tensor(elapsed, dtype=torch.float64)
    spans, counts = torch.unique_consecutive(times, return_counts=True)
    return {"times/elapsed": spans, "times/updates": counts}


def _elapsed(stored: Stored, updates: int) -> list[float]:
    spans, counts = stored.tensor("times/elapsed"), stored.tensor("times/updates")
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
