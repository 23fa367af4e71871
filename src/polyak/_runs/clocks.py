"""The step of each checkpoint of a run, by which they are ordered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from polyak._runs.finding import OF_RUN, Entry
from polyak._runs.inside import inside, scalars, scores
from polyak._runs.tables import Row, clock_of, rows
from polyak.checkpoints._file_names import SUFFIX, named

_NUMBER = re.compile(r"\d+")
_BARE = re.compile(r"(?<!\d)(?<![a-z]{2})\d+", re.IGNORECASE)  # of ppl23 the word says what it is
_DECIMAL = re.compile(r"(?<![\d.])\d+\.\d+(?![\d.])")
_VALUE = re.compile(r"[-+_.=]*\d+(\.\d+)?(e[-+]?\d+|[kmb](?![a-z]))?", re.IGNORECASE)
_UNITS = ("step", "epoch", "time", "number")
_RECORDS = ("*.yaml", "*.yml", "trainer_state.json", "metrics.json", "meta.json")


@dataclass
class Timed:
    """A checkpoint, its clock (unit -> count), and the numbers that lie in it and beside it.

    `scores` are those that Lightning's `ModelCheckpoint` gave it; they are exact, unlike names.
    """

    entry: Entry
    clock: Row
    numbers: Row = field(default_factory=dict)
    scores: Row = field(default_factory=dict)


class Ordered(NamedTuple):
    """Checkpoints in the order of a unit: "step", "epoch", "time" or "number"; what was left out."""

    unit: str
    timed: list[Timed]
    aside: dict[Path, str]


def read(entries: Sequence[Entry]) -> list[Timed]:
    """The clocks and numbers of checkpoints, from their files, the records beside them, and their names."""
    timed, remembered = [], dict[str, Row]()
    for entry in entries:
        numbers = inside(entry.weights)
        for monitor, name, score in scores(numbers):
            remembered.setdefault(name, {})[monitor] = score
        own = scalars(numbers) | _beside(entry)
        timed.append(Timed(entry, clock_of(own) | named(entry.named).clock, own))
    for each in timed:
        each.scores = remembered.get(each.entry.named.name, {})
    return timed


def by_name(entries: Sequence[Entry]) -> list[Timed] | None:
    """The clocks in the names; None unless each name has a step of its own."""
    clocks = [named(entry.named).clock for entry in entries]
    steps = {clock.get("step") for clock in clocks}
    if None in steps or len(steps) < len(entries):
        return None
    return [Timed(entry, clock) for entry, clock in zip(entries, clocks, strict=True)]


def ordered(timed: Sequence[Timed], run: Path, *, given: bool, best: bool) -> Ordered:
    """Checkpoints in the order of their steps; averages beside others, and copies, are left out.

    The unit is the first that all have, with no two alike. A copy, such as `last.ckpt`, is a link, or
    one whose name has no count, with the count of another. They may be of several runs where
    they were `given`, or the `best` of them are wanted.

    Raises `ValueError` for checkpoints whose order is not known, or if two have one count.
    """
    aside: dict[Path, str] = {}
    series = []
    beside = not all(named(each.entry.named).averages for each in timed)
    for each in timed:
        about, path = named(each.entry.named), each.entry.named
        if about.averages and beside:
            aside[path] = "its name says that it is an average"
        elif about.numbered and not about.repeats and not _links(path, timed):
            series.append(each)
    copies = [each for each in timed if each not in series and each.entry.named not in aside]
    if not series:
        series, copies = copies, []
    unit, numberless = _unit(series, run, given, best)
    aside |= dict.fromkeys(numberless, "neither its name nor its content has a step")
    series = [each for each in series if each.entry.named not in aside]
    for each in copies:
        if each.clock.get(unit) in {None, *(other.clock[unit] for other in series)}:
            aside[each.entry.named] = "it repeats another, or its step is not known"
        else:
            series.append(each)
    return Ordered(unit, sorted(series, key=lambda each: each.clock[unit]), aside)


def _unit(series: Sequence[Timed], run: Path, given: bool, best: bool) -> tuple[str, list[Path]]:
    """The unit that orders checkpoints, and those without any clock."""
    clocked = [each for each in series if each.clock]
    twice: Row = {}
    for unit in _UNITS:
        things = unit == "number" and _several_things(series, best)
        if not twice and (things or (not given and not best and _several_runs(clocked, unit))):
            raise ValueError(
                f"{run}: the numbers in its names may count several things, or several runs: list only the "
                f"files to average, the oldest first{_of_one_kind(clocked)}"
            )
        counts = [each.clock[unit] for each in clocked if unit in each.clock]
        if counts and len(set(counts)) == len(counts) == len(clocked):
            return unit, [each.entry.named for each in series if not each.clock]
        if counts and len(counts) == len(clocked):
            twice |= {unit: next(count for count in counts if counts.count(count) > 1)}
    if not twice:
        some = ", ".join(str(each.entry.named) for each in (clocked or series)[:4])
        raise ValueError(
            f"{run}: the order of its checkpoints is not known, since they have no common count, a "
            f"step or an epoch ({some}): list only the files to average, the oldest first{_of_one_kind(series)}"
        )
    unit, count = next(iter(twice.items()))
    both = [str(each.entry.named) for each in clocked if each.clock[unit] == count]
    raise ValueError(
        f"{run}: {' and '.join(both)} are both of {unit} {count:g}: list only the files "
        f"to average{_of_one_kind(series)}"
    )


def _several_things(series: Sequence[Timed], best: bool) -> bool:
    """Whether bare numbers in names may count several things: there are several kinds of names, or decimals beside.

    Those beside the count, such as a date beside a time, may not descend while it ascends, unless the best are wanted.
    """
    names = _names(series, "number")
    kinds = {_VALUE.sub("*", rest) for _, rest, _ in names}
    decimals = any(not each.clock and named(each.entry.named).numbered for each in series)
    texts = [_DECIMAL.sub(" ", rest) for _, rest, _ in names]
    beside = [[int(digits) for digits in _BARE.findall(text)] for text in texts]
    descend = not best and beside != sorted(beside)
    return 1 < len(kinds) < len(names) or (decimals and bool(names)) or descend


def _several_runs(series: Sequence[Timed], unit: str) -> bool:
    """Whether names are those of several runs, whose counts lie among each other.

    A name with words added, such as step_200_best beside step_100, is of the same kind.
    """
    names = _names(series, unit)
    words = [_VALUE.sub("*", rest) for _, rest, _ in names]
    kinds = [min(filter(kind.startswith, words), key=len) for kind in words]
    repeated = _alternate(kinds) and min(map(kinds.count, kinds)) > 1
    runs = ["".join(OF_RUN.findall(name)) for *_, name in names]
    alone = len({count for count, *_ in names}) == len(series)
    return alone and (repeated or _alternate(runs))


def _names(series: Sequence[Timed], unit: str) -> list[tuple[float, str, str]]:
    """The names that have a count: the count, by which they are ordered, what `named` leaves, and the name."""
    paths = [(named(each.entry.named), each.entry.named.name) for each in series]
    return sorted(
        (about.clock[unit], about.rest, name) for about, name in paths if unit in about.clock
    )


def _alternate(kinds: Sequence[str]) -> bool:
    """Whether several kinds lie among each other."""
    return sum(one != other for one, other in pairwise(kinds)) >= len(set(kinds)) > 1


def _of_one_kind(series: Sequence[Timed]) -> str:
    """Advice for names of several kinds, as icefall's `epoch-3.pt` and `checkpoint-4000.pt`."""
    paths = (each.entry.named for each in series)
    kinds = dict.fromkeys(str(path.with_name(_NUMBER.sub("*", path.name))) for path in paths)
    return (
        f", or those of one kind ({', '.join([*kinds][:4])})"
        if 1 < len(kinds) < len(series)
        else ""
    )


def _links(path: Path, timed: Sequence[Timed]) -> bool:
    """Whether a path is a link to another checkpoint of the run."""
    others = {each.entry.named for each in timed if each.entry.named != path}
    return path.is_symlink() and path.resolve() in {other.resolve() for other in others}


def _beside(entry: Entry) -> Row:
    """The numbers in the records of a checkpoint: in its folder, or in a file of its own name."""
    if entry.folder is None:
        stem = SUFFIX.sub("", entry.named.name)
        places = [entry.named.with_name(f"{stem}{suffix}") for suffix in (".yaml", ".yml", ".json")]
    else:
        places = [path for pattern in _RECORDS for path in sorted(entry.folder.glob(pattern))]
    found: Row = {}
    for path in places:
        for row in _records(path):
            found |= row
    return found


def _records(path: Path) -> list[Row]:
    """The record in a file. Of transformers' state only the clock: its metrics are a table of the run."""
    found = rows(path)
    if path.name == "trainer_state.json":
        return [clock_of(found[-1])] if found else []
    return found[-1:]
