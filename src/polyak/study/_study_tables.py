"""Tables of any study: arms, costs and ages, published figures, seeds one by one, and what failed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from polyak import theory
from polyak.rules import LIVE
from polyak.study._claims import Published
from polyak.study._conditions import described_arm
from polyak.study._effects import Effects, half_lives, nominal_age
from polyak.study._judging import interval, over_seeds
from polyak.study._result import Result
from polyak.study._speed import scores, times_to_target
from polyak.study._statistics import bootstrap
from polyak.study._study import Arm
from polyak.study._text import FORMS, Table, between, file_name, number, percent, significant
from polyak.study._weighting import profile_of, rule_of


def arms(effects: Effects, schedule: str) -> Table:
    """Every arm under a schedule against the live weights, at the last step and at the selected one."""
    header = (
        "arm", "gain over live", f"{effects.metric}, test", "gain, each at its best step", "probability of improvement",
        "effect size", "p (Holm)", "seeds for a 5 % effect", *("learning rate",) * _several(effects),
        "step of live's last value", "interquartile mean",
    )  # fmt: skip
    live = (LIVE, "—", between(effects.mean(LIVE, schedule)), *5 * ("—",), *_ends(effects, LIVE, schedule))  # fmt: skip
    rows = [
        (
            e.arm,
            between(e.gain, effects.form),
            between(effects.mean(e.arm, schedule)),
            between(effects.gain(e.arm, schedule, "selected"), effects.form),
            between(e.improvement, lambda v: percent(v, 0)),
            between(e.size, lambda v: number(v, 2)),
            significant(e.p, 2),
            "—" if e.needed is None else str(e.needed),
            *_ends(effects, e.arm, schedule),
        )
        for e in effects.of(schedule)
    ]
    return Table(f"arms_{file_name(schedule)}", f"All arms: {schedule}", header, (live, *rows))


def arms_note(effects: Effects) -> str:
    """Explain the columns of `arms`."""
    gain = (
        "geometric mean of ratios, as a share"
        if effects.is_share
        else f"difference in {effects.metric}"
    )
    return (
        f"Test values at the last step, mean over seeds [95 % interval], each arm at the learning rate that is best for it on "
        f"validation. Gain: {gain}; positive is better. The best step of each arm is that of its best validation value. "
        "Probability of improvement: share of seeds in which the arm is better, ties by half. Effect size: mean / standard "
        "deviation of the paired gains, with the interval of normal gains. p: random signs of the gains, corrected over the arms of this table. Seeds for a 5 % "
        "effect: a paired t-test finds it with 80 % probability. The step of live's last value is the median evaluated step at which an "
        "arm is as good on validation as the live weights at the end; never counts as infinite. Interquartile mean: of the test values of the middle half of the seeds."
    )


def _several(effects: Effects) -> bool:
    """Whether arms can differ in their learning rate."""
    return len(effects.study.learning_rates) > 1


def _ends(effects: Effects, arm: str, schedule: str) -> tuple[str, ...]:
    """The learning rate if there are several, the time to the target and the interquartile mean of an arm."""
    time = bootstrap(times_to_target(effects, arm, schedule), "median")
    rate = (f"{effects.result.tuned(arm, schedule):g}",) * _several(effects)
    iqm = effects.mean(arm, schedule, "last", "iqm")
    return *rate, between(time, lambda v: significant(v, 6)), between(iqm)


def metrics(effects: Effects, schedule: str) -> Table:
    """Every metric of every arm under a schedule; the learning rate and the step are those of the main one."""
    names = list(effects.study.metrics)
    others = [Effects(effects.result, name) for name in names]
    rows = tuple(
        (arm, *(between(each.mean(arm, schedule)) for each in others))
        for arm in effects.study.arm_names
    )
    header = (
        "arm",
        *(
            f"{name}, {'lower' if e.lower else 'higher'} is better"
            for name, e in zip(names, others, strict=True)
        ),
    )
    return Table(
        f"metrics_{file_name(schedule)}",
        f"All metrics on test: {schedule}",
        header,
        rows,
        "Mean over seeds [95 % interval], at the last step.",
    )


def costs(effects: Effects) -> Table:
    """The rule of every arm, its ages, its memory, and its score in time to the target."""
    result, study = effects.result, effects.study
    lives, area = half_lives(result), scores(effects)
    record = result.records[0]
    rows = [
        (
            arm,
            described_arm(study.arms[arm]) if arm in study.arms else "—",
            "—" if arm not in lives else f"{100 * lives[arm]:.3g} %",
            _nominal(study.arms.get(arm)),
            _effective(result, study.arms.get(arm)),
            significant(record["bytes"].get(arm, 0) / 1024, 3),
            str(record["forward_passes"].get(arm, 1)),
            number(area[arm], 2),
        )
        for arm in study.arm_names
    ]
    header = (
        "arm",
        "rule",
        "half-life, % of the run",
        "nominal mean age, steps",
        "effective mean age, steps",
        "KiB",
        "forward passes",
        "speed score",
    )
    return Table("costs", "Rules, ages and costs", header, tuple(rows), _seconds(result))


def _nominal(arm: Any) -> str:
    if not isinstance(arm, Arm):
        return "—"
    age = nominal_age(arm.rule, arm.every)
    return "grows with the run" if math.isinf(age) else significant(age)


def _effective(result: Result, arm: Any) -> str:
    if not isinstance(arm, Arm):
        return "—"
    ends, rule = sorted(r["steps"][-1] for r in result.records), rule_of(arm, result.study.steps)
    middle = ends[(len(ends) - 1) // 2], ends[len(ends) // 2]
    profiles = [profile_of(rule, steps, arm.every) for steps in middle]
    ages = [theory.mean_age(profile) for profile in profiles if profile is not None]
    return significant(math.fsum(ages) / len(ages)) if ages else "—"


def _seconds(result: Result) -> str:
    train, average = (
        float(np.median([r["seconds"][name] for r in result.records]))
        for name in ("train", "average")
    )
    return (
        "Nominal mean age: where the average settles in a run without an end; effective: at the end of these runs. Speed "
        "score: the area under the performance profile, 1 for the arm that reaches the target first in every run. "
        f"A training step takes {significant(1e6 * train)} µs and the update of all {len(result.study.arms)} arms "
        f"{significant(1e6 * average)} µs ({percent(average / train, 0)}), medians over the runs."
    )


def seeds(effects: Effects, schedule: str) -> Table:
    """The test value of every arm, seed by seed."""
    names = effects.study.arm_names
    values = [effects.values(arm, schedule) for arm in names]
    rows = tuple(
        (str(seed.number), *(significant(column[i]) for column in values))
        for i, seed in enumerate(effects.result.seeds)
    )
    title = f"{effects.metric} on test, seed by seed: {schedule}"
    return Table(f"seeds_{file_name(schedule)}", title, ("seed", *names), rows, sortable=True)


def published(result: Result) -> list[Table]:
    """Figures that others published about one run, beside ours over seeds: a table for each source."""
    sources: dict[str, list[tuple[str, ...]]] = {}
    for each in result.study.published:
        sources.setdefault(each.source, []).append(_published(result, each))
    return [
        Table(
            f"published_{number}",
            f"Published figures beside ours{f': {source}' if source else ''}",
            ("figure", "published", "ours, mean [95 % interval]", "seeds", "seeds below the published figure"),
            tuple(rows),
            "The share of our seeds below a published figure places its run among ours.",
        )
        for number, (source, rows) in enumerate(sources.items(), 1)
    ]  # fmt: skip


def _published(result: Result, figure: Published) -> tuple[str, ...]:
    values = over_seeds(f"the published figure {figure.what!r}", figure.quantity, result.seeds)
    form = FORMS[figure.form]
    below = interval([float(value < figure.figure) for value in values])
    return (
        figure.what,
        form(figure.figure),
        between(interval(values, quantity=figure.quantity), form),
        str(len(values)),
        between(below, lambda v: percent(v, 0)),
    )


def failures(result: Result) -> Table:
    """The runs that failed, with their errors."""
    rows = tuple(
        (str(f["seed"]), f["schedule"], f"{f['learning_rate']:g}", f["failed"])
        for f in result.failures
    )
    return Table(
        "failures", "Runs that failed", ("seed", "schedule", "learning rate", "error"), rows
    )
