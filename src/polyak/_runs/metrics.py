"""How good each checkpoint of a run is, by the metrics that its trainer wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from polyak._runs import boards
from polyak._runs.clocks import Timed
from polyak._runs.inside import epochs, inside
from polyak._runs.tables import Column, Row, Source, apart, clock_of, records, rows
from polyak.checkpoints._file_names import named

Better = Literal["lower", "higher"]
Table = list[tuple[str, Row]]
"""The split that each row is about, and its numbers."""

_TABLES = (
    "*.csv",
    "*.jsonl",
    "trainer_state.json",
    "log.json",
    "scalars.json",
    "metrics.json",
    "log",
)
_TEXTS = ("log.txt",)  # read only for a metric that no table has: it may repeat or mix them
_WITHIN_RUN = {"checkpoints", "weights", "models", "save", "ckpt"}  # folders in a run's own folder
_SHOWN = 12
_LOWER = re.compile(r"(?<![a-z])(loss|wer|cer|ter|per|mer|eer|ece|ppl|perplexity|error|err|mse|mae|rmse|fid|nll|bpb|bpc)(?![a-z])")  # fmt: skip
_HIGHER = re.compile(r"(?<![a-z])(acc|accuracy|top\d|bleu|rouge[\w ]*|f1|auc|auroc|m?ap\d*|recall|precision|psnr|ssim|reward|m?iou|dice|pesq|stoi|mcc|pearson|spearman)(?![a-z0-9])")  # fmt: skip


def metric(timed: Sequence[Timed], by: str, run: Path) -> tuple[str, list[float | None]]:
    """The full name of a metric, and its value for each checkpoint; None where none was written.

    `by` may use ".", "/", "_" or "-" between words, and may leave out the first ones: "acc" finds
    "loss_dict.acc" if there is no "acc".

    Raises `ValueError` for a metric that no checkpoint has, with those that they have; for a name
    that fits several; for a table that counts epochs from 1 and files that count from 0.
    """
    known: list[Row] = [dict(named(each.entry.named).metrics) for each in timed]
    full: list[Row] = [{} for _ in timed]
    for tables in _tables(timed, run):
        _add(tables, timed, by, (known, full))
    for of_file, each in zip(known, timed, strict=True):
        of_file |= each.numbers | each.scores
    last = _last_tables(timed, run)
    while not _has([*known, *full], by) and (more := next(last, None)) is not None:
        _add(more, timed, by, (known, full))
    names: set[str] = set().union(*known)
    name = _resolved(by, names, set().union(*full))
    return name, [of_file.get(name) for of_file in (known if name in names else full)]


def direction(name: str, better: Better | None) -> Better:
    """Which quality is better: as given, or by a metric's usual name.

    Raises `ValueError` if the name does not say which.
    """
    if better is not None:
        return better
    for words in (name.rpartition(".")[2], name):  # "loss_dict.acc" is an accuracy
        text = _words(words).replace("_", " ")
        lower, higher = bool(_LOWER.search(text)), bool(_HIGHER.search(text))
        if lower != higher:
            return "lower" if lower else "higher"
    raise ValueError(
        f"whether a lower or a higher {name} is better is not known: give better (--better)"
    )


def _add(
    tables: Mapping[str, Table], timed: Sequence[Timed], by: str, to: tuple[list[Row], list[Row]]
) -> None:
    """Add the numbers of tables to the rows of checkpoints, by name and by full name."""
    columns: dict[Source, dict[str, Column]] = {}
    for file, table in tables.items():
        for i, found in enumerate(_joined(file, table, timed, by)):
            for (split, name), number in found.items():
                of_source = columns.setdefault((file, split), {})
                of_source.setdefault(name, [None] * len(timed))[i] = number
    for known, named_columns in zip(to, apart(columns), strict=True):
        for name, column in named_columns.items():
            for of_file, value in zip(known, column, strict=True):
                if value is not None:
                    of_file[name] = value


def _tables(timed: Sequence[Timed], run: Path) -> Iterator[dict[str, Table]]:
    """The tables of each place, the most particular last: above the checkpoints, beside them, and in them."""
    folder, *above = _places(timed, run)
    for place in (*reversed(above), folder):
        yield _of_folder(place, _TABLES)
        for path in sorted(place.glob("*/vis_data/scalars.json")):
            yield from map(_plain, _of_mmengine(rows(path), timed))
    for path in sorted(folder.glob("checkpoint.pth")):  # where espnet keeps its reporter
        yield _plain(epochs(inside(path)))
    yield _plain([row for path in sorted(folder.glob("scores/*.txt")) if (row := _score(path))])
    for each in timed:
        if each.entry.folder is not None:
            yield _plain(rows(each.entry.folder / "trainer_state.json"))


def _last_tables(timed: Sequence[Timed], run: Path) -> Iterator[dict[str, Table]]:
    """The tables that are read only for a metric that is nowhere else, the nearest first."""
    for place in _places(timed, run):
        yield _of_folder(place, _TEXTS)
    yield _plain(_board(timed, run))


def _of_folder(place: Path, patterns: Sequence[str]) -> dict[str, Table]:
    """The tables of a folder by their files' names, without a suffix where that is enough."""
    paths = [path for pattern in patterns for path in sorted(place.glob(pattern))]
    tables = {path: table for path in paths if (table := records(path))}
    stems = [path.stem for path in tables]
    return {
        path.stem if stems.count(path.stem) == 1 else path.name: table
        for path, table in tables.items()
    }


def _plain(table: list[Row]) -> dict[str, Table]:
    return {"": [("", row) for row in table]}


def _places(timed: Sequence[Timed], run: Path) -> list[Path]:
    """The folder of the checkpoints, and those above it that belong to the run."""
    folder = timed[0].entry.named.parent
    above = [each for each in folder.parents if each.is_relative_to(run)]
    if folder == run and folder.name in _WITHIN_RUN:
        above.append(folder.parent)
    return [folder, *above]


def _board(timed: Sequence[Timed], run: Path) -> list[Row]:
    """The rows of TensorBoard's files of events, the nearest ones."""
    stepless = {
        each.clock["epoch"] for each in timed if "epoch" in each.clock and "step" not in each.clock
    }
    return boards.rows(*boards.events(_places(timed, run)), stepless)


def _of_mmengine(table: list[Row], timed: Sequence[Timed]) -> Iterator[list[Row]]:
    """The rows of training in mmengine's table, and those of validation, whose "step" may be an epoch.

    Then it is the epoch of the row of training before it. Without such rows, more checkpoints have it as
    their epoch than as their step. Where neither is clear, the validations are left out.
    """
    before: Row = {}
    votes = dict.fromkeys(("step", "epoch"), 0)
    trained = [row for row in table if "iter" in row]
    validated = [row for row in table if "iter" not in row and "step" in row]
    for row in table:
        if "iter" in row:
            before = row
        elif before:
            votes["epoch" if row.get("step") == before.get("epoch") else "step"] += 1
    steps = {row["step"] for row in validated}
    for each in timed if not before else ():
        for unit in votes:
            votes[unit] += each.clock.get(unit) in steps
    unit, other = sorted(votes, key=lambda each: -votes[each])
    yield trained
    if votes[unit] > votes[other]:
        yield [
            {unit: row["step"], **{k: v for k, v in row.items() if k != "step"}}
            for row in validated
        ]


def _score(path: Path) -> Row:
    """A file with one number, which fairseq2 writes for each step; nothing for another file."""
    try:
        return {
            "score": float(path.read_text(encoding="utf-8")),
            **named(path.with_suffix("")).clock,
        }
    except ValueError:
        return {}


def _joined(
    file: str, table: Table, timed: Sequence[Timed], by: str
) -> list[dict[tuple[str, str], float]]:
    """The numbers of a table for each checkpoint by split and name, by its step, or its epoch if no step fits.

    A step takes the row before too: trainers that count from 0 write their last metrics there.
    """
    for unit in ("step", "epoch"):
        of_count: dict[float, dict[tuple[str, str], float]] = {}
        for split, row in table:
            if (count := clock_of(row).get(unit)) is not None:
                of_count.setdefault(count, {}).update({(split, name): n for name, n in row.items()})
        counts = [_count(each, unit) for each in timed]
        before = {n - 1 for n in counts if n is not None and unit == "step"}
        if of_count.keys() & {*counts, *before}:
            if _has(({f"{file}.{split}.{name}": 0.0 for name in row} for split, row in table), by):
                _require_one_start(unit, of_count, counts)
            last = {n: row for n, row in of_count.items() if n in before.difference(counts)}
            return [{} if n is None else last.get(n - 1, {}) | of_count.get(n, {}) for n in counts]
    return [{}] * len(timed)


def _count(each: Timed, unit: str) -> float | None:
    """The step or epoch of a checkpoint; a bare number in its name may be either."""
    return each.clock.get(
        unit, None if {"step", "epoch"} & set(each.clock) else each.clock.get("number")
    )


def _require_one_start(
    unit: str, of_count: Mapping[float, object], counts: Sequence[float | None]
) -> None:
    """Raises `ValueError` if one of metrics and checkpoints counts from 0, and the other from 1."""
    own = sorted(count for count in counts if count is not None)
    later = min(of_count) == 1 and own[0] == 0 and unit == "epoch"
    # Each epoch has a checkpoint, one more than the last row. Steps lie further apart.
    each = len(own) > 1 and own == [own[-1] - i for i in reversed(range(len(own)))]
    earlier = min(of_count) == 0 < own[0] and own[-1] == max(of_count) + 1 and each
    if later or earlier:
        raise ValueError(
            f"the metrics count from {min(of_count):g} and the checkpoints from {0 if later else 1}, so which "
            "belong together is not known: list the files themselves"
        )


def _has(table: Iterable[Row], by: str) -> bool:
    return any(_words(name).endswith(_words(by)) for row in table for name in row)


def _resolved(by: str, names: set[str], full: set[str]) -> str:
    """The one name that `by` means, or the one full name."""
    words = _words(by)
    for fits in (
        [by] if by in names else [],
        [name for name in names if _words(name) == words],
        [name for name in names if _words(name).endswith(f"_{words}")],
        [name for name in full if _words(name) == words],
        [name for name in full if _words(name).endswith(f"_{words}")],
    ):
        if len(fits) == 1:
            return fits[0]
        if fits:
            raise ValueError(
                f"by is {by!r}, which fits {' and '.join(sorted(fits))}: give one of them"
            )
    near = get_close_matches(by, names, _SHOWN, 0.3) or sorted(names)[:_SHOWN]
    has = f"they have {', '.join(near)}" if near else "no metrics were found beside them"
    raise ValueError(f"by is {by!r}, and the checkpoints have no such metric: {has}")


def _words(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
