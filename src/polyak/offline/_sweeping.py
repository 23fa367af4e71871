"""Sweeps: which average of a finished run is best, by a quality that the user's function gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyak._checks import require
from polyak.offline._judging import Better, Evaluate, quality_of, sign_of
from polyak.offline._synthesis import MAX_ERROR, Run, Synthesis
from polyak.rules import Rule


@dataclass(frozen=True)
class Point:
    """One average of a sweep: how long and how good it is, and how exactly it was made.

    `half_life` and `mean_age` are in the run's unit of time. `quality` is None where it was not
    made, and `refused` says why.
    """

    rule: str
    half_life: float
    mean_age: float
    relative_error: float
    amplification: float
    quality: float | None
    refused: str = ""


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, the shortest average (by mean age) first; at least one has a quality."""

    points: tuple[Point, ...]
    better: Better

    @property
    def judged(self) -> tuple[Point, ...]:
        """The points that have a quality."""
        return tuple(point for point in self.points if point.quality is not None)

    @property
    def best(self) -> Point:
        """The point of the best quality; of several the shortest average."""
        sign = sign_of(self.better)
        return max(self.judged, key=lambda point: sign * (point.quality or 0.0))

    def around(self) -> tuple[Point, ...]:
        """The best point between its neighbours."""
        place = self.judged.index(self.best)
        return self.judged[max(place - 1, 0) : place + 2]

    def as_dict(self) -> dict[str, Any]:
        """The sweep as plain data, for JSON."""
        points = [asdict(point) for point in self.points]
        return {"better": self.better, "best": asdict(self.best), "points": points}


def sweep(
    folder: Path | str | None,
    rules: Sequence[Rule | str],
    evaluate: Evaluate,
    at: float | None = None,
    *,
    better: Better = "lower",
    checkpoints: Mapping[int, Path | str] | None = None,
    max_error: float = MAX_ERROR,
    max_amplification: float | None = None,
    progress: Callable[[Point], object] | None = None,
) -> Sweep:
    """Makes each of several averages of a finished run (`synthesize`), and asks how good it is.

    `evaluate(weights)` gets name -> tensor, as `load_state_dict` takes it, and gives a finite
    number; `better` says which end is good. Averages outside the limits become points without a
    quality. `progress` is told each point. The other arguments are `synthesize`'s.

    The best of many averages on the data that chose it looks better than it is: report its quality
    on other data.

    Raises `ValueError` for no rule, where no average can be made, for a quality that is not a finite
    number, naming the rule, and whatever `synthesize` raises for all rules alike.
    """
    sign_of(better)
    require(len(rules) > 0, "rules", rules, "one rule or more")
    run, points = Run.of(folder, checkpoints or {}), []
    for rule in rules:
        made = run.synthesis(rule, at)
        refused = made.problem(max_error, max_amplification)
        quality = None if refused else quality_of(evaluate, made.average(), f"for {made.rule}")
        points.append(_point(made, quality, refused))
        if progress is not None:
            progress(points[-1])
    if all(point.quality is None for point in points):
        raise ValueError(f"none of {len(points)} averages can be made; {points[0].refused}")
    return Sweep(tuple(sorted(points, key=lambda point: point.mean_age)), better)


def _point(made: Synthesis, quality: float | None, refused: str) -> Point:
    return Point(
        rule=str(made.rule),
        half_life=made.half_life,
        mean_age=made.mean_age,
        relative_error=made.relative_error,
        amplification=made.amplification,
        quality=quality,
        refused=refused,
    )
