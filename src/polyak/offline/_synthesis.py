"""Any average of a finished run, from its snapshots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyak._checks import as_number, require, require_positive
from polyak._lazy import renamed
from polyak._ranks.agreement import together_or_alone
from polyak._runs.choosing import Choice
from polyak._shown import Charted, Table
from polyak.checkpoints._read import read
from polyak.offline._average import matching
from polyak.offline._combination import Combination
from polyak.offline._findings import Source
from polyak.offline._run import Read, Run, StoredSlot
from polyak.rules import LIVE, Rule
from polyak.specs import as_rule
from polyak.theory import half_life, mean_age
from polyak.theory._profiles import Profile, coefficients
from polyak.theory._synthesis import fit

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_ERROR = 0.05
MAX_ROUNDING = 0.02  # of the weights: the largest amplified rounding of the stored dtype
_NOTHING = 1e-10
Place = tuple[Path, str, str]


class Term(NamedTuple):
    """One term of the sum: the file, the average and its slot (or "live"), the time, the coefficient."""

    path: Path
    average: str
    slot: str
    time: float
    coefficient: float

    @property
    def place(self) -> Place:
        """Where its tensors are stored: the file, the average, the slot."""
        return self.path, self.average, self.slot


@dataclass(frozen=True, eq=False)
class Synthesis(Charted):
    """An average that can be made from what was stored, and how exactly; no tensor is read yet.

    Attributes:
        rule, at: the average, and the time at which it is made.
        relative_error: the error for weights that do a random walk, as a share of the average's
            distance from the live weights (`theory.fit` with the norm "increments").
        amplification: the sum of |coefficients|, by which the rounding of the stored dtype grows.
        precision: the distance from 1 to the next number in the coarsest stored dtype.
        half_life, mean_age: of the average's profile at that time, in the run's unit of time.
        terms: the terms of the sum.
        statistics: the terms for running statistics: the nearest combination without a coefficient
            below 0, since an extrapolated variance can be negative (`theory.fit`, `convex`).
        run: everything that was stored.
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
        """name -> dtype, policy and other names of each tensor of the model, if there are snapshots."""
        return self.run.model

    def __str__(self) -> str:
        files = len({term.path for term in self.terms})
        return (
            f"{self.rule} at {self.at:g}, from {len(self.terms)} stored averages in {files} files: "
            f"relative error {self.relative_error:.2g}, amplification {self.amplification:.3g}"
        )

    def heading(self) -> list[str]:
        """The average, and how exact it is."""
        return [str(self)]

    def tables(self) -> list[Table]:
        """The terms of the sum."""
        rows = [
            (str(t.path), t.average, t.slot, f"{t.time:g}", f"{t.coefficient:.6g}")
            for t in self.terms
        ]
        return [Table(("file", "average", "slot", "time", "coefficient"), rows, left=3)]

    def as_dict(self) -> dict[str, Any]:
        """The rule, the measures and the terms as plain data, for JSON."""
        names = ("at", "relative_error", "amplification", "half_life", "mean_age")
        terms = [{**term._asdict(), "path": str(term.path)} for term in self.terms]
        return {"rule": str(self.rule), **{n: getattr(self, n) for n in names}, "terms": terms}

    def problem(self, max_error: float, max_amplification: float | None) -> str:
        """Why the limits do not allow it; empty if they do."""
        if max_amplification is None:
            max_amplification = 2 * MAX_ROUNDING / self.precision
        max_error = require_positive("max_error", max_error)
        max_amplification = require_positive("max_amplification", max_amplification)
        if self.relative_error <= max_error and self.amplification <= max_amplification:
            return ""
        return (
            f"{self.rule} at {self.at:g} cannot be made from what was stored: relative error "
            f"{self.relative_error:.3g} (limit {max_error:g}), amplification "
            f"{self.amplification:.3g} (limit {max_amplification:g}). Choose a longer average or a "
            "time with more snapshots around it, or raise max_error and max_amplification"
        )

    def weights(self, *, allow_nonfinite: bool = True) -> Combination:
        """The average as a mapping that computes a tensor when it is asked for, in the model's dtypes.

        Tied weights appear once. Sums are computed in float64. Each tensor is compared with its
        checksum when it is read; raises `ValueError` for a damaged one, and unless `allow_nonfinite`
        for values that are infinite or NaN.
        """
        needed = {term.place for term in (*self.terms, *self.statistics)}
        places = [slot.place for slot in self.run.slots if slot.place in needed]
        dtypes = {name: getattr(torch, str(about["dtype"])) for name, about in self.model.items()}
        copied = {name for name, about in self.model.items() if about["policy"] == "copy"}
        sources = [self._source(place) for place in places]
        return Combination(
            sources,
            _coefficients(self.terms, places),
            statistics=_coefficients(self.statistics, places),
            dtype=dtypes or None,
            accumulate=torch.float64,
            copy=copied | matching(self.run.copy, sources),
            allow_nonfinite=allow_nonfinite,
        )

    def _source(self, place: Place) -> Source:
        """The weights at a place; tensors that are copied are those of the same snapshot."""
        path, average, slot = place
        if slot == LIVE:
            return self.run.source(path)
        keys = {
            name: f"copies/{name}"
            if about["policy"] == "copy"
            else f"averages/{average}/{slot}/{name}"
            for name, about in self.model.items()
        }
        return Source(str(path), renamed(self.run.snapshot(path), keys))

    def average(self) -> dict[str, Tensor]:
        """The average in memory, under all names of tied weights, for `load_state_dict`."""
        made = dict(self.weights())
        tied = {alias: name for name, about in self.model.items() for alias in about["aliases"]}
        return made | {alias: made[name] for alias, name in tied.items()}

    def save(
        self,
        path: Path | str,
        *,
        shard_bytes: int | None = None,
        overwrite: bool = False,
        allow_nonfinite: bool = True,
        progress: Callable[[int, int], object] | None = None,
        group: ProcessGroup | None = None,
    ) -> Combination:
        """Write the average as plain safetensors; arguments and errors as in `Combination.write`."""
        with together_or_alone("save", group):
            weights = self.weights(allow_nonfinite=allow_nonfinite)
        weights.write(
            path, shard_bytes=shard_bytes, overwrite=overwrite, progress=progress, group=group
        )
        return weights


def synthesize(
    folder: Path | str | Choice | None,
    rule: Rule | str,
    at: float | None = None,
    *,
    checkpoints: Mapping[int, Path | str] | None = None,
    read: Read = read,
    copy: Sequence[str] = (),
    max_error: float = MAX_ERROR,
    max_amplification: float | None = None,
) -> Synthesis:
    """Make the average that a rule would have had at a time, from snapshots or checkpoints of the run.

    It is `sum of coefficient * stored tensor`. The coefficients come from least squares on profiles
    (`theory.fit`), and their sum is 1. Only headers are read until `average()` or `save(path)` of the
    result.

    Args:
        folder: a folder of snapshots that `Recorder` wrote, or of a run with plain checkpoints; or those that
            `choose` found in it; or None.
        rule: a rule or its spec; it is updated at the same steps as the recorded averages.
        at: the time, in the run's unit; by default that of the last snapshot or checkpoint.
        checkpoints: step -> file with the live weights at that step, in any format that
            `checkpoints.read` reads. Each counts for the steps around it, so a long average over
            many checkpoints is exact and a short one is refused.
        read: the function that reads a checkpoint, such as `functools.partial(checkpoints.read, key="g_ema")`.
        copy: names of tensors of plain checkpoints, or patterns, to take from the last one.
        max_error: the largest relative error that is allowed.
        max_amplification: the largest amplification that is allowed; by default it amplifies the
            rounding of the coarsest stored dtype to 2 %: 5 for bfloat16, 41 for float16, 335 544 for
            float32.

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
    exponential(half_life=300) at 2000, from 42 stored averages in 21 files: relative error 0.0005, amplification 1.65

    Raises `ValueError` for an error or an amplification above the limits, with both numbers; for a
    time without snapshots, and for snapshots of different runs.
    """
    synthesis = of_run(Run.of(folder, checkpoints or {}, read, copy), rule, at)
    if problem := synthesis.problem(max_error, max_amplification):
        raise ValueError(problem)
    return synthesis


def of_run(run: Run, rule: Rule | str, at: float | None) -> Synthesis:
    """The average that a rule would have had at a time, however well it can be made."""
    rule = as_rule(rule)
    at = run.slots[-1].time if at is None else as_number(at)
    elapsed = run.elapsed_until(at)
    slots = [slot for slot in run.slots if slot.column.updates <= len(elapsed)]
    first = run.slots[0].time
    require(bool(slots), "at", at, f"a time of {first:g} or later: nothing was stored before")
    columns = [slot.column for slot in slots]
    result = fit(columns, rule, elapsed, norm="increments")
    terms = _terms(slots, result.coefficients)
    statistics = terms
    if run.has_statistics() and any(term.coefficient < 0 for term in terms):
        convex = fit(columns, rule, elapsed, norm="increments", convex=True)
        statistics = _terms(slots, convex.coefficients)
    profile, unit = coefficients(rule, elapsed), at / len(elapsed)
    return Synthesis(
        rule=rule,
        at=at,
        relative_error=result.relative_error,
        amplification=result.amplification,
        precision=run.precision,
        half_life=half_life(profile) * unit,
        mean_age=mean_age(profile) * unit,
        terms=terms,
        statistics=statistics,
        run=run,
    )


def _terms(slots: Sequence[StoredSlot], coefficients: Profile) -> tuple[Term, ...]:
    """The stored slots that count, with their coefficients."""
    pairs = zip(slots, coefficients.tolist(), strict=True)
    return tuple(
        Term(slot.path, slot.average, slot.column.slot, slot.time, coefficient)
        for slot, coefficient in pairs
        if abs(coefficient) > _NOTHING
    )


def _coefficients(terms: Sequence[Term], places: Sequence[Place]) -> Profile:
    """The coefficient of each place, 0 for a place without a term; their sum is 1."""
    by_place = {term.place: term.coefficient for term in terms}
    unscaled = np.array([by_place.get(place, 0.0) for place in places])
    scaled: Profile = unscaled / unscaled.sum()
    return scaled
