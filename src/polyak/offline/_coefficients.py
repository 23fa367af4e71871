"""The coefficients of a combination of files: checked, made convex, and in the order of the sum."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from polyak._checks import require

_SLACK = 1e-6  # how far the sum of coefficients that are typed in may be from 1


def checked(coefficients: npt.ArrayLike, files: int) -> npt.NDArray[np.float64]:
    """Coefficients that sum to 1, as float64, or `ValueError`."""
    given = np.asarray(coefficients, dtype=np.float64)
    if given.shape != (files,):
        raise ValueError(
            f"coefficients have shape {given.shape}, wanted ({files},): one for each file"
        )
    if not np.isfinite(given).all() or abs(given.sum() - 1) > _SLACK:
        raise ValueError(
            f"coefficients are {given.tolist()} and sum to {given.sum():.8g}, wanted finite numbers "
            "that sum to 1; divide them by their sum"
        )
    result: npt.NDArray[np.float64] = given / given.sum()
    return result


def require_list(name: str, given: object, each: str) -> None:
    """Raise `ValueError` for one path in place of a list, and for an empty list."""
    holds = isinstance(given, Collection) and not isinstance(given, str) and len(given) > 0
    require(holds, name, given, f"a list of one {each} or more")


def convex(coefficients: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`max(c, 0) / sum of max(c, 0)`; where no coefficient is below 0, the coefficients unchanged."""
    clipped = np.maximum(coefficients, 0)
    return coefficients if (coefficients >= 0).all() else clipped / clipped.sum()


def shares(coefficients: npt.NDArray[np.float64]) -> list[tuple[int, float]]:
    """The index and the share of each term that counts: `coefficient / sum of those so far`.

    Positive coefficients come first. Then no partial sum is 0, and no share is infinite.
    """
    counting = [(i, float(c)) for i, c in enumerate(coefficients) if c != 0]
    total, shares = 0.0, []
    for index, coefficient in sorted(counting, key=lambda term: term[1] < 0):
        total += coefficient
        shares.append((index, coefficient / total))
    return shares
