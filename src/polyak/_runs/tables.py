"""Numbers that trainers write beside checkpoints, as CSV, JSON lines, JSON or YAML.

Numbers are found by dotted names: `{"valid": {"loss": 0.3}}` has "valid.loss". A list of records, such as
transformers' `log_history`, is a table, and each row of it has a step or an epoch.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
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
_SPLITS = ("split", "mode", "phase", "stage", "subset")  # keys of the data that a record is about


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
        text = path.read_text(encoding="utf-8-sig")
        return [row for record in _records(path, text) if (row := _row(record))]
    except (ValueError, RecursionError, csv.Error):
        return []  # not a table: many files end in .json or .csv


def apart(tables: Mapping[Path, list[Row]]) -> list[list[Row]]:
    """Tables of one folder; a number that differs between two of them is called after its file: "valid.loss"."""
    first: dict[tuple[str, float, str], float] = {}
    differ: set[str] = set()
    several = sum(map(bool, tables.values())) > 1
    for table in tables.values() if several else ():
        last = {
            (unit, count, name): number
            for row in table
            for unit, count in [*clock_of(row).items()][:1]
            for name, number in row.items()
        }
        differ |= {key[2] for key, n in last.items() if repr(first.setdefault(key, n)) != repr(n)}
    return [
        [{f"{path.stem}.{n}" if n in differ else n: v for n, v in row.items()} for row in table]
        for path, table in tables.items()
    ]


def _row(record: object) -> Row:
    """The numbers of a record; if it says of which data, as in `"split": "valid"`, behind that: "valid.loss"."""
    texts = [record.get(key) for key in _SPLITS] if isinstance(record, Mapping) else []
    split = next((text for text in texts if isinstance(text, str)), None)
    return dict(numbers(record if split is None else {split: record}))


def _records(path: Path, text: str) -> Iterable[object]:
    if path.suffix == ".csv":
        return [_numeric(row) for row in csv.DictReader(text.splitlines(), skipinitialspace=True)]
    if path.suffix in (".yaml", ".yml"):
        content = _yaml(text)
    else:
        try:
            content = json.loads(text)
        except ValueError:  # one record a line, whatever the file's suffix
            lines = [line for line in text.splitlines() if line.strip()]
            content = [json.loads(line) for line in lines[:-1]]
            with suppress(ValueError):  # the last one may be cut
                content += [json.loads(line) for line in lines[-1:]]
    table = content.get("log_history", content) if isinstance(content, dict) else content
    return table if isinstance(table, list) else [content]


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:  # such as a tag that names a class
        return None


def _numeric(row: Mapping[str | None, Any]) -> dict[str, Any]:
    """The columns of a line of CSV that hold numbers, or say of which data they are."""
    found: dict[str, Any] = {}
    for column, text in row.items():
        name = str(column).strip()
        try:
            found[name] = float(text)
        except (TypeError, ValueError):
            found |= {name: text} if name in _SPLITS else {}
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
