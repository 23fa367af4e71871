"""Recording: snapshots of averages while a model trains, from which any other average is made after.

A snapshot is a file of ours (`polyak.checkpoints._save`), or a folder where the average is sharded,
with the slots of every average, and with what synthesis needs beside them: the run it belongs to and
the time that each update so far spans.
"""

from __future__ import annotations

import math
import secrets
import shutil
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from polyak._checks import difference, report, require_flag, require_positive
from polyak._engine.slots import COMPENSATION
from polyak._hold import Hold
from polyak._ranks.agreement import agree, chosen
from polyak._ranks.sharding import as_distributed, local
from polyak.averager import Averager
from polyak.checkpoints import _save as native
from polyak.checkpoints._own_format import Stored
from polyak.checkpoints._save import Packed
from polyak.checkpoints._sniff import SNAPSHOT
from polyak.checkpoints._tensorfile import narrowed
from polyak.rules import Rule, Tick
from polyak.specs import as_specs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


__all__ = ["Recorder", "Snapshot", "snapshots"]

SNAPSHOT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_T = TypeVar("_T")


class _Kept(NamedTuple):
    """A snapshot of the run: of which time, and where."""

    time: float
    path: Path


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

        group: of the ranks that make the recorder of a sharded averager; by default all.

    Snapshots of updates that are made once more, after an earlier state was loaded, are set aside as
    `*.stale`.

    Of a sharded averager every rank of the group makes the recorder, and calls it at the same
    places: a snapshot is then a folder to which each writes its own parts, and synthesis reads
    it in one process, or on other ranks.

    Raises `ValueError` for a folder with snapshots of another run or without `resume`, or where
    another process records, for bad arguments; `TypeError` for another object than an averager.
    """

    def __init__(
        self,
        averager: Averager,
        folder: Path | str,
        *,
        every: float,
        dtype: torch.dtype | None = None,
        resume: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(averager, Averager):
            got = type(averager).__name__
            raise TypeError(f"Recorder: averager is {got}, wanted a polyak.Averager")
        require_flag("Recorder resume", resume, "whether to go on in the folder of this run")
        if dtype not in (None, *SNAPSHOT_DTYPES):
            wanted = ", ".join(map(str, SNAPSHOT_DTYPES))
            raise ValueError(f"Recorder dtype is {dtype!r}, wanted one of {wanted}")
        self.folder = Path(folder).absolute()  # the process may change its working folder
        self.every = float(require_positive("Recorder every", every))
        self._averager = averager
        self._dtype = dtype
        self._group = group
        self._hold: Hold | None = None
        self._closed = False
        if averager.mixed:
            raise ValueError(
                "Recorder: the averager went on by another rule than its slots were made with "
                "(change_rule=True), so what they average is not known; begin a new average"
            )
        if averager.sharded:
            agree("Recorder", {"folder": str(folder)}, group, "give one, or each group its own")
        begin = self._resumed if resume else self._begun
        try:
            self.run, times, self._stored = self._by_first(begin)  # snapshots by updates, in order
            self._elapsed, self._time = array("d", times), math.fsum(times)
            self._set_aside(averager.clock.n + 1)
            averager.run = self.run
            self._follow(averager.clock)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the recording: another recorder may use the folder. A recorder that is deleted is closed."""
        self._closed = True
        if self._hold is not None:
            self._hold.release()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Recorder cannot be copied or pickled, since its folder is for one recorder: save the "
            "averager's state, and make a recorder with resume=True"
        )

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
        if self._closed:
            raise RuntimeError("Recorder: it is closed; make another one with resume=True")
        if self._averager.count == 0:
            raise RuntimeError("Recorder: there is no average before the first update")
        tick = self._averager.clock
        self._follow(tick)
        self._by_first(self._take_folder)
        path = self.folder / f"snapshot-{tick.n:010d}"
        if self._averager.sharded:
            pack = self._packed_narrow
            native.save_parts("Recorder", path, self._averager, pack, group=self._group)
        else:
            path = path.with_suffix(".safetensors")
            native.write(path, *self._packed(self._averager), narrow=self._dtype)
        self._stored[tick.n] = _Kept(tick.t, path)
        return path

    def _packed(self, averager: Averager) -> Packed:
        described, stored = native.packed(averager, "snapshot")
        described["run"] = self.run
        kept = {key: t for key, t in stored.items() if COMPENSATION not in key.split("/")[2:3]}
        return described, kept | _runs(self._elapsed)

    def _packed_narrow(self, averager: Averager) -> Packed:
        """The same, rounded to the snapshots' dtype."""
        described, stored = self._packed(averager)
        for key, tensor in stored.items():
            if self._dtype and key.startswith("averages/") and tensor.is_floating_point():
                part = narrowed(key, local(tensor), self._dtype)
                stored[key] = as_distributed(part, tensor)
        return described, stored

    def _due(self, time: float) -> bool:
        """At the first update, whose weights an average may keep for long, and at each `every`."""
        last = next(reversed(self._stored.values()), None)
        return last is None or math.floor(time / self.every) > math.floor(last.time / self.every)

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
        stale = [self._stored.pop(each).path for each in list(self._stored) if each >= first]
        if stale:
            self._by_first(lambda: list(map(_put_aside, stale)))

    def _by_first(self, choose: Callable[[], _T]) -> _T:
        """What one process does in the folder, and tells the others where the average is sharded."""
        return chosen("Recorder", choose, self._group) if self._averager.sharded else choose()

    def _begun(self) -> tuple[str, list[float], dict[int, _Kept]]:
        self._take_folder()  # before the look into it: another recorder may still be writing
        if found := stored_in(self.folder):
            raise ValueError(
                f"{self.folder} has {len(found)} snapshots, the first {found[0].name}: give an "
                "empty folder, or resume=True to go on with their run from a loaded state"
            )
        return secrets.token_hex(8), [], {}

    def _take_folder(self) -> None:
        """Hold the folder: for the first time, or anew if it was removed, or this process was forked.

        Raises `ValueError` if another recorder has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._hold is not None and self._hold.has(self.folder):
            return
        if self._hold is not None:
            self._hold.release()
        try:
            self._hold = Hold(self.folder)
        except BlockingIOError as error:
            raise ValueError(
                f"Recorder: {error}, and two recorders would overwrite each other's snapshots. Call "
                "close() of the other recorder, or give another folder. If several ranks have the "
                "whole average (DistributedDataParallel without `shard=`), let one of them record"
            ) from None
        weakref.finalize(self, self._hold.release)

    def _resumed(self) -> tuple[str, list[float], dict[int, _Kept]]:
        """The run of the folder, its times up to now, and its snapshots."""
        if not stored_in(self.folder):
            return self._begun()
        self._take_folder()
        found = snapshots(self.folder)
        _require_same(found[-1], self._averager)
        if self._averager.run != found[0].run:
            raise ValueError(
                f"{self.folder} has snapshots of the run {found[0].run}, and the averager is of the "
                f"run {self._averager.run}: load a state that was saved while their recorder was "
                "there, or give an empty folder"
            )
        kept = {snapshot.updates: _Kept(snapshot.time, snapshot.path) for snapshot in found}
        return found[0].run, self._times(found, self._averager.clock), kept

    def _times(self, found: Sequence[Snapshot], tick: Tick) -> list[float]:
        times = found[-1].elapsed()[: tick.n]
        time = math.fsum(times)
        if len(times) == tick.n and not math.isclose(time, tick.t, rel_tol=1e-9):
            raise ValueError(
                f"{self.folder}: its run had come to time {time} at update {tick.n}, the "
                f"averager to {tick.t}: it does not go on from there. Load this run's own state, "
                "or give an empty folder"
            )
        return times


def _put_aside(path: Path) -> None:
    """Renames a snapshot that is stale; an older one of that name goes."""
    aside = path.with_suffix(".stale")
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
    path.rename(aside)


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
    return {ELAPSED: spans, UPDATES: counts}


ELAPSED, UPDATES = "times/elapsed", "times/updates"
"""The keys of the times that updates span: so much time each, so many in a row."""

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
        return _elapsed(Stored.open(self.path), self.updates)

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
