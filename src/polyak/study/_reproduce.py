"""Compute figures and claims of papers again, each with its source and its tolerance.

A line is data: a sentence, the region in which it is true, and a function that measures it. Exact lines
need milliseconds; those of the averager itself simulate thousands of runs at once; those of studies
train models over seeds, and are judged as every claim of a study is.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from polyak._files import making_folder, writing
from polyak.study._errors import said
from polyak.study._region import Region
from polyak.study._statistics import ClaimVerdict, Interval, around, verdict
from polyak.study._text import Table

Progress = Callable[[int, int, bool], object]
Measured = float | Interval
_CERTAIN = 10**9  # an exact value rests on no sample of seeds


@dataclass(frozen=True)
class Line:
    """A sentence with its source, the region in which it is true, and what measures its quantity.

    `expected` says the figure and its tolerance in words. `measure` returns a number that is exact, or
    simulated well within the tolerance, or an interval over seeds.
    """

    topic: str
    sentence: str
    source: str
    expected: str
    region: Region
    measure: Callable[[], Measured]

    @classmethod
    def figure(
        cls,
        topic: str,
        sentence: str,
        source: str,
        expected: float,
        tolerance: float,
        measure: Callable[[], Measured],
    ) -> Line:
        """A line whose quantity is a published figure, up to a share `tolerance` of it."""
        wanted = f"{expected:g} ± {100 * tolerance:g} %"
        return cls(topic, sentence, source, wanted, around(expected, tolerance), measure)

    @classmethod
    def claim(
        cls, topic: str, sentence: str, source: str, region: Region, measure: Callable[[], Measured]
    ) -> Line:
        """A line whose quantity has a sign or a bound."""
        return cls(topic, sentence, source, str(region), region, measure)


class Outcome(NamedTuple):
    """The measurement of a line. `error` is the text of an exception, with which it does not hold."""

    line: Line
    got: Interval
    verdict: ClaimVerdict
    seconds: float
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; numbers that are not finite are null."""
        names = ("topic", "sentence", "source", "expected")
        described = {name: getattr(self.line, name) for name in names}
        got = {name: v for name, v in self.got.as_dict().items() if name != "seeds"}
        numbers = {"got": got, "verdict": self.verdict, "seconds": round(self.seconds, 3)}
        return described | numbers | ({"error": self.error} if self.error else {})


@dataclass(frozen=True)
class Reproduced:
    """All outcomes, as a table and as files."""

    outcomes: tuple[Outcome, ...]

    @property
    def missed(self) -> tuple[Outcome, ...]:
        """The outcomes that do not hold."""
        return tuple(o for o in self.outcomes if o.verdict == "does not hold")

    def table(self) -> Table:
        """One row a line; an interval stands where seeds differ."""
        rows = tuple(
            (o.line.topic, o.line.sentence, o.line.expected, _got(o), o.verdict, o.line.source)
            for o in self.outcomes
        )
        held, undecided = (
            sum(o.verdict == verdict for o in self.outcomes) for verdict in ("holds", "undecided")
        )
        seconds = math.fsum(o.seconds for o in self.outcomes)
        counts = f"{held} of {len(self.outcomes)} hold, {len(self.missed)} do not, {undecided} are undecided"
        note = f"{counts}; {seconds:.0f} s in all."
        header = ("topic", "what", "expected", "got", "verdict", "source")
        return Table("reproduced", "Published results, reproduced", header, rows, note)

    def markdown(self) -> str:
        """The table, in which an empty topic or source repeats the one above."""
        table, above, rows = self.table(), ("", ""), []
        for topic, *cells, source in table.rows:
            changed = (topic != above[0], source != above[1])
            rows.append((topic * changed[0], *cells, source * any(changed)))
            above = topic, source
        note = f"{table.note} An empty cell repeats the one above it."
        return replace(table, rows=tuple(rows), note=note).markdown()

    def write(self, folder: Path) -> None:
        """Write `reproduced.md` and `reproduced.json`."""
        content = [outcome.as_dict() for outcome in self.outcomes]
        texts = {"md": self.markdown(), "json": json.dumps(content, indent=1) + "\n"}
        with making_folder(folder):
            for kind, text in texts.items():
                with writing(folder / f"reproduced.{kind}") as file:
                    file.write(text.encode())


def reproduce(lines: Sequence[Line], *, progress: Progress = lambda *_: None) -> Reproduced:
    """Measure every line. One that raises does not hold, and the others are measured."""
    outcomes = []
    for line in lines:
        outcomes.append(_outcome(line))
        progress(len(outcomes), len(lines), True)
    return Reproduced(tuple(outcomes))


def _outcome(line: Line) -> Outcome:
    began = time.perf_counter()
    try:
        measured = line.measure()
    except Exception as error:
        nothing = Interval(math.nan, math.nan, math.nan, 0)
        return Outcome(line, nothing, "does not hold", time.perf_counter() - began, said(error))
    if not isinstance(measured, Interval):
        measured = Interval(measured, measured, measured, _CERTAIN)
    return Outcome(line, measured, verdict(measured, line.region), time.perf_counter() - began)


def _got(outcome: Outcome) -> str:
    if outcome.error:
        return outcome.error
    value = f"{outcome.got.estimate:.5g}"
    if outcome.got.seeds == _CERTAIN:
        return value
    low, high = outcome.got.low, outcome.got.high
    return f"{value} [{low:.3g}, {high:.3g}], {outcome.got.seeds} seeds"
