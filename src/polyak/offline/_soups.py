"""Soups: of several fine-tuned models those whose average is better than each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polyak._checks import require
from polyak.offline._averaging import opened
from polyak.offline._combining import Combination, Source
from polyak.offline._judging import Better, Evaluate, quality_of, sign_of


@dataclass(frozen=True, eq=False)
class Soup:
    """Which files a soup is made of, and what each trial gave.

    Attributes:
        files: as they were given.
        qualities: of each file alone.
        order: the indices of the files in the order in which they were tried, the best first.
        trials: at each place in that order the quality of the soup so far with that file in it.
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
    files: Sequence[Path | str],
    evaluate: Evaluate,
    *,
    better: Better = "lower",
    which: str | None = None,
    progress: Callable[[Path, float], object] | None = None,
) -> Soup:
    """The greedy soup: file by file, the best first, each kept if the mean with it is better.

    `soup + file <- soup + (file - soup) / (ingredients + 1)`, kept only if its quality is strictly
    better than the soup's. So the soup is at least as good as the best file, on the data that chose
    it: report its quality on other data.

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
            held-out data, and with BatchNorm's statistics estimated anew (`polyak.recalibrate`).
            It is called 2 * files - 1 times.
        better: which end of the quality is good.
        which: the average to take from each file, as `average` does.
        progress: is told each file and the quality of the trial with it.

    One model is in memory at a time: every trial is made from the files, and is bit for bit what
    `average(soup.files, soup.coefficients)` writes.

    Raises `ValueError` for a quality that is not a finite number, naming the file, and whatever
    `average` raises for these files.
    Source: model soups (arXiv 2203.05482, recipe 1).
    """
    sign = sign_of(better)
    require(len(files) > 0, "files", files, "one file or more")
    paths = tuple(Path(file) for file in files)
    sources = opened(files, which)

    def tried(ingredients: Sequence[int]) -> float:
        path = paths[ingredients[-1]]
        quality = _quality(sources, ingredients, evaluate, path)
        if progress is not None:
            progress(path, quality)
        return quality

    qualities = tuple(tried([index]) for index in range(len(paths)))
    order = sorted(range(len(paths)), key=lambda index: -sign * qualities[index])
    kept, quality = [order[0]], qualities[order[0]]
    trials = [quality]
    for index in order[1:]:
        trials.append(tried([*kept, index]))
        if sign * trials[-1] > sign * quality:
            kept, quality = [*kept, index], trials[-1]
    return Soup(paths, qualities, tuple(order), tuple(trials), tuple(kept), quality)


def _quality(
    sources: Sequence[Source], ingredients: Sequence[int], evaluate: Evaluate, path: Path
) -> float:
    """The quality of the mean of some files, the last of them the one that is tried."""
    weights = dict(Combination(sources, _even(ingredients, len(sources))))
    return quality_of(evaluate, weights, f"with {path}")


def _even(ingredients: Sequence[int], files: int) -> npt.NDArray[np.float64]:
    coefficients = np.zeros(files)
    coefficients[list(ingredients)] = 1 / len(ingredients)
    return coefficients
