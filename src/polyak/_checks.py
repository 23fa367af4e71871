"""Checks of values, whose errors say what was given and what was wanted; and differences of mappings."""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any


def as_number(value: Any) -> Any:
    """A number of numpy, torch or another library as a Python int or float; other values unchanged.

    Such a number is a scalar or an array without dimensions. A bool is not a number, and stays a
    bool. Reading a number from a device waits for that device.

    >>> from fractions import Fraction
    >>> as_number(Fraction(1, 4)), as_number(True), as_number("0.5")
    (0.25, True, '0.5')
    """
    if type(value) in (int, float, bool, str):
        return value
    if isinstance(value, int | float):  # numpy's float64 is a float, and prints otherwise
        return int(value) if isinstance(value, int) else float(value)
    if getattr(value, "shape", ()) != ():
        return value
    try:
        # `item` first: it keeps a bool a bool, and works where a tensor needs a gradient.
        plain = value.item() if hasattr(value, "item") else value
        if isinstance(plain, bool | int | float):
            return plain
        if hasattr(plain, "__index__"):
            return operator.index(plain)
        return float(plain) if hasattr(plain, "__float__") else value
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return value


def require(holds: bool, name: str, got: object, wanted: str) -> None:
    """Raise `ValueError` with what was given and what is wanted, unless the condition holds."""
    if not holds:
        raise ValueError(f"{name} is {got!r}, wanted {wanted}")


@contextmanager
def prefixed(label: object) -> Iterator[None]:
    """Let the text of a `ValueError` within the block begin with a label, such as a file's path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


def named(pattern: str, names: Collection[str]) -> list[str]:
    """The names that a name or a glob pattern means; a name in full means itself alone."""
    return [pattern] if pattern in names else [n for n in names if fnmatchcase(n, pattern)]


def is_number(value: object) -> bool:
    """Whether a value is a finite Python int or float (a bool is not)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max


def is_integer(value: object, least: int) -> bool:
    """Whether a value is a Python int of at least `least` (a bool is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def require_decay(name: str, got: Any) -> float:
    """The value as a decay: 0 keeps nothing of the old average, 1 all. Raise `ValueError` otherwise."""
    return require_share(name, got, "a decay in [0, 1]; 0.999 keeps 99.9 % of the old average")


def require_share(name: str, got: Any, wanted: str = "a number in [0, 1]") -> float:
    """The value as a Python number from 0 to 1; raise `ValueError` otherwise."""
    number = as_number(got)
    require(is_number(number) and 0 <= number <= 1, name, got, wanted)
    return number  # type: ignore[no-any-return]


def require_flag(name: str, got: object, meaning: str) -> None:
    """Raise `ValueError` unless the value is True or False (1 is neither)."""
    require(isinstance(got, bool), name, got, f"True or False: {meaning}")


def require_positive(name: str, got: Any) -> float:
    """The value as a finite Python number above 0; raise `ValueError` otherwise."""
    number = as_number(got)
    require(is_number(number) and number > 0, name, got, "a finite number > 0")
    return number  # type: ignore[no-any-return]


def require_not_negative(name: str, got: Any, wanted: str = "a finite number >= 0") -> float:
    """The value as a finite Python number >= 0; raise `ValueError` otherwise."""
    number = as_number(got)
    require(is_number(number) and number >= 0, name, got, wanted)
    return number  # type: ignore[no-any-return]


def require_count(name: str, got: Any, meaning: str = "", *, least: int = 1) -> int:
    """The value as a Python int of at least `least`; raise `ValueError` otherwise."""
    count = as_number(got)
    wanted = f"an integer >= {least}" + (f": {meaning}" if meaning else "")
    require(is_integer(count, least), name, got, wanted)
    return count  # type: ignore[no-any-return]


def difference(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Lines that say how two mappings differ, such as name -> shape; no line if they agree."""
    missing = [name for name in wanted if name not in got]
    extra = [name for name in got if name not in wanted]
    changed = [
        f"{n}: {got[n]}, wanted {wanted[n]}" for n in wanted if n in got and wanted[n] != got[n]
    ]
    lists = (("missing", missing), ("extra", extra), ("different", changed))
    return [f"{label}: {listed(names)}" for label, names in lists if names]


def listed(names: Sequence[object], most: int = 8) -> str:
    """The names in one line, the first `most` of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def report(title: str, lines: Sequence[str]) -> str:
    """An error message: a title, and the differences below it."""
    return "\n  ".join([title, *lines])
