"""The format of a record: what the line of one run in `results.jsonl` must hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from reprlib import Repr
from typing import Any, NamedTuple

from polyak._checks import is_integer, is_number

Record = dict[str, Any]

_MOST_LINES = 8

_repr = Repr()
_repr.maxstring = _repr.maxother = 120


class Kind(NamedTuple):
    """A kind of value: how an error message names it, and which values are of it."""

    name: str
    holds: Callable[[Any], bool]


class Listed(NamedTuple):
    """A list of values of one kind, with a fixed length where the record tells it."""

    kind: Kind
    length: int | None = None


NUMBER = Kind("a finite number", is_number)
POSITIVE = Kind("a finite number > 0", lambda value: is_number(value) and value > 0)
COUNT = Kind("an integer >= 1", lambda value: is_integer(value, 1))
NOT_NEGATIVE = Kind("an integer >= 0", lambda value: is_integer(value, 0))
TEXT = Kind("text", lambda value: isinstance(value, str))
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))


class RecordFormat(NamedTuple):
    """The format of a line: its conditions and its fields."""

    conditions: Callable[[Record], Mapping[str, Any]]
    fields: Callable[[Record], Mapping[str, Any]]


def fingerprint(conditions: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that identify the conditions."""
    return hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:12]


def require_record(record: object, form: RecordFormat) -> None:
    """Raises `ValueError` unless a value is a record of this format."""
    if not isinstance(record, dict):
        raise ValueError(f"it holds {_repr.repr(record)}, wanted the record of a run")
    stored = record.get("conditions")
    if not isinstance(stored, dict):
        raise ValueError("it has no conditions, so it is not a record of the study")
    conditions = form.conditions(record)
    if changed := differences(stored, conditions):
        older = "by another version of polyak, " * (stored.keys() != conditions.keys())
        raise ValueError(f"it was made {older}under other conditions\n  " + "\n  ".join(changed))
    if record.get("fingerprint") != fingerprint(conditions):
        got, wanted = _repr.repr(record.get("fingerprint")), fingerprint(conditions)
        raise ValueError(f"its fingerprint is {got}, but its conditions have {wanted!r}")
    if problem := next(_problems("", record, form.fields(record)), ""):
        raise ValueError(problem)


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Lines that say in which conditions two mappings differ: at most eight, then a count."""
    lines = list(all_differences(stored, wanted))
    more = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], *([f"and {more} more"] if more > 0 else [])]


def all_differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], within: str = ""
) -> Iterator[str]:
    """A line for each condition in which two mappings differ."""
    for name in sorted({*stored, *wanted}):
        theirs, ours = stored.get(name, "(nothing)"), wanted.get(name, "(nothing)")
        if isinstance(theirs, dict) and isinstance(ours, dict):
            yield from all_differences(theirs, ours, f"{within}{name}: ")
        elif theirs != ours:
            yield f"{within}{name}: {_repr.repr(theirs)} there, {_repr.repr(ours)} now"


def _problems(name: str, value: Any, wanted: Any) -> Iterator[str]:
    """How a value and its parts differ from what is wanted, each part with its dotted name."""
    if isinstance(wanted, dict):
        yield from _problems_of_fields(name, value, wanted)
    elif isinstance(wanted, Listed):
        yield from _problems_of_list(name, value, wanted)
    elif not wanted.holds(value):
        yield f"{name} is {_repr.repr(value)}, wanted {wanted.name}"


def _problems_of_fields(name: str, value: Any, wanted: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{name} is {_repr.repr(value)}, wanted {', '.join(wanted)}"
        return
    inside = f" in {name}" if name else ""
    if missing := [key for key in wanted if key not in value]:
        yield f"{', '.join(missing)} is missing{inside}"
    if unknown := [key for key in value if key not in wanted]:
        yield f"{_repr.repr(unknown)} is unknown{inside}"
    for key in wanted:
        yield from _problems(f"{name}.{key}".lstrip("."), value[key], wanted[key])


def _problems_of_list(name: str, value: Any, wanted: Listed) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{name} is {_repr.repr(value)}, wanted a list"
        return
    if wanted.length is not None and len(value) != wanted.length:
        yield f"{name} has {len(value)} values, wanted {wanted.length}: one an evaluation"
    for i, each in enumerate(value):
        yield from _problems(f"{name}[{i}]", each, wanted.kind)
