"""Check the fields of a `Study`; each error names the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from polyak._checks import as_number, is_number, require


def require_named(field: str, given: Any) -> None:
    """Raise `ValueError` unless a field is a mapping of names."""
    named = isinstance(given, Mapping) and all(isinstance(name, str) and name for name in given)
    require(named, field, given, "a mapping of names: texts that are not empty")


def require_function(field: str, given: Any) -> None:
    """Raise `ValueError` unless a field is a function; a module is not one, although it can be called."""
    if not callable(given) or isinstance(given, nn.Module):
        raise ValueError(f"{field} is of type {type(given).__name__}, wanted a function")


def as_tuple(field: str, given: Any, kind: type) -> tuple[Any, ...]:
    """The values of a field as a tuple. Raise `ValueError` unless they are in a tuple or list, all of one kind."""
    wanted = f"wanted a tuple of {kind.__name__}"
    if not isinstance(given, tuple | list):
        raise ValueError(f"{field} is of type {type(given).__name__}, {wanted}")
    for i, each in enumerate(given):
        if not isinstance(each, kind):
            raise ValueError(f"{field}[{i}] is of type {type(each).__name__}, {wanted}")
    return tuple(given)


def as_rates(given: Any) -> tuple[float, ...]:
    """Learning rates as floats. Raise `ValueError` unless they are different numbers above 0."""
    rates = [as_number(rate) for rate in given] if isinstance(given, Iterable) else []
    different = len(set(rates)) == len(rates) > 0
    fit = different and all(is_number(rate) and rate > 0 for rate in rates)
    require(fit, "learning_rates", given, "different numbers > 0, such as (0.1,)")
    return tuple(float(rate) for rate in rates)
