"""Write the report of any study: a folder with one page that opens offline."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak.rules import LIVE
from polyak.study import _judging as judging
from polyak.study import _methods as methods
from polyak.study import _page as pages
from polyak.study import _speed as speed
from polyak.study import _study_curves as drawn
from polyak.study import _study_figures as figures
from polyak.study import _study_tables as tables
from polyak.study._after_stop import after_stop
from polyak.study._effects import Effects, identical
from polyak.study._page import (
    Block,
    Bullets,
    Claimed,
    Claims,
    Figure,
    Figures,
    Grid,
    Page,
    Reason,
    Section,
    Text,
)
from polyak.study._region import Region
from polyak.study._result import Result
from polyak.study._schedules import Plateau, described
from polyak.study._statistics import FEWEST_SEEDS, verdict
from polyak.study._study import Arm, Study
from polyak.study._text import Table, between, listed, percent
from polyak.study._weighting import misplaced


@dataclass(frozen=True)
class Report:
    """The summary, the tables by name and the judged claims of a study, and the path of its page."""

    summary: tuple[str, ...]
    tables: dict[str, Table]
    judged: list[judging.Judgement]
    page: Path


def write(result: Result, folder: Path, command: str) -> Report:
    """Write report.html, verdicts.json, tables/ and charts/ of a result into a folder."""
    judged = judging.judge(result)
    page = _page(result, judged, command)
    pages.write_json(folder / "verdicts.json", judging.as_json(judged))
    return Report(page.summary, page.tables(), judged, pages.write(page, folder))


def _page(result: Result, judged: list[judging.Judgement], command: str) -> Page:
    study, effects = result.study, Effects(result)
    first = next(iter(study.schedules))
    about = (
        f"Seeds: {len(result.seeds)}. Schedules: {len(study.schedules)}. Learning rates: {len(study.learning_rates)}. "
        f"Averages: {len(study.arms)}. Steps of a run: {_lengths(result)}."
    )
    sections: dict[str, tuple[str, tuple[Block, ...]]] = {
        "verdicts": ("Verdicts", _verdicts(judged)),
        "effects": ("Gains", (Text(_GAINS), *_figures(figures.forests(effects)), *(Grid(tables.arms(effects, s)) for s in study.schedules), Text(tables.arms_note(effects)))),
        "curves": ("Learning curves", _figures(drawn.curves(effects))),
        "half-life": ("Half-life", _figures(figures.by_half_life(effects))),
        "schedules": ("Schedules", _figures(figures.by_schedule(effects))),
        "geometry": ("Distance to the live weights", _figures(drawn.geometry(effects, first))),
        "after": ("After the stop", _figures(after_stop(effects))),
        "speed": ("Time to the target", _figures(speed.figures(effects))),
        "published": ("Published figures", tuple(map(Grid, tables.published(result)))),
        "metrics": ("All metrics", tuple(Grid(tables.metrics(effects, s)) for s in study.schedules) if len(study.metrics) > 1 else ()),
        "costs": ("Rules, ages and costs", (Grid(tables.costs(effects)),)),
        "seeds": ("Seed by seed", (*_figures(drawn.pairs(effects)), *(Grid(tables.seeds(effects, s)) for s in study.schedules))),
        "caveats": ("Caveats", (Bullets(_caveats(effects)),)),
        "failures": ("Failures", (Grid(tables.failures(result)),) if result.failures else ()),
    }  # fmt: skip
    return Page(
        study.title or study.name,
        about,
        _summary(effects, judged),
        (
            *(Section(name, title, blocks) for name, (title, blocks) in sections.items() if blocks),
            methods.made(command, _conditions(result)),
        ),
    )


_GAINS = (
    "Every average is compared with the live weights of the same run, each at the learning rate that is best for it: the best "
    "mean validation value over the seeds, with the same rates tried for all. Test values are reported; they choose nothing."
)


def _figures(made: tuple[Figure, ...]) -> tuple[Block, ...]:
    return (Figures(made),) if made else ()


def _lengths(result: Result) -> str:
    """The steps of the runs: the fewest and the most, where an early stop makes them differ."""
    ends = sorted({record["steps"][-1] for record in result.records})
    return f"{ends[0]} to {ends[-1]}" if len(ends) > 1 else str(ends[0])


def _verdicts(judged: list[judging.Judgement]) -> tuple[Block, ...]:
    claimed = tuple(
        Claimed(each.sentence, each.verdict, tuple(map(_reason, each.parts)), each.source)
        for each in judged
    )
    return (Text(methods.RULE), Claims(claimed)) if claimed else ()


def _reason(part: judging.Judged) -> Reason:
    return Reason(part.quantity, part.figure, part.wanted, part.verdict)


def _summary(effects: Effects, judged: list[judging.Judgement]) -> tuple[str, ...]:
    """Three sentences: the first schedule, the schedules beside each other, and the claims."""
    schedules = list(effects.study.schedules)
    said = [_best(effects, schedules[0]), _others(effects, schedules[1:]), _counts(judged)]
    return tuple(sentence for sentence in said if sentence)


def _best(effects: Effects, schedule: str) -> str:
    best = effects.best(schedule)
    if best is None:
        return f"Under the schedule {schedule} no arm has a value."
    effect = next(e for e in effects.of(schedule) if e.arm == best)
    wins = between(effect.improvement, lambda v: percent(v, 0))
    said = {"holds": f"{best} gains", "does not hold": f"{best} does not gain", "undecided": f"Whether {best} gains is undecided"}  # fmt: skip
    return (
        f"{said[verdict(effect.gain, Region.above(0))]}: {between(effect.gain, effects.form)} over the live weights under the "
        f"schedule {schedule}, {effects.metric} {between(effects.mean(best, schedule))} against {between(effects.mean(LIVE, schedule))} "
        f"on the test part, better in {wins} of the seeds. {_chosen(effects)}"
    )


def _chosen(effects: Effects) -> str:
    arms = len(effects.arms)
    return f"Validation chose it among {arms} averages." if arms > 1 else "It is the only average."


def _others(effects: Effects, schedules: list[str]) -> str:
    gains = [
        f"{between(effects.gain(arm, s), effects.form)} under {s} ({arm})"
        for s in schedules
        if (arm := effects.best(s))
    ]
    return f"The average that validation chose gains {', '.join(gains)}." if gains else ""


_SAID = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "undecided": ("is undecided", "are undecided"),
}


def _counts(judged: list[judging.Judgement]) -> str:
    counts = Counter(each.verdict for each in judged)
    if not judged:
        return ""
    said = ", ".join(f"{count} {_SAID[v][count > 1]}" for v, count in counts.most_common())
    few = any(part.too_few for each in judged for part in each.parts)
    why = f" Fewer than {FEWEST_SEEDS} seeds decide nothing." if few else ""
    return f"Of {len(judged)} claim{'s' * (len(judged) > 1)}, {said}.{why}"


def _caveats(effects: Effects) -> tuple[str, ...]:
    result, study = effects.result, effects.study
    found = [
        *study.caveats,
        *identical(result),
        *_edges(result),
        *_leading(study),
        *_swept(study),
        *_one_part(result),
    ]
    missing = sum(
        v is None
        for r in result.records
        for arm in r["test"].values()
        for v in arm["last"].values()
    )
    if missing:
        found.append(
            f"{missing} test values are not numbers (NaN or infinite); they are left out of all means."
        )
    if result.failures:
        found.append(f"{len(result.failures)} runs failed and are left out.")
    found.append(
        f"Between seeds {_vary(result)} vary; the intervals say nothing about other tasks, models or budgets."
    )
    if len(study.claims) > 1:
        found.append(
            f"Each verdict has its own 95 % interval; the {len(study.claims)} claims and parts of claims are not corrected for their number. The p-values of the arms are."
        )
    return tuple(found)


def _leading(study: Study) -> list[str]:
    """Sentences about averages that steer the runs in which all are compared."""
    return [
        f"Under {name}, {given.arm} sets the learning rate and the stop of every run, so all arms are compared at a moment that its validation values chose."
        for name, given in study.schedules.items()
        if isinstance(given, Plateau)
    ]


def _swept(study: Study) -> list[str]:
    """Sentences about averages that are read from the means of the weights between evaluations."""
    return [
        f"{name} is swept, not tracked: {percent(misplaced(study, arm))} of its weight lies on other steps than its rule's."
        for name, arm in study.arms.items()
        if isinstance(arm, Arm) and arm.swept
    ]


def _one_part(result: Result) -> list[str]:
    """A sentence for a study whose validation part is its test part too."""
    last = [
        ({metric: values[-1] for metric, values in record["curves"][arm].items()}, record["test"][arm]["last"])
        for record in result.records
        for arm in result.study.arm_names
    ]  # fmt: skip
    if any(validation != test for validation, test in last):
        return []
    return [
        "Validation and test values are the same here: what is chosen by them looks better than it is."
    ]


def _edges(result: Result) -> list[str]:
    """Sentences about best learning rates that are the smallest or the largest of those tried."""
    rates = sorted(result.study.learning_rates)
    said = []
    for schedule in result.study.schedules if len(rates) > 1 else ():
        for end, word in ((rates[0], "smallest"), (rates[-1], "largest")):
            at = [arm for arm in result.study.arm_names if result.tuned(arm, schedule) == end]
            if at:
                said.append(
                    f"Under {schedule}, the best learning rate of {listed(at)} is the {word} one tried, {end:g}; a better one may lie beyond it."
                )
    return said


def _vary(result: Result) -> str:
    return ", ".join(result.records[0]["conditions"]["vary"]) or "nothing"


def _conditions(result: Result) -> dict[str, Any]:
    study = result.study
    return {
        "study": study.name,
        "data": study.source or "not stated",
        "seeds": ", ".join(str(seed.number) for seed in result.seeds),
        "what varies": _vary(result),
        "steps": f"{study.steps} of {study.batch_size} rows, {study.evaluations} evaluations",
        "learning rates": ", ".join(f"{rate:g}" for rate in study.learning_rates),
        "schedules": f"{'; '.join(f'{name}: {described(s)}' for name, s in study.schedules.items())} (numbers: factors of the learning rate, an eighth of a run apart, and their mean)",
        "metrics": "; ".join(f"{n} ({'lower' if m.lower_is_better else 'higher'} is better)" for n, m in study.metrics.items()),
        "conditions": ", ".join(sorted({str(r["fingerprint"]) for r in result.records})),
    }  # fmt: skip
