"""Numbers that trainers write beside checkpoints, as CSV, JSON lines, JSON or YAML.

Numbers are found by dotted names: `{"valid": {"loss": 0.3}}` has "valid.loss". A list of records, such as
transformers' `log_history`, is a table, and each row of it has a step or an epoch.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, float]
"""The numbers of one record by name."""

_MOST_BYTES = 1 << 28
_MOST_SETTINGS = 1 << 22  # of a YAML file: larger ones are no records of metrics
_DEPTH = 4
_STEPS = ("global_step", "global_steps", "step", "steps", "num_updates", "iteration", "iter",
          "batch_idx_train", "consumed_steps")  # fmt: skip
_EPOCHS = ("epoch", "current_epoch", "cur_epoch")


def numbers(value: object, prefix: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings by dotted name, the outer ones first; of a list, the last item's."""
    if isinstance(value, list):
        value = value[-1] if value else None
    if not isinstance(value, Mapping) or depth == 0:
        return
    items = [(f"{prefix}{key}", item) for key, item in value.items() if isinstance(key, (str, int))]
    yield from ((name, float(item)) for name, item in items if _is_number(item))
    for name, item in items:
        yield from numbers(item, f"{name}.", depth - 1)


def clock_of(row: Mapping[str, float]) -> Row:
    """The step, the epoch and the time (`unixtime`) in named numbers, the outermost of each."""
    found: Row = {}
    for unit, keys in (("step", _STEPS), ("epoch", _EPOCHS), ("time", ("unixtime",))):
        names = sorted(
            (len(parts), keys.index(parts[-1]), name)
            for name in row
            if (parts := re.split(r"[./]", name.lower().strip()))[-1] in keys and len(parts) < 3
        )
        if names:
            found[unit] = row[names[0][2]]
    return found


def rows(path: Path) -> list[Row]:
    """The rows of a table of numbers; none for a file that is not one, or that is not read here.

    Raises `ModuleNotFoundError` for YAML without the package `yaml`; `OSError` if it cannot be read.
    """
    limit = _MOST_SETTINGS if path.suffix in (".yaml", ".yml") else _MOST_BYTES
    if not path.is_file() or path.stat().st_size > limit:
        return []
    try:
        text = path.read_text(encoding="utf-8")
        return [row for record in _records(path, text) if (row := dict(numbers(record)))]
    except (ValueError, RecursionError, csv.Error):
        return []  # not a table: many files end in .json or .csv


def _records(path: Path, text: str) -> Iterable[object]:
    if path.suffix == ".csv":
        return [_numeric(row) for row in csv.DictReader(text.splitlines(), skipinitialspace=True)]
    if path.suffix in (".yaml", ".yml"):
        content = _yaml(text)
    else:
        try:
            content = json.loads(text)
        except ValueError:  # one record a line, whatever the file's suffix
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
    table = content.get("log_history", content) if isinstance(content, dict) else content
    return table if isinstance(table, list) else [content]


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:  # such as a tag that names a class
        return None


def _numeric(row: Mapping[str | None, Any]) -> Row:
    """The columns of a line of CSV that hold numbers."""
    found = {}
    for column, text in row.items():
        try:
            found[str(column).strip()] = float(text)
        except (TypeError, ValueError):
            continue
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
