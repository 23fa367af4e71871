"""Synthesis after training: any average of a run from the snapshots that were recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyak._checks import as_number, require, require_count, require_positive
from polyak._engine.tracking import is_statistic
from polyak._lazy import Renamed, renamed
from polyak._ranks.agreement import together
from polyak.checkpoints._own_format import Stored
from polyak.checkpoints._snapshots import Snapshot, snapshots
from polyak.offline._average import opened
from polyak.offline._combination import Combination, Source
from polyak.rules import LIVE, Rule
from polyak.specs import as_rule
from polyak.theory import half_life, mean_age
from polyak.theory._profiles import Profile, coefficients
from polyak.theory._synthesis import Column, fit

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_ERROR = 0.05
MAX_ROUNDING = 0.02  # of the weights: the amplified rounding of what is stored
_NOTHING = 1e-10
_FINEST = 50_000  # updates that a run of plain checkpoints alone is divided into


class Term(NamedTuple):
    """What is summed: the file, the average and its slot (or "live"), their time, their coefficient."""

    path: Path
    average: str
    slot: str
    time: float
    coefficient: float

    @property
    def place(self) -> tuple[Path, str, str]:
        """Where its tensors are stored: the file, the average, the slot."""
        return self.path, self.average, self.slot


@dataclass(frozen=True, eq=False)
class Synthesis:
    """An average that can be made of what was stored, and how exactly; no tensor is read yet.

    Attributes:
        rule, at: the average, and the time at which it is made.
        relative_error: that of `theory.fit` by "increments": on a random walk the error of the
            result, as a share of the average's distance from the live weights.
        amplification: the sum of |coefficients|: how much the rounding of what is stored grows.
        precision: of the coarsest stored dtype: the distance from 1 to the next number.
        half_life, mean_age: of the average's profile at that time, in the run's unit of time.
        terms: what is summed.
        statistics: what is summed for running statistics: the nearest combination without a
            coefficient below 0, since an extrapolated variance can be negative (`theory.fit`,
            `convex`).
        run: what was stored.
    """

    rule: Rule
    at: float
    relative_error: float
    amplification: float
    precision: float
    half_life: float
    mean_age: float
    terms: tuple[Term, ...]
    statistics: tuple[Term, ...]
    run: Run = field(repr=False)

    @property
    def model(self) -> Mapping[str, Any]:
        """name -> dtype, policy and other names of the model's tensors, where snapshots tell."""
        return self.run.model

    def __str__(self) -> str:
        files = len({term.path for term in self.terms})
        return (
            f"{self.rule} at {self.at:g}, of {len(self.terms)} stored averages in {files} files: "
            f"relative error {self.relative_error:.2g}, amplification {self.amplification:.3g}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The rule, the measures and the terms as plain data, for JSON."""
        names = ("at", "relative_error", "amplification", "half_life", "mean_age")
        terms = [{**term._asdict(), "path": str(term.path)} for term in self.terms]
        return {"rule": str(self.rule), **{n: getattr(self, n) for n in names}, "terms": terms}

    def problem(self, max_error: float, max_amplification: float | None) -> str:
        """Why it is not to be made under these limits; empty where it may be."""
        if max_amplification is None:
            max_amplification = 2 * MAX_ROUNDING / self.precision
        max_error = require_positive("max_error", max_error)
        max_amplification = require_positive("max_amplification", max_amplification)
        if self.relative_error <= max_error and self.amplification <= max_amplification:
            return ""
        return (
            f"{self.rule} at {self.at:g} cannot be made of what was stored: relative error "
            f"{self.relative_error:.3g} (limit {max_error:g}), amplification "
            f"{self.amplification:.3g} (limit {max_amplification:g}). Choose a longer average or a "
            "time with more snapshots around it, or raise max_error and max_amplification"
        )

    def weights(self) -> Combination:
        """The average as a mapping that computes a tensor when asked, in the model's dtypes.

        Tied weights are there once. Sums are in float64. Snapshots are read and compared with their
        digests first; raises `ValueError` for a damaged one.
        """
        sources = []
        both = {each.place: each for each in (*self.terms, *self.statistics)}
        places = [place for each in self.run.found if (place := each.term(0.0).place) in both]
        for term in map(both.__getitem__, places):
            if term.slot == LIVE:
                sources += opened([term.path], None)
            else:
                prefix = f"averages/{term.average}/{term.slot}/"
                slot = _slot(self.run.snapshot(term.path), prefix, self.model)
                sources.append(Source(str(term.path), slot))
        dtypes = {name: getattr(torch, str(each["dtype"])) for name, each in self.model.items()}
        shares, statistics = (
            np.array([{each.place: each.coefficient for each in terms}.get(p, 0.0) for p in places])
            for terms in (self.terms, self.statistics)
        )
        return Combination(
            sources,
            shares / shares.sum(),
            statistics=statistics / statistics.sum(),
            dtype=dtypes or None,
            accumulate=torch.float64,
            copy=[name for name, each in self.model.items() if each["policy"] == "copy"],
        )

    def average(self) -> dict[str, Tensor]:
        """The average in memory, under all names of tied weights: for `load_state_dict`."""
        made = dict(self.weights())
        tied = {alias: name for name, each in self.model.items() for alias in each["aliases"]}
        return made | {alias: made[name] for alias, name in tied.items()}

    def save(
        self,
        path: Path | str,
        *,
        shard_bytes: int | None = None,
        overwrite: bool = False,
        progress: Callable[[int, int], object] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        """Writes the average as plain safetensors; arguments and errors are `Combination.write`'s."""
        with together("save", group) if group is not None else nullcontext():
            weights = self.weights()
        weights.write(
            path, shard_bytes=shard_bytes, overwrite=overwrite, progress=progress, group=group
        )


def synthesize(
    folder: Path | str | None,
    rule: Rule | str,
    at: float | None = None,
    *,
    checkpoints: Mapping[int, Path | str] | None = None,
    max_error: float = MAX_ERROR,
    max_amplification: float | None = None,
) -> Synthesis:
    """The average that a rule would have had at a time, made of what was stored of the run.

    `sum of coefficient * stored tensor`, the coefficients by least squares on profiles
    (`theory.fit`), of sum 1. Only headers are read, until the result's `average()` or `save(path)`.

    Args:
        folder: of snapshots that `Recorder` wrote, or None where there are only checkpoints.
        rule: the average wanted, a rule or its spec; it is updated as the recorded ones were.
        at: the time, in the run's unit; by default that of the last snapshot or checkpoint.
        checkpoints: time -> file with the live weights at that time, in steps: any that
            `checkpoints.read` knows. They stand for the steps around them, so a long average of
            many is good and a short one is refused.
        max_error: the largest relative error that is not refused.
        max_amplification: likewise; by default what makes 2 % of the rounding of the coarsest stored
            dtype: 5 of bfloat16, 41 of float16, 335 544 of float32.

    >>> import tempfile
    >>> from polyak import Averager, Power, Recorder
    >>> weights, folder = {"w": torch.zeros(2, dtype=torch.float64)}, tempfile.mkdtemp()
    >>> rules = {str(s): Power.from_relative_std(s) for s in (0.05, 0.10)}
    >>> averager = Averager(weights, rules)
    >>> recorder = Recorder(averager, folder, every=100)
    >>> for step in range(2000):
    ...     _ = weights["w"].add_(torch.tensor([1.0, -1.0]) / (step + 1))
    ...     averager.update()
    ...     _ = recorder.update()
    >>> print(synthesize(folder, "exponential(half_life=300)"))
    exponential(half_life=300) at 2000, of 42 stored averages in 21 files: relative error 0.0005, amplification 1.65

    Raises `ValueError` for an error or an amplification above the limits, saying both; for a time
    without snapshots and for snapshots of different runs.
    """
    found = Run.of(folder, checkpoints or {}).synthesis(rule, at)
    if problem := found.problem(max_error, max_amplification):
        raise ValueError(problem)
    return found


class _Found(NamedTuple):
    """One stored average of a file: its column for the fit, and when it was stored."""

    column: Column
    path: Path
    average: str
    time: float

    def term(self, coefficient: float) -> Term:
        return Term(self.path, self.average, self.column.slot, self.time, coefficient)


@dataclass(frozen=True, eq=False)
class Run:
    """All that was stored of a run, in the order of time, and the times that its updates span.

    Its files are opened once for all that is made of them.
    """

    found: list[_Found]
    elapsed: list[float]
    model: Mapping[str, Any]
    dtypes: frozenset[torch.dtype]
    opened: dict[Path, Stored] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path | str | None, checkpoints: Mapping[int, Path | str]) -> Run:
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
        recorded = snapshots(folder) if folder is not None else []
        elapsed = recorded[-1].elapsed() if recorded else _grid(checkpoints)
        plain = [
            _Found(Column(None, LIVE, _update_at(elapsed, time)), Path(path), LIVE, float(time))
            for time, path in checkpoints.items()
        ]
        found = [*(each for snapshot in recorded for each in _slots(snapshot)), *plain]
        in_order = sorted(found, key=lambda each: each.column.updates)
        if not recorded:
            return cls(in_order, elapsed, {}, frozenset({torch.bfloat16}))
        dtypes = frozenset().union(*(snapshot.dtypes for snapshot in recorded))
        return cls(in_order, elapsed, recorded[-1].model, dtypes)

    def synthesis(self, rule: Rule | str, at: float | None) -> Synthesis:
        """The average that a rule would have had at a time, however well it can be made."""
        rule = as_rule(rule)
        at = self.found[-1].time if at is None else as_number(at)
        elapsed = self._elapsed_until(at)
        found = [each for each in self.found if each.column.updates <= len(elapsed)]
        first = self.found[0].time
        require(bool(found), "at", at, f"a time of {first:g} or later: nothing was stored before")
        columns = [each.column for each in found]
        result = fit(columns, rule, elapsed, norm="increments")
        terms = _terms(found, result.coefficients)
        statistics = terms
        if self._has_statistics() and any(term.coefficient < 0 for term in terms):
            convex = fit(columns, rule, elapsed, norm="increments", convex=True)
            statistics = _terms(found, convex.coefficients)
        profile, unit = coefficients(rule, elapsed), at / len(elapsed)
        return Synthesis(
            rule=rule,
            at=at,
            relative_error=result.relative_error,
            amplification=result.amplification,
            precision=max(torch.finfo(dtype).eps for dtype in self.dtypes),
            half_life=half_life(profile) * unit,
            mean_age=mean_age(profile) * unit,
            terms=terms,
            statistics=statistics,
            run=self,
        )

    def snapshot(self, path: Path) -> Stored:
        """A snapshot, opened; raises `ValueError` for a damaged header."""
        if path not in self.opened:
            self.opened[path] = Stored.open(path)
        return self.opened[path]

    def _has_statistics(self) -> bool:
        """Whether the model has running statistics, or may have: checkpoints alone do not tell."""
        return not self.model or any(map(is_statistic, self.model))

    def _elapsed_until(self, at: float) -> list[float]:
        """The times that updates span, up to the last one not after `at`."""
        times = list(accumulate(self.elapsed))
        slack = 1e-9 * times[-1]
        require(
            0 < at <= times[-1] + slack, "at", at, f"a time up to {times[-1]:g}, the last known"
        )
        return self.elapsed[: int(np.searchsorted(times, at + slack, side="right"))]


def _terms(found: Sequence[_Found], coefficients: Profile) -> tuple[Term, ...]:
    """The stored averages that count, with their coefficients."""
    pairs = zip(found, coefficients.tolist(), strict=True)
    return tuple(each.term(c) for each, c in pairs if abs(c) > _NOTHING)


def _slots(snapshot: Snapshot) -> Iterator[_Found]:
    """The slots that a snapshot holds of each average."""
    for average, rule in snapshot.rules.items():
        for slot in snapshot.slots[average]:
            if slot in rule.slots:
                column = Column(rule, slot, snapshot.updates)
                yield _Found(column, snapshot.path, average, snapshot.time)


def _grid(checkpoints: Mapping[int, Path | str]) -> list[float]:
    """Times of updates that meet those of all checkpoints, as fine as is worth while."""
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


def _slot(stored: Stored, prefix: str, model: Mapping[str, Any]) -> Renamed:
    """A slot of a snapshot by the model's names, with the copied tensors of that time."""
    keys = {
        name: f"copies/{name}" if each["policy"] == "copy" else prefix + name
        for name, each in model.items()
    }
    return renamed(stored, keys)
