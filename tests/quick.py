"""Which values of a long table the quick tests try; all tests try every one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def slow_if(value: Any, slow: object) -> Any:
    """A value of a table, for all tests only if it is slow."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow if slow else ())


def first_quick(values: Iterable[Any], quick: int = 1) -> list[Any]:
    """The first values are for the quick tests too."""
    return [slow_if(value, place >= quick) for place, value in enumerate(values)]


def some_quick(values: Iterable[Any], quick: Collection[Any] | Callable[[Any], bool]) -> list[Any]:
    """Those that are named are for the quick tests too."""
    values = list(values)
    if not callable(quick) and any(name not in values for name in quick):
        raise ValueError(f"not all of {quick} are in the table")
    among = quick if callable(quick) else quick.__contains__
    return [slow_if(value, not among(value)) for value in values]
