"""Describe a checkpoint or a folder of snapshots without reading its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from polyak import norms
from polyak._dtypes import dtype_name, has_mean
from polyak._engine.tracking import is_statistic
from polyak._lazy import TensorSpec, distinct
from polyak._shown import Charted, Table, number_text, size_text
from polyak.checkpoints._checkpoint import Checkpoint
from polyak.checkpoints._open.files import Verified, all_verified
from polyak.checkpoints._own_format import Stored
from polyak.checkpoints._own_format import checkpoint as checkpoint_of
from polyak.checkpoints._read import read, read_source
from polyak.checkpoints._snapshots import Snapshot, snapshots
from polyak.checkpoints._sniff import sniff
from polyak.checkpoints._unfit import unfit
from polyak.rules import Rule
from polyak.theory import half_life, mean_age
from polyak.theory._profiles import coefficients

_LONGEST = 2_000_000  # updates; the profile of more would take more than some seconds
_EVENLY = 10_000  # updates into which a time is divided if the file does not say their number


@dataclass(frozen=True)
class Weighed:
    """The size of some tensors; tied ones count once.

    `parameters` counts the elements of floating-point and complex tensors, without running statistics.
    Other buffers of such dtypes count too, since a file does not say which tensors are parameters. `dtypes` is
    dtype -> number of tensors.
    """

    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]

    def cells(self) -> tuple[str, str, str, str]:
        """The sizes as text, for a table."""
        dtypes = self.dtypes
        shown = ", ".join(d if len(dtypes) == 1 else f"{d} x {n}" for d, n in dtypes.items())
        return f"{self.tensors:,}", f"{self.parameters:,}", size_text(self.bytes), shown


@dataclass(frozen=True)
class DescribedAverage:
    """An average: its tensors, and its rule if the file says so.

    `half_life` and `mean_age` are measures of the rule's profile at the file's clock, in the rule's
    unit of time; None without a rule or a clock, and after more than two million updates. `from_live`
    names the tensors that are the live weights, since the file holds no average of them.
    """

    weights: Weighed
    rule: str | None
    half_life: float | None
    mean_age: float | None
    from_live: tuple[str, ...]

    def cells(self) -> tuple[str, ...]:
        """The average as text, for a table."""
        ages = number_text(self.half_life), number_text(self.mean_age)
        return self.rule or "unknown", *ages, *self.weights.cells()


@dataclass(frozen=True)
class DescribedTensor:
    """A tensor of the live weights, or of the first average if there are no live weights."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    def cells(self) -> tuple[str, str, str, str]:
        """The tensor as text, for a table."""
        shape = "x".join(map(str, self.shape)) or "scalar"
        return self.name, shape, self.dtype, size_text(self.bytes)


@dataclass(frozen=True)
class Recorded:
    """The snapshots of `polyak.Recorder` in a folder; times are in the rules' unit."""

    run: str
    snapshots: int
    first: float
    last: float
    updates: int
    bytes: int


@dataclass(frozen=True)
class Description(Charted):
    """The contents of a file or folder.

    `count` and `unit` are the file's clock (`checkpoints.Clock`). `norms` are the norms with running
    statistics: estimate them again for averaged weights. `tensors` has the largest first. `aside` says
    how many objects of each class were not read, because only their own code could make them. `left` lists
    what is neither live weights nor an average, with its number of tensors, and `refused` says why an
    average is not listed. `unfit` says why an average of these weights would mean nothing, and is
    "" if it means something.
    `verified` counts the bytes that were compared with checksums, and those that have none; None if nothing
    was compared.
    """

    path: str
    format: str
    count: int | None
    unit: str | None
    live: Weighed | None
    averages: dict[str, DescribedAverage]
    norms: tuple[str, ...]
    tensors: tuple[DescribedTensor, ...]
    aside: dict[str, int]
    left: dict[str, int]
    refused: dict[str, str]
    unfit: str
    recorded: Recorded | None = None
    verified: Verified | None = None

    def heading(self) -> list[str]:
        """Lines that say what the file is, its clock, and the run that a folder records."""
        unit = "units of time" if self.unit == "time" else self.unit
        clock = "" if self.count is None else f", {self.count:,} {unit}"
        line, run = f"{self.path}: {self.format}{clock}", self.recorded
        if run is None:
            return [line]
        times = f"at times {run.first:g} to {run.last:g}, {size_text(run.bytes)}"
        return [f"{line}; {run.snapshots} snapshots of run {run.run}, {times}"]

    def tables(self) -> list[Table]:
        """The live weights and the averages; all tensors, the largest first."""
        header = ("", "rule", "half-life", "mean age", "tensors", "parameters", "size", "dtypes")
        live = [] if self.live is None else [("live weights", *["-"] * 3, *self.live.cells())]
        averages = [(name, *average.cells()) for name, average in self.averages.items()]
        tensors = [each.cells() for each in self.tensors]
        largest = Table(("name", "shape", "dtype", "size"), tensors)
        return [Table(header, [*live, *averages], left=2), largest]

    def as_dict(self) -> dict[str, Any]:
        """The description as plain data, for JSON."""
        checked = None if self.verified is None else self.verified._asdict()
        return {**asdict(self), "verified": checked}


def describe(path: Path | str | Checkpoint, *, verify: bool = False) -> Description:
    """Describe a checkpoint or a folder of snapshots; read only headers.

    `path` may also be the result of `checkpoints.read`. Tensors without names are named by their
    positions. For a folder of snapshots, averages are those of the last snapshot. With `verify`,
    everything is read and compared with its checksums (`Checkpoint.verify`).

    >>> import tempfile, torch
    >>> from polyak import Averager, save
    >>> place = Path(tempfile.mkdtemp()) / "average.safetensors"
    >>> averager = Averager({"w": torch.zeros(3)}, "window(2)")
    >>> for _ in range(5):
    ...     averager.update()
    >>> save(place, averager)
    >>> found = describe(place)
    >>> found.format, found.count, found.averages["average"].weights.parameters
    ('polyak', 5, 3)
    >>> found.averages["average"].rule, found.averages["average"].mean_age
    ('window(2)', 0.5)

    Raises what `checkpoints.read` and `snapshots` raise, and `ValueError` for damage that `verify` finds.
    """
    if isinstance(path, Checkpoint):
        found = path
    elif (source := sniff(path)).kind == "snapshots":
        return _of_run(source.path, verify)
    else:
        found = read_source(source, "positions")
    checked = found.verify() if verify else None
    return replace(_described(found, found.path, _times(found)), verified=checked)


def _of_run(folder: Path, verify: bool) -> Description:
    found = snapshots(folder)
    checked = all_verified(read(s.path).verify() for s in found) if verify else None
    last = found[-1]
    checkpoint = checkpoint_of(Stored.open(last.path))
    times = dict.fromkeys(last.rules, last.elapsed())
    return replace(_described(checkpoint, folder, times, _recorded(found)), verified=checked)


def _recorded(found: list[Snapshot]) -> Recorded:
    last, size = found[-1], sum(each.nbytes for each in found)
    return Recorded(last.run, len(found), found[0].time, last.time, last.updates, size)


def _described(
    found: Checkpoint,
    path: Path,
    times: Mapping[str, list[float]],
    recorded: Recorded | None = None,
) -> Description:
    averages = {
        name: _average(
            distinct(weights), found.rules.get(name), times.get(name), found.from_live(name)
        )
        for name, weights in found.averages.items()
    }
    first = found.live if found.live is not None else next(iter(found.averages.values()), None)
    shown = {} if first is None else distinct(first)
    return Description(
        path=str(path),
        format="snapshots" if recorded else found.format,
        count=found.count,
        unit=found.clock.unit if found.clock else None,
        live=None if found.live is None else _weighed(distinct(found.live)),
        averages=averages,
        norms=tuple(norms.statistics(shown)),
        tensors=tuple(sorted(map(_tensor, shown, shown.values()), key=lambda each: -each.bytes)),
        aside=dict(found.aside),
        left=dict(found.left),
        refused=dict(found.refused),
        unfit=unfit(shown, found.shapes),
        recorded=recorded,
    )


def _weighed(tensors: Mapping[str, TensorSpec]) -> Weighed:
    sizes = {name: each.nbytes // each.dtype.itemsize for name, each in tensors.items()}
    parameters = sum(size for name, size in sizes.items() if _is_parameter(name, tensors[name]))
    dtypes = Counter(dtype_name(each.dtype) for each in tensors.values())
    whole = sum(each.nbytes for each in tensors.values())
    return Weighed(len(tensors), parameters, whole, dict(dtypes))


def _is_parameter(name: str, spec: TensorSpec) -> bool:
    return has_mean(spec.dtype) and not is_statistic(name)


def _average(
    tensors: Mapping[str, TensorSpec],
    rule: Rule | None,
    times: list[float] | None,
    from_live: list[str],
) -> DescribedAverage:
    weighed = _weighed(tensors)
    ages: tuple[float | None, float | None] = None, None
    if rule is not None and times:
        profile, unit = coefficients(rule, times), sum(times) / len(times)
        ages = half_life(profile) * unit, mean_age(profile) * unit
    return DescribedAverage(weighed, None if rule is None else str(rule), *ages, tuple(from_live))


def _tensor(name: str, spec: TensorSpec) -> DescribedTensor:
    return DescribedTensor(name, dtype_name(spec.dtype), spec.shape, spec.nbytes)


def _times(found: Checkpoint) -> dict[str, list[float]]:
    """average -> the time that each of its updates spans, if the file says it."""
    if found.ticks:
        ticks = {name: tick for name, tick in found.ticks.items() if 0 < tick.n <= _LONGEST}
        return {name: [tick.t / tick.n] * tick.n for name, tick in ticks.items()}
    if found.clock is None:
        return {}
    count, every = found.clock.count, found.clock.every or 1
    if found.clock.unit == "time":
        return dict.fromkeys(found.averages, [count / _EVENLY] * _EVENLY if count else [])
    few = count // every <= _LONGEST
    return dict.fromkeys(found.averages, found.clock.elapsed(every)) if few else {}
