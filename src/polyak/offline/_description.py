"""Describing: what a checkpoint or a folder of snapshots holds, without reading its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyak import norms
from polyak._engine.tracking import is_statistic
from polyak._tensors import dtype_name
from polyak.checkpoints import _save as native
from polyak.checkpoints._checkpoint import Checkpoint
from polyak.checkpoints._export import distinct
from polyak.checkpoints._own_format import Stored
from polyak.checkpoints._reading import read
from polyak.checkpoints._tensorfile import Form
from polyak.rules import Rule
from polyak.snapshots import Snapshot, snapshots, stored_in
from polyak.theory import half_life, mean_age
from polyak.theory._profiles import coefficients

_LONGEST = 2_000_000  # updates whose profile is worth waiting for: some seconds
_EVENLY = 10_000  # updates into which a time is divided where their number is not told


@dataclass(frozen=True)
class Weighed:
    """Some tensors by number: tied ones count once.

    `parameters` are the elements of floating-point and complex tensors but running statistics; other
    buffers of such dtypes cannot be told from parameters. `dtypes`: dtype -> tensors.
    """

    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class DescribedAverage:
    """An average: its tensors, its rule where the file tells, and what that averages by now.

    `half_life` and `mean_age` are those of the rule's profile at the file's clock, in the rule's unit
    of time; None without a rule or a clock, and beyond two million updates.
    """

    weights: Weighed
    rule: str | None
    half_life: float | None
    mean_age: float | None


@dataclass(frozen=True)
class DescribedTensor:
    """A tensor of the live weights, or where there are none of the first average."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Recorded:
    """What `polyak.Recorder` stored in a folder; times are in the rules' unit."""

    run: str
    snapshots: int
    first: float
    last: float
    updates: int
    bytes: int


@dataclass(frozen=True)
class Description:
    """What a file or folder holds.

    `count` and `unit` are the file's clock (`checkpoints.Clock`); `norms` those with running
    statistics, which averaged weights need estimated anew; `tensors` the largest first.
    """

    path: str
    format: str
    count: int | None
    unit: str | None
    live: Weighed | None
    averages: dict[str, DescribedAverage]
    norms: tuple[str, ...]
    tensors: tuple[DescribedTensor, ...]
    recorded: Recorded | None = None

    def as_dict(self) -> dict[str, Any]:
        """The description as plain data, for JSON."""
        return asdict(self)


def describe(path: Path | str) -> Description:
    """What a file or folder that `checkpoints.read` reads holds, or a folder of snapshots.

    Tensors without names are called by their positions. A snapshot's averages are those of the last.

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

    Raises what `checkpoints.read` and `recording.snapshots` raise.
    """
    path = Path(path)
    if stored_in(path):
        return _of_run(path)
    found = read(path, "positions")
    return _described(found, path, _times(found))


def _of_run(folder: Path) -> Description:
    found = snapshots(folder)
    last = found[-1]
    checkpoint = native.checkpoint(Stored.open(last.path, whole=False))
    times = dict.fromkeys(last.rules, last.elapsed())
    return _described(checkpoint, folder, times, _recorded(found))


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
        name: _average(distinct(found, weights), found.rules.get(name), times.get(name))
        for name, weights in found.averages.items()
    }
    first = found.live if found.live is not None else next(iter(found.averages.values()), {})
    shown = distinct(found, first)
    return Description(
        path=str(path),
        format="snapshots" if recorded else found.format,
        count=found.count,
        unit=found.clock.unit if found.clock else None,
        live=None if found.live is None else _weighed(distinct(found, found.live)),
        averages=averages,
        norms=tuple(norms.statistics(shown)),
        tensors=tuple(sorted(map(_tensor, shown, shown.values()), key=lambda each: -each.bytes)),
        recorded=recorded,
    )


def _weighed(tensors: Mapping[str, Form]) -> Weighed:
    sizes = {name: each.nbytes // each.dtype.itemsize for name, each in tensors.items()}
    parameters = sum(size for name, size in sizes.items() if _is_parameter(name, tensors[name]))
    dtypes = Counter(dtype_name(each.dtype) for each in tensors.values())
    whole = sum(each.nbytes for each in tensors.values())
    return Weighed(len(tensors), parameters, whole, dict(dtypes))


def _is_parameter(name: str, form: Form) -> bool:
    numeric = form.dtype.is_floating_point or form.dtype.is_complex
    return numeric and not is_statistic(name)


def _average(
    tensors: Mapping[str, Form], rule: Rule | None, times: list[float] | None
) -> DescribedAverage:
    weighed = _weighed(tensors)
    if rule is None or not times:
        return DescribedAverage(weighed, None if rule is None else str(rule), None, None)
    profile, unit = coefficients(rule, times), sum(times) / len(times)
    return DescribedAverage(weighed, str(rule), half_life(profile) * unit, mean_age(profile) * unit)


def _tensor(name: str, form: Form) -> DescribedTensor:
    return DescribedTensor(name, dtype_name(form.dtype), form.shape, form.nbytes)


def _times(found: Checkpoint) -> dict[str, list[float]]:
    """The time that each update of each average spanned, as far as the file tells."""
    if found.clock is None:
        return {}
    if found.format == "polyak":
        return _own_times(Stored.open(found.path, whole=False), found)
    count = found.clock.count
    if found.clock.unit == "time":
        return dict.fromkeys(found.averages, [count / _EVENLY] * _EVENLY if count else [])
    return dict.fromkeys(found.averages, found.clock.elapsed(1)) if count <= _LONGEST else {}


def _own_times(stored: Stored, found: Checkpoint) -> dict[str, list[float]]:
    """The updates of a file of ours, spread evenly over its time."""
    if stored.value("kind") == "ema":
        times = found.clock.elapsed(stored.value("every")) if found.clock else []
        return dict.fromkeys(found.averages, times if len(times) <= _LONGEST else [])
    ticks = {name: each.tick for name, each in stored.averages().items()}
    return {
        name: [tick.t / tick.n] * tick.n for name, tick in ticks.items() if 0 < tick.n <= _LONGEST
    }
