"""Store averages while a model trains, from which any other average can be made afterwards.

A snapshot is a file of ours, or a folder if the average is sharded (`polyak.checkpoints._save`). It has
the slots of every average and what synthesis needs besides: the run that it belongs to, and the time
that each update so far spans.
"""

from __future__ import annotations

import math
import secrets
import shutil
import weakref
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from polyak._checks import difference, report, require_flag, require_positive
from polyak._engine.slots import COMPENSATION
from polyak._hold import FolderHold
from polyak._ranks.agreement import agree, chosen
from polyak._ranks.sharding import as_distributed, local
from polyak.averager import Averager
from polyak.checkpoints import _save as native
from polyak.checkpoints._safetensors.files import narrowed
from polyak.checkpoints._save import NARROWED, Packed
from polyak.checkpoints._snapshots import ELAPSED, UPDATES, Snapshot, snapshots, stored_in
from polyak.rules import Tick
from polyak.specs import as_specs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Recorder", "Snapshot", "snapshots"]

SNAPSHOT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_T = TypeVar("_T")


class _Kept(NamedTuple):
    """A snapshot of this run: the time when it was taken, and its path."""

    time: float
    path: Path


class Recorder:
    """Stores snapshots of an averager's slots in a folder: at the first update, then at every `every`.

        recorder = Recorder(averager, "run/snapshots", every=1000)
        for batch in batches:
            train_step(model, batch)
            averager.update()
            recorder.update()

    A few dozen snapshots of two averages, such as `Power.from_relative_std` of 0.05 and 0.10, give any
    average of the run to a fraction of a percent (`polyak.synthesize` reports the error).

    Args:
        averager: the averager whose slots are stored. Call `update` after each of its updates, so that
            the time of each update is known. Updates without a call share their time evenly.
        folder: a folder for the snapshots of this run only. One recorder at a time may use it.
        every: time between snapshots, in the unit of the rule: steps, samples, tokens.
        live: store the live weights too, so that `sweep` shows each average beside them. They are as
            large as one slot.
        dtype: the dtype of the stored tensors: float32, bfloat16 or float16; by default the slots' own. The
            amplification of a synthesis multiplies the error of rounding to it.
        resume: continue in the folder of this averager's run, after you loaded its state. The state
            contains the id of the run. Snapshots of updates that will be made again are renamed
            to `*.stale`.
        group: the ranks that make the recorder of a sharded averager; by default all ranks.

    For a sharded averager every rank of the group makes the recorder and calls it at the same places. A
    snapshot is then a folder with the parts of all ranks, which any number of processes can read.

    Raises `ValueError` for bad arguments and for a folder that another recorder has, or that has snapshots
    of another run, or any without `resume`; `TypeError` for an object that is not an averager.
    """

    def __init__(
        self,
        averager: Averager,
        folder: Path | str,
        *,
        every: float,
        live: bool = True,
        dtype: torch.dtype | None = None,
        resume: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(averager, Averager):
            got = type(averager).__name__
            raise TypeError(f"Recorder: averager is {got}, wanted a polyak.Averager")
        require_flag("Recorder resume", resume, "whether to go on in the folder of this run")
        require_flag("Recorder live", live, "whether to store the live weights")
        if dtype not in (None, *SNAPSHOT_DTYPES):
            wanted = ", ".join(map(str, SNAPSHOT_DTYPES))
            raise ValueError(f"Recorder dtype is {dtype!r}, wanted one of {wanted}")
        self.folder = Path(folder).absolute()  # the process may change its working folder
        self.every = float(require_positive("Recorder every", every))
        self._averager = averager
        self._live = live
        self._dtype = dtype
        self._group = group
        self._hold: FolderHold | None = None
        self._closed = False
        if averager.mixed:
            raise ValueError(
                "Recorder: the averager continued with another rule (change_rule=True), so its slots come "
                "from two rules, and what they average is not known; start a new average"
            )
        if averager.sharded:
            agree("Recorder", {"folder": str(folder)}, group, "give one, or each group its own")
        begin = self._resumed if resume else self._begun
        try:
            self.run, times, self._stored = self._by_first(begin)  # snapshots by updates, in order
            self._elapsed, self._time = array("d", times), math.fsum(times)
            self._set_aside(averager.clock.n + 1)
            averager.run = self.run  # its state has it, so that a resumed run is recognized
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
        """Call this after each update of the averager: stores a snapshot if one is due, and returns its path.

        Raises as `record` does.
        """
        tick = self._averager.clock
        self._follow(tick)
        return self.record() if tick.n and self._due(tick.t) else None

    def record(self) -> Path:
        """Store a snapshot now, and return its path.

        Raises `RuntimeError` before the first update, inside `applied()` and after `close`; `ValueError`
        for a weight that the snapshots' dtype cannot hold, and if another recorder has taken over the
        folder; `OSError` if it cannot be written. Earlier snapshots stay as they are.
        """
        if self._closed:
            raise RuntimeError("Recorder: it is closed; make another one with resume=True")
        if self._averager.count == 0:
            raise RuntimeError("Recorder: there is no average before the first update")
        tick = self._averager.clock
        self._follow(tick)
        self._by_first(self._take_folder)
        path = self.folder / f"snapshot-{tick.n:010d}"
        averager, group = self._averager, self._group
        if averager.sharded:
            pack = self._packed_narrow
            native.save_parts("Recorder", path, averager, pack, group=group, overwrite=True)
        else:
            path, pack = path.with_suffix(".safetensors"), self._packed
            native.write_packed(path, averager, pack, narrow=self._dtype, overwrite=True)
        self._stored[tick.n] = _Kept(tick.t, path)
        return path

    def _packed(self, averager: Averager) -> Packed:
        described, stored = native.packed(averager, "snapshot", live=self._live)
        described["run"] = self.run
        # What compensated summation carries over is needed to resume an average, not to combine it.
        kept = {key: t for key, t in stored.items() if COMPENSATION not in key.split("/")[2:3]}
        return described, kept | _runs(self._elapsed)

    def _packed_narrow(self, averager: Averager) -> Packed:
        """The same, with averages and live weights rounded to the snapshots' dtype."""
        described, stored = self._packed(averager)
        for key, tensor in stored.items():
            if self._dtype and key.startswith(NARROWED) and tensor.is_floating_point():
                part = narrowed(key, local(tensor), self._dtype)
                stored[key] = as_distributed(part, tensor)
        return described, stored

    def _due(self, time: float) -> bool:
        """Whether a snapshot is due: at the first update, since an average may keep it for long, and at each `every`."""
        last = next(reversed(self._stored.values()), None)
        return last is None or math.floor(time / self.every) > math.floor(last.time / self.every)

    def _follow(self, tick: Tick) -> None:
        """Note the time that each update since the last call spans."""
        if tick.n == len(self._elapsed) and tick.t == self._time:
            return
        if tick.n <= len(
            self._elapsed
        ):  # an update was taken back (`nonfinite`), or a state loaded
            del self._elapsed[max(tick.n - 1, 0) :]
            self._set_aside(tick.n)
        missed = tick.n - 1 - len(self._elapsed)
        if missed > 0:  # updates without a call of ours
            between = tick.t - tick.elapsed - math.fsum(self._elapsed)
            self._elapsed.extend([between / missed] * missed)
        if tick.n:
            self._elapsed.append(tick.elapsed)
        self._time = tick.t

    def _set_aside(self, first: int) -> None:
        """Rename the snapshots of this update and later ones: these updates will be made again."""
        stale = [self._stored.pop(each).path for each in list(self._stored) if each >= first]
        if stale:
            self._by_first(lambda: list(map(_put_aside, stale)))

    def _by_first(self, choose: Callable[[], _T]) -> _T:
        """Work in the folder by one process, which sends the result to the other ranks of a sharded average."""
        return chosen("Recorder", choose, self._group) if self._averager.sharded else choose()

    def _begun(self) -> tuple[str, list[float], dict[int, _Kept]]:
        self._take_folder()  # before looking into it: another recorder may still be writing
        if found := stored_in(self.folder):
            raise ValueError(
                f"{self.folder} has {len(found)} snapshots, the first {found[0].name}: give an empty "
                "folder, or load the state of their run and pass resume=True"
            )
        return secrets.token_hex(8), [], {}

    def _take_folder(self) -> None:
        """Hold the folder; again if it was removed since, or if this process was forked.

        Raises `ValueError` if another recorder has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._hold is not None and self._hold.has(self.folder):
            return
        if self._hold is not None:
            self._hold.release()
        try:
            self._hold = FolderHold(self.folder)
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
                f"{self.folder} has snapshots of the run {found[0].run}, and the averager is of the run "
                f"{self._averager.run}: load a state that was saved after their recorder was made, or "
                "give an empty folder"
            )
        kept = {snapshot.updates: _Kept(snapshot.time, snapshot.path) for snapshot in found}
        return found[0].run, self._times(found, self._averager.clock), kept

    def _times(self, found: Sequence[Snapshot], tick: Tick) -> list[float]:
        times = found[-1].elapsed()[: tick.n]
        time = math.fsum(times)
        if len(times) == tick.n and not math.isclose(time, tick.t, rel_tol=1e-9):
            raise ValueError(
                f"{self.folder}: its run was at time {time} at update {tick.n}, and the averager is at "
                f"{tick.t}, so it is not the same run. Load a state of this run, or give an empty folder"
            )
        return times


def _put_aside(path: Path) -> None:
    """Rename a stale snapshot; an older one of that name is removed."""
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
    """The times of updates as two tensors: a time, and how many updates in a row have it."""
    times = torch.tensor(elapsed, dtype=torch.float64)
    spans, counts = torch.unique_consecutive(times, return_counts=True)
    return {ELAPSED: spans, UPDATES: counts}
