"""Choose files by a quality that a function of the user returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polyak.checkpoints._checkpoint import Checkpoint
from polyak.offline._average import matching, opened
from polyak.offline._coefficients import require_list
from polyak.offline._combination import Combination
from polyak.offline._quality import Better, Evaluate, judged, sign_of


@dataclass(frozen=True, eq=False)
class Soup:
    """The files that a soup is made of, and the quality of each trial.

    Attributes:
        files: as they were given.
        qualities: the quality of each file alone.
        order: the indices of the files in the order of the trials, the best file first.
        trials: the quality of each trial in that order: the soup so far, with that file in it.
        ingredients: the indices of the files that were kept, in that order.
        quality: the quality of the soup.
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
    copy: Sequence[str] = (),
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
        files: files of one model, as `average` takes them.
        evaluate: takes weights, name -> tensor, as `load_state_dict` does. It returns their quality, or
            one for each example, whose mean counts. Use held-out data, and estimate BatchNorm's
            statistics again (`polyak.recalibrate`). It is called 2 * files - 1 times.
        better: "lower" or "higher".
        which, copy: as for `average`.
        progress: called after each trial with its file and its quality.

    Only one model is in memory at a time. Every trial is computed from the files, and equals bit for
    bit what `average(soup.files, soup.coefficients)` writes.

    Raises `ValueError` naming the file for a quality that is not a finite number, and what `average`
    raises for these files.
    Source: model soups (arXiv 2203.05482, recipe 1).
    """
    sign = sign_of(better)
    require_list("files", files, "file")
    paths = tuple(f.path if isinstance(f, Checkpoint) else Path(f) for f in files)
    sources = opened(files, which, copy)
    copied = matching(copy, sources)

    def quality_with(ingredients: Sequence[int]) -> float:
        """The quality of the mean of some files; the last of them is on trial."""
        path = paths[ingredients[-1]]
        weights = dict(Combination(sources, _even(ingredients, len(sources)), copy=copied))
        quality = judged(evaluate, weights, f"with {path}").quality
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
