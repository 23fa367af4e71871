"""How good each checkpoint of a run is, by the metrics that its trainer wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from polyak._runs import boards
from polyak._runs.clocks import Timed
from polyak._runs.inside import epochs, inside
from polyak._runs.tables import Row, apart, clock_of, rows
from polyak.checkpoints._file_names import named

Better = Literal["lower", "higher"]

_TABLES = (
    "*.csv",
    "*.jsonl",
    "trainer_state.json",
    "log.json",
    "scalars.json",
    "metrics.json",
    "log",
    "log.txt",
)
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
    for table in _tables(timed, run):
        for of_file, row in zip(known, _joined(table, timed, by), strict=True):
            of_file |= row
    for of_file, each in zip(known, timed, strict=True):
        of_file |= each.numbers | each.scores
    if not _has(known, by):
        for of_file, row in zip(known, _joined(_board(timed, run), timed, by), strict=True):
            of_file |= row
    name = _resolved(by, {name for of_file in known for name in of_file})
    return name, [of_file.get(name) for of_file in known]


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


def _tables(timed: Sequence[Timed], run: Path) -> Iterator[list[Row]]:
    """The tables of a run, the most particular last: those above its checkpoints, beside them, and in them."""
    folder, *above = _places(timed, run)
    for place in (*reversed(above), folder):
        paths = [path for pattern in _TABLES for path in sorted(place.glob(pattern))]
        yield from apart({path: rows(path) for path in paths})
        for path in sorted(place.glob("*/vis_data/scalars.json")):
            yield from _of_mmengine(rows(path), timed)
    for path in sorted(folder.glob("checkpoint.pth")):  # where espnet keeps its reporter
        yield epochs(inside(path))
    yield [row for path in sorted(folder.glob("scores/*.txt")) if (row := _score(path))]
    for each in timed:
        if each.entry.folder is not None:
            yield rows(each.entry.folder / "trainer_state.json")


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


def _joined(table: Sequence[Row], timed: Sequence[Timed], by: str) -> list[Row]:
    """The numbers of a table for each checkpoint, by its step, or by its epoch if no step fits.

    A step takes the row before too: trainers that count from 0 write their last metrics there.
    """
    for unit in ("step", "epoch"):
        of_count: dict[float, Row] = {}
        for row in table:
            if (count := clock_of(row).get(unit)) is not None:
                of_count.setdefault(count, {}).update(row)
        counts = [_count(each, unit) for each in timed]
        before = {n - 1 for n in counts if n is not None and unit == "step"}
        if of_count.keys() & {*counts, *before}:
            if _has(table, by):
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
    unit: str, of_count: Mapping[float, Row], counts: Sequence[float | None]
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


def _has(table: Sequence[Row], by: str) -> bool:
    return any(_words(name).endswith(_words(by)) for row in table for name in row)


def _resolved(by: str, names: set[str]) -> str:
    """The one name that `by` means."""
    if by in names:
        return by
    words = _words(by)
    for fits in (
        [name for name in names if _words(name) == words],
        [name for name in names if _words(name).endswith(f"_{words}")],
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
