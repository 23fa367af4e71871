"""Numbers that trainers write beside checkpoints, as CSV, JSON lines, JSON or YAML.

Numbers are found by dotted names: `{"valid": {"loss": 0.3}}` has "valid.loss". A list of records, such as
transformers' `log_history`, is a table, and each row of it has a step or an epoch.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from itertools import combinations
from pathlib import Path
from typing import Any

Row = dict[str, float]
"""The numbers of one record by name."""

Source = tuple[str, str]
"""A file, as "valid", and a split in it; each is "" where there is none."""

Column = list[float | None]
"""A metric of each checkpoint."""

_MOST_BYTES = 1 << 28
_MOST_SETTINGS = 1 << 22  # of a YAML file: larger ones are no records of metrics
_DEPTH = 4
_STEPS = ("global_step", "global_steps", "step", "steps", "num_updates", "iteration", "iter",
          "batch_idx_train", "consumed_steps")  # fmt: skip
_EPOCHS = ("epoch", "current_epoch", "cur_epoch")
_SPLITS = ("dataset", "split", "subset", "mode", "phase", "stage")  # what a record is about
_DATA = re.compile(r"(?<![a-z])(?<!pre.)(?<!post.)(train(ing)?|val(id(ation)?)?|dev|test|eval(uation)?|held.?out)(?![a-z])", re.I)  # fmt: skip
_OFF = 1e-3  # how far two writings of one number lie apart at most


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
    """The rows of a table of numbers, as `records`."""
    return [row for _, row in records(path)]


def records(path: Path) -> list[tuple[str, Row]]:
    """The split that each row of a table is about, as "valid", or "", and its numbers.

    Empty for a file that is not a table, or that polyak does not read.

    Raises `ModuleNotFoundError` for YAML without the package `yaml`; `OSError` if it cannot be read.
    """
    limit = _MOST_SETTINGS if path.suffix in (".yaml", ".yml") else _MOST_BYTES
    if not path.is_file() or path.stat().st_size > limit:
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
        read = [(_split(record), dict(numbers(record))) for record in _records(path, text)]
    except (ValueError, RecursionError, csv.Error):
        return []  # not a table: many files end in .json or .csv
    return [(split, row) for split, row in read if row]


def apart(columns: Mapping[Source, Mapping[str, Column]]) -> tuple[dict[str, Column], ...]:
    """Columns of one folder by name, and by full name: "valid.loss" is `loss` in valid.csv or of the split.

    One name that several metrics have is called after its file or split.
    """
    of_names: dict[str, dict[Source, Column]] = {}
    for source, row in columns.items():
        for name, column in row.items():
            of_names.setdefault(name, {})[source] = column
    found: dict[str, Column] = {}
    full: dict[str, Column] = {}
    for name, several in of_names.items():
        if all(_one_metric(*two) for two in combinations(several.items(), 2)):
            found[name] = _merged(sorted(several.values(), key=_start))
        else:
            found |= {f"{_called(one, several)}{name}": several[one] for one in several}
        full |= {".".join(filter(None, (*one, name))): several[one] for one in several}
    return found, full


def _merged(columns: Sequence[Column]) -> Column:
    """The last number of each checkpoint."""
    of_files = zip(*columns, strict=True)
    return [next((n for n in reversed(of) if n is not None), None) for of in of_files]


def _one_metric(one: tuple[Source, Column], other: tuple[Source, Column]) -> bool:
    """Whether two columns of one name agree, or the later continues the earlier."""
    both = [two for two in zip(one[1], other[1], strict=True) if None not in two]
    if both:
        resumed = _letters(one[0]) == _letters(other[0]) and _start(one[1]) != _start(other[1])
        return resumed or all(_written_twice(*two) for two in both)
    parts = zip(one[0], other[0], _letters(one[0]), _letters(other[0]), strict=True)
    return all(a == b or not (_DATA.search(x) or _DATA.search(y)) for x, y, a, b in parts)


def _written_twice(one: float | None, other: float | None) -> bool:
    """Whether a number is the other one with fewer digits."""
    if one is None or other is None or not math.isfinite(one) or not math.isfinite(other):
        return repr(one) == repr(other)
    digit = 10.0 ** max(int(Decimal(repr(n)).as_tuple().exponent) for n in (one, other))
    return math.isclose(one, other, rel_tol=_OFF) and abs(one - other) < 0.51 * digit


def _start(column: Column) -> int:
    return next((i for i, number in enumerate(column) if number is not None), len(column))


def _letters(source: Source) -> Source:
    """A file and a split without digits: "log_2.csv" continues "log_1.csv"."""
    file, split = (re.sub(r"[\W\d_]+", "", text.lower()) for text in source)
    return file, split


def _called(source: Source, among: Iterable[Source]) -> str:
    """The file, the split, or both: those in which a source differs from others."""
    parts = [of for of, *others in zip(source, *among, strict=True) if of and {of} != set(others)]
    return "".join(f"{part}." for part in parts)


def _split(record: object) -> str:
    """The data that a record is about, as in `"split": "valid"`; otherwise, its phase or another text."""
    if not isinstance(record, Mapping):
        return ""
    of_keys = {str(key).lower(): text for key, text in record.items() if isinstance(text, str)}
    texts = {key: of_keys[key] for key in _SPLITS if of_keys.get(key)}
    data = [t for key, t in texts.items() if key in ("dataset", "subset") or _DATA.search(t)]
    return re.sub(r"[^\w-]+", "_", "_".join(data or texts.values()))


def _records(path: Path, text: str) -> Iterable[object]:
    if path.suffix == ".csv":
        lines = text.splitlines()
        if not text.endswith(("\n", "\r")):  # the last cell may be cut
            lines[-1:] = [line.rpartition(",")[0] for line in lines[-1:]]
        return [_numeric(row) for row in csv.DictReader(lines, skipinitialspace=True)]
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
    """The columns of a line of CSV that hold numbers, or name the data that they are about."""
    found: dict[str, Any] = {}
    for column, text in row.items():
        name = str(column).strip()
        try:
            found[name] = float(text)
        except (TypeError, ValueError):
            found |= {name: text} if name.lower() in _SPLITS else {}
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
