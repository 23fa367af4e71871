"""Selection: choose files or averages by a quality that a function of the user gives."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from polyak._checks import require
from polyak.checkpoints._checkpoint import Checkpoint
from polyak.offline._average import opened
from polyak.offline._combination import Combination
from polyak.offline._run import Run
from polyak.offline._synthesis import MAX_ERROR, Synthesis, of_run
from polyak.rules import Rule

Better = Literal["lower", "higher"]
Evaluate = Callable[[dict[str, Tensor]], float]


@dataclass(frozen=True, eq=False)
class Soup:
    """Which files a soup is made of, and the quality of each trial.

    Attributes:
        files: as they were given.
        qualities: of each file alone.
        order: the indices of the files in the order of the trials, the best file first.
        trials: the quality of each trial in that order: the soup so far, with that file in it.
        ingredients: the indices of the files that were kept, in that order.
        quality: of the soup.
    """

    files: tuple[Path, ...]
    qualities: tuple[float, ...]
    order: tuple[int, ...]
    trials: tuple[float, ...]
    ingredients: tuple[int, ...]
    quality: float

    @property
    def coefficients(self) -> npt.NDArray[np.float64]:
        """One for each file: 1 / ingredients, or 0; `average(soup.files, soup.coefficients)`."""
        return _even(self.ingredients, len(self.files))


def greedy_soup(
    files: Sequence[os.PathLike[str] | str | Checkpoint],
    evaluate: Evaluate,
    *,
    better: Better = "lower",
    which: str | None = None,
    progress: Callable[[Path, float], object] | None = None,
) -> Soup:
    """Choose files greedily, the best first: keep a file if the mean with it is strictly better.

    `soup + file <- soup + (file - soup) / (ingredients + 1)`. The soup is at least as good as the
    best file, but on the data that chose it: report its quality on other data.

    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> paths = [folder / f"{i}.safetensors" for i in range(3)]
    >>> for value, path in zip((1.0, 4.0, -1.5), paths):
    ...     save_file({"w": torch.tensor([value])}, path)
    >>> soup = greedy_soup(paths, lambda weights: float(weights["w"] ** 2), better="lower")
    >>> soup.ingredients, soup.quality, soup.coefficients
    ((0, 2), 0.0625, array([0.5, 0. , 0.5]))

    Args:
        files: of one model, as `average` takes them.
        evaluate: gives the quality of weights, name -> tensor, as `load_state_dict` takes them: on
            held-out data, and with BatchNorm's statistics estimated again (`polyak.recalibrate`).
            It is called 2 * files - 1 times.
        better: "lower" or "higher".
        which: the weights to take from each file, as for `average`.
        progress: called after each trial with its file and its quality.

    Only one model is in memory at a time. Every trial is computed from the files, and equals bit for
    bit what `average(soup.files, soup.coefficients)` writes.

    Raises `ValueError` naming the file for a quality that is not a finite number, and what `average`
    raises for these files.
    Source: model soups (arXiv 2203.05482, recipe 1).
    """
    sign = _sign_of(better)
    require(len(files) > 0, "files", files, "one file or more")
    paths = tuple(f.path if isinstance(f, Checkpoint) else Path(f) for f in files)
    sources = opened(files, which)

    def quality_with(ingredients: Sequence[int]) -> float:
        """The quality of the mean of some files; the last of them is on trial."""
        path = paths[ingredients[-1]]
        weights = dict(Combination(sources, _even(ingredients, len(sources))))
        quality = _quality_of(evaluate, weights, f"with {path}")
        if progress is not None:
            progress(path, quality)
        return quality

    qualities = tuple(quality_with([index]) for index in range(len(paths)))
    order = sorted(range(len(paths)), key=lambda index: -sign * qualities[index])
    kept, quality = [order[0]], qualities[order[0]]
    trials = [quality]
    for index in order[1:]:
        trials.append(quality_with([*kept, index]))
        if sign * trials[-1] > sign * quality:
            kept, quality = [*kept, index], trials[-1]
    return Soup(paths, qualities, tuple(order), tuple(trials), tuple(kept), quality)


def _even(ingredients: Sequence[int], files: int) -> npt.NDArray[np.float64]:
    coefficients = np.zeros(files)
    coefficients[list(ingredients)] = 1 / len(ingredients)
    return coefficients


@dataclass(frozen=True)
class Point:
    """One average of a sweep: how long and how good it is, and how exactly it can be made.

    `half_life` and `mean_age` are in the run's unit of time. `quality` is None if the average could
    not be made, and `refused` says why.
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
        """The point with the best quality; among equal ones the shortest average."""
        sign = _sign_of(self.better)
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
    """Make several averages of a finished run (`synthesize`), and measure the quality of each.

    `evaluate(weights)` takes name -> tensor, as `load_state_dict` does, and returns a finite number;
    `better` is "lower" or "higher". An average outside the limits becomes a point without a quality.
    `progress` is called with each point. The other arguments are those of `synthesize`.

    The best of many averages looks better than it is on the data that chose it: report its quality
    on other data.

    Raises `ValueError` if no rule is given, if no average can be made, for a quality that is not a
    finite number, naming the rule, and what `synthesize` raises for any rule.
    """
    _sign_of(better)
    require(len(rules) > 0, "rules", rules, "one rule or more")
    run, points = Run.of(folder, checkpoints or {}), []
    for rule in rules:
        made = of_run(run, rule, at)
        refused = made.problem(max_error, max_amplification)
        quality = None if refused else _quality_of(evaluate, made.average(), f"for {made.rule}")
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


def _sign_of(better: Better) -> int:
    """The factor that turns a quality into one whose higher values are better."""
    require(better in get_args(Better), "better", better, '"lower" or "higher"')
    return 1 if better == "higher" else -1


def _quality_of(evaluate: Evaluate, weights: dict[str, Tensor], where: str) -> float:
    """The quality of weights; raises `ValueError` with `where` unless it is a finite number."""
    quality = evaluate(weights)
    try:
        number = float(quality)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"evaluate gave {quality!r} {where}, wanted a finite number")
    return number
