"""Many averages of a finished run, each judged, beside the live weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from polyak import theory
from polyak._checks import require, require_count
from polyak._runs.choosing import Choice
from polyak._shown import Charted, Table, number_text
from polyak.checkpoints._read import read
from polyak.offline._average import matching
from polyak.offline._combination import Combination
from polyak.offline._findings import Source, left_in
from polyak.offline._quality import Better, Evaluate, Judged, interval, judged, sign_of
from polyak.offline._run import Read, Run, StoredSlot
from polyak.offline._synthesis import MAX_ERROR, Synthesis, of_run
from polyak.rules import Rule


@dataclass(frozen=True)
class Point:
    """One average of a sweep: how long and how good it is, and how exactly it can be made.

    `half_life` and `mean_age` are in the run's unit of time. `quality` is None if the average could
    not be made, and `refused` says why. `interval` is a 95 % interval of its quality minus that of the
    last live weights, if `evaluate` gives a quality for each example.
    """

    rule: str
    half_life: float
    mean_age: float
    relative_error: float
    amplification: float
    quality: float | None
    refused: str = ""
    interval: tuple[float, float] | None = None

    def cells(self) -> tuple[str, ...]:
        """The point as text, for a table."""
        between = self.interval
        return (
            self.rule,
            number_text(self.half_life),
            number_text(self.mean_age),
            f"{self.relative_error:.2g}",
            f"{self.amplification:.3g}",
            "refused" if self.quality is None else number_text(self.quality),
            "" if between is None else f"{between[0]:.3g} .. {between[1]:.3g}",
        )


@dataclass(frozen=True)
class Baseline:
    """Live weights, as a checkpoint or a snapshot has them: the last, or those of the best quality."""

    name: str
    path: str
    at: float
    quality: float


@dataclass(frozen=True)
class Sweep(Charted):
    """The points of a sweep, the shortest average (by mean age) first; at least one has a quality.

    `baselines` are the last live weights and the best ones, if any were stored. `left` is what else
    the checkpoints hold (`Combination.left`).
    """

    points: tuple[Point, ...]
    better: Better
    baselines: tuple[Baseline, ...] = ()
    left: Mapping[str, int] = field(default_factory=dict)

    @property
    def judged(self) -> tuple[Point, ...]:
        """The points that have a quality."""
        return tuple(point for point in self.points if point.quality is not None)

    @property
    def best(self) -> Point | None:
        """The point with the best quality; among equal ones the shortest average.

        None if all others were refused: then nothing was compared.
        """
        if len(self.judged) == 1 < len(self.points):
            return None
        sign = sign_of(self.better)
        return max(self.judged, key=lambda point: sign * (point.quality or 0.0))

    def worse_than(self, baseline: Baseline) -> bool:
        """Whether no average is better than these live weights."""
        sign = sign_of(self.better)
        return all(sign * (p.quality or 0.0) <= sign * baseline.quality for p in self.judged)

    def heading(self) -> list[str]:
        """Which average is best."""
        best = "none: all averages but one were refused" if self.best is None else self.best.rule
        return [f"best: {best} ({self.better} is better)"]

    def tables(self) -> list[Table]:
        """The live weights, and every average, the shortest first."""
        live = [
            (f"live, {b.name} ({b.at:g})", *["-"] * 4, number_text(b.quality), "", "")
            for b in self.baselines
        ]
        made = [(*point.cells(), "best" if point is self.best else "") for point in self.points]
        said = "minus last live (95 %)" if any(point.interval for point in self.points) else ""
        header = ("rule", "half-life", "mean age", "error", "amplification", "quality", said, "")
        return [Table(header, [*live, *made])]

    def as_dict(self) -> dict[str, Any]:
        """The sweep as plain data, for JSON."""
        points = [asdict(point) for point in self.points]
        best = None if self.best is None else asdict(self.best)
        baselines = [asdict(baseline) for baseline in self.baselines]
        fields = {"better": self.better, "best": best, "baselines": baselines, "points": points}
        return {**fields, "left": dict(self.left)}


def sweep(
    folder: Path | str | Choice | None,
    rules: Sequence[Rule | str],
    evaluate: Evaluate,
    at: float | None = None,
    *,
    windows: Sequence[int] = (),
    better: Better = "lower",
    checkpoints: Mapping[int, Path | str] | None = None,
    read: Read = read,
    copy: Sequence[str] = (),
    max_error: float = MAX_ERROR,
    max_amplification: float | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Sweep:
    """Make several averages of a finished run (`synthesize`), and measure the quality of each.

    `evaluate(weights)` takes name -> tensor, as `load_state_dict` does, and returns a finite number, or
    one for each example, the same examples each time; `better` is "lower" or "higher". An average outside
    the limits becomes a point without a quality. For each number n in `windows`, the mean of the
    last n checkpoints is evaluated too. `progress` is called with the evaluations done and their
    number. The other arguments are those of `synthesize`.

    The live weights of every checkpoint are evaluated too, to compare each average with the last and the
    best ones. If there are only snapshots, the last one's live weights are evaluated.

    The best of many averages looks better than it is on the data that chose it: report its quality
    on other data.

    Raises `ValueError` if nothing is given to try, if no average can be made, for a quality that is not
    a finite number, naming the rule, and what `synthesize` raises for any rule.
    """
    sign_of(better)
    require(len(rules) + len(windows) > 0, "rules", rules, "one rule or more, or windows")
    run = Run.of(folder, checkpoints or {}, read, copy)
    made = [of_run(run, rule, at) for rule in rules]
    live = _live(run, at)
    # Snapshots are many, and none is a file to use: only the last is judged.
    single = live[-1:] if any(slot.path in run.keys for slot in live) else live
    trials = [
        *_alone(run, single),
        *_synthesized(made, max_error, max_amplification),
        *_means(run, live, windows),
    ]
    found: list[Judged | None] = []
    for count, (where, weights, _) in enumerate(trials, 1):
        found.append(None if weights is None else judged(evaluate, weights(), where))
        if progress is not None:
            progress(count, len(trials))
    alone = [each for each in found[: len(single)] if each is not None]
    points = [
        _beside(point, quality, alone[-1] if alone else None)
        for (_, _, point), quality in zip(trials, found, strict=True)
        if point is not None
    ]
    if all(point.quality is None for point in points):
        raise ValueError(f"none of {len(points)} averages can be made; {points[0].refused}")
    baselines = _baselines(single, [each.quality for each in alone], better)
    left = left_in(run.source(slot.path) for slot in live if slot.path not in run.keys)
    return Sweep(tuple(sorted(points, key=lambda point: point.mean_age)), better, baselines, left)


Trial = tuple[str, Callable[[], dict[str, Tensor]] | None, Point | None]
"""Its name in errors, its weights if they can be made, and its point if it is an average."""


def _live(run: Run, at: float | None) -> list[StoredSlot]:
    """The live weights that were stored up to a time, in order."""
    end = run.slots[-1].time if at is None else at
    return [slot for slot in run.live if slot.time <= end]


def _alone(run: Run, live: Sequence[StoredSlot]) -> Iterator[Trial]:
    for slot in live:
        weights = partial(_in_memory, run, [slot])
        yield f"for the live weights of {slot.path}", weights, None


def _in_memory(run: Run, live: Sequence[StoredSlot]) -> dict[str, Tensor]:
    """The mean of live weights."""
    sources = [Source(str(slot.path), run.live_weights(slot)) for slot in live]
    shares, copied = np.full(len(live), 1 / len(live)), matching(run.copy, sources)
    return dict(Combination(sources, shares, copy=copied))


def _synthesized(
    made: Sequence[Synthesis], max_error: float, max_amplification: float | None
) -> Iterator[Trial]:
    for each in made:
        refused = each.problem(max_error, max_amplification)
        point = Point(
            rule=str(each.rule),
            half_life=each.half_life,
            mean_age=each.mean_age,
            relative_error=each.relative_error,
            amplification=each.amplification,
            quality=None,
            refused=refused,
        )
        yield f"for {each.rule}", None if refused else each.average, point


def _means(run: Run, live: Sequence[StoredSlot], windows: Sequence[int]) -> Iterator[Trial]:
    """The means of the last checkpoints; times are taken to be evenly spaced, as between the checkpoints."""
    for count in windows:
        require_count("windows", count, "checkpoints")
        require(
            count <= len(live),
            "windows",
            count,
            f"at most {len(live)}: the run has no more checkpoints",
        )
        files = live[-count:]
        between = (files[-1].time - files[0].time) / max(count - 1, 1)
        even = np.full(count, 1 / count)
        lengths = theory.half_life(even) * between, theory.mean_age(even) * between
        point = Point(f"last({count} checkpoints)", *lengths, 0.0, 1.0, None)
        yield f"for {point.rule}", partial(_in_memory, run, files), point


def _beside(point: Point, found: Judged | None, last: Judged | None) -> Point:
    """A point with its quality, and the interval of its difference from the last live weights."""
    if found is None:
        return point
    between = None if last is None else interval(found, last)
    return Point(**{**asdict(point), "quality": found.quality, "interval": between})


def _baselines(
    live: Sequence[StoredSlot], qualities: Sequence[float], better: Better
) -> tuple[Baseline, ...]:
    """The last live weights, and the best of one checkpoint."""
    if not live:
        return ()
    sign = sign_of(better)
    best = max(range(len(live)), key=lambda index: (sign * qualities[index], index))
    named = {"last": len(live) - 1} | ({"best": best} if len(live) > 1 else {})
    return tuple(
        Baseline(name, str(live[i].path), live[i].time, qualities[i]) for name, i in named.items()
    )
