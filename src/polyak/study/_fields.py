"""Fields: what a recipe may give for a field of `Study`; each error names the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from polyak._checks import as_number, is_number, require


def require_named(field: str, given: Any) -> None:
    """Raise `ValueError` unless a field is a mapping of names."""
    named = isinstance(given, Mapping) and all(isinstance(name, str) and name for name in given)
    require(named, field, given, "a mapping of names: texts that are not empty")


def as_rates(given: Any) -> tuple[float, ...]:
    """Learning rates as floats. Raise `ValueError` unless they are different numbers above 0."""
    rates = [as_number(rate) for rate in given] if isinstance(given, Iterable) else []
    different = len(set(rates)) == len(rates) > 0
    fit = different and all(is_number(rate) and rate > 0 for rate in rates)
    require(fit, "learning_rates", given, "different numbers > 0, such as (0.1,)")
    return tuple(float(rate) for rate in rates)
