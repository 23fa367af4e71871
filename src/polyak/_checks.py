"""Checks of values: each raises with what was got and what was wanted; and how two mappings differ."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any


def require(holds: bool, name: str, got: object, wanted: str) -> None:
    """Raises `ValueError` with what was got and what was wanted unless the condition holds."""
    if not holds:
        raise ValueError(f"{name} is {got!r}, wanted {wanted}")


def is_number(value: object) -> bool:
    """Whether a value is a finite real number (a bool is not)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max


def is_integer(value: object, least: int) -> bool:
    """Whether a value is an integer of at least so much (a bool is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def require_decay(name: str, got: object, *, one: bool = False) -> None:
    """Raises `ValueError` unless the value is a decay: in [0, 1), or [0, 1] if `one` is allowed."""
    holds = is_number(got) and (0 <= got < 1 or (one and got == 1))  # type: ignore[operator]
    hint = (
        "a decay in [0, 1]" if one else "a decay in [0, 1); 0.999 keeps 99.9 % of the old average"
    )
    require(holds, name, got, hint)


def require_flag(name: str, got: object, meaning: str) -> None:
    """Raises `ValueError` unless the value is True or False (1 is neither)."""
    require(isinstance(got, bool), name, got, f"True or False: {meaning}")


def require_positive(name: str, got: object) -> None:
    """Raises `ValueError` unless the value is a finite number above 0."""
    require(is_number(got) and got > 0, name, got, "a finite number > 0")  # type: ignore[operator]


def require_count(name: str, got: object, meaning: str) -> None:
    """Raises `ValueError` unless the value is an integer of at least 1."""
    require(is_integer(got, 1), name, got, f"an integer >= 1: {meaning}")


def difference(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Lines that say how two mappings name -> shape (or dtype) differ; none if they agree."""
    missing = [name for name in wanted if name not in got]
    extra = [name for name in got if name not in wanted]
    changed = [
        f"{n}: {got[n]}, wanted {wanted[n]}" for n in wanted if n in got and wanted[n] != got[n]
    ]
    lists = (("missing", missing), ("extra", extra), ("different", changed))
    return [f"{label}: {_listed(names)}" for label, names in lists if names]


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def report(title: str, lines: Sequence[str]) -> str:
    """An error message: a title, and the differences below it."""
    return "\n  ".join([title, *lines])
