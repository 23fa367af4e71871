"""The report of any study: its figures equal plain computations, and it survives what goes wrong."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert
from scipy import stats

from polyak.rules import Exponential
from polyak.study import (
    Claim,
    Metric,
    Plateau,
    Published,
    Region,
    Result,
    Seed,
    constant,
    cosine,
    difference,
    gain,
    log_ratio,
)
from polyak.study import _figures as charts
from polyak.study import _speed as speed
from polyak.study import _study_curves as drawn
from polyak.study import _study_figures as figures
from polyak.study import _study_tables as tables
from polyak.study._after_stop import after_stop
from polyak.study._effects import Effects, half_lives, identical, nominal_age
from polyak.study._judging import as_json, judge
from polyak.study._report import _best, _caveats, write
from polyak.study._speed import times_to_target
from polyak.study._statistics import Interval
from polyak.study._study import Arm
from polyak.study._text import percent
from quick import first_quick
from study_results import CLAIMS, Truth, loss, result, truth


def constantly(value: float | None) -> Truth:
    return lambda *_: value


@pytest.fixture(scope="module")
def made() -> Result:
    published = (Published("loss of live", lambda s: s.value("live"), 1.0, "a table"),)
    return result(claims=CLAIMS, published=published)


def test_verdicts_are_right_where_the_truth_is_known(made: Result) -> None:
    judgements = judge(made)
    judged = [part for each in judgements for part in each.parts]
    found = [each.verdict for each in judgements]
    assert found == ["holds", "does not hold", "undecided", "holds", "undecided"]
    assert judged[3].interval.low == pytest.approx(0.025 ** (1 / 9))  # exact, of 9 seeds of 9
    assert [each.missing for each in judged] == [0, 0, 0, 0, 9]
    assert judged[0].wanted == "above 0.0 %" and judged[4].figure == "no seed"
    text = json.dumps(as_json(judgements), allow_nan=False)
    assert json.loads(text)[0]["claim"] == "Short is better."


@pytest.mark.parametrize("form", ["number", "share", "ratio", "steps"])
def test_a_region_is_told_as_it_was_given(form: str) -> None:
    zero, percents = {"share": ("0.0 %", "5.0 %"), "ratio": ("0.000", "0.050")}.get(
        form, ("0", "0.05")
    )
    regions = {
        f"above {zero}": Region.above(0),
        f"below {zero}": Region.below(0),
        f"above {percents}": Region.above(0.05),
        f"below {percents}": Region.below(0.05),
        f"from {zero} to {percents}": Region.between(0, 0.05),
    }
    for wanted, region in regions.items():
        (judged,) = judge(result(1, claims=(Claim("s", constantly_zero, region, form=form),)))
        assert judged.parts[0].wanted == wanted


def ahead(factor: float) -> Truth:
    """All averages are the live weights' loss times a factor."""
    return lambda arm, seed, *_: (1 + seed / 100) * (1 if arm == "live" else factor)


@pytest.mark.parametrize(
    ("seeds", "factor", "said"),
    [
        (9, 0.9, "short gains: 10.0 %"),
        (9, 1.1, "short does not gain: −10.0 %"),
        (9, 1.0, "short does not gain: 0.0 %"),
        (7, 0.9, "Whether short gains is undecided: 10.0 %"),
        (1, 0.9, "Whether short gains is undecided: 10.0 %"),
    ],
)
def test_the_first_sentence_says_gain_only_if_the_seeds_decide(
    seeds: int, factor: float, said: str
) -> None:
    found = result(seeds, ahead(factor), arms={"short": "exponential(0.5)"})
    sentence = _best(Effects(found), "constant")
    assert sentence.startswith(said) and sentence.endswith("It is the only average.")


def test_arms_that_are_equal_in_all_seeds_are_no_share_of_seeds() -> None:
    """A gain of 0 in each seed is 0, not 0 of so many seeds."""
    claims = (
        Claim("equal", gain("short"), Region.between(-0.01, 0.01)),
        Claim("never", constantly_zero, Region.between(-0.01, 0.01)),
    )
    equal, never = (each.parts[0] for each in judge(result(9, ahead(1.0), claims=claims)))
    assert equal.verdict == "holds" and equal.figure == "0.0 % [0.0 %, 0.0 %]"
    assert never.interval.high == pytest.approx(1 - 0.025 ** (1 / 9))


def test_the_table_of_arms_has_learning_rates_where_they_can_differ() -> None:
    for rates in ((0.1, 0.3), (0.1,)):
        effects = Effects(result(learning_rates=rates))
        table = tables.arms(effects, "constant")
        assert ("learning rate" in table.header) == (len(rates) > 1)
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_a_forest_tells_its_gains_with_their_unit_and_counts_intervals() -> None:
    effects = Effects(result())
    (figure, _) = figures.forests(effects)
    gains = [effect.gain for effect in effects.of("constant")]
    right, left = sum(g.low > 0 for g in gains), sum(g.high < 0 for g in gains)
    assert right and left
    assert (
        f"Of {len(gains)} intervals, {right} lie right of 0 and {left} left of it." in figure.words
    )
    first = figure.table.rows[0][1]
    assert first == percent(gains[0].estimate) + first[first.index(" [") :] and first.endswith(
        " %]"
    )


def test_a_forest_tells_small_gains_as_exactly_as_it_draws_them() -> None:
    found = result(9, ahead(0.9998), arms={"short": "exponential(0.5)"})
    figure = figures.forests(Effects(found))[0]
    assert figure.table.rows[0][1] == "0.02 % [0.02 %, 0.02 %]"


def test_a_long_title_goes_on_in_the_next_line() -> None:
    title = "cross entropy (nats a character), validation: inverse_sqrt, the best"
    chart = charts.pairs([{"x": 1.0, "y": 2.0}], "live", title)
    shown = html.unescape(vl_convert.vegalite_to_svg(chart.to_dict()))
    assert "…" not in shown and all(word in shown for word in title.split())


def test_curves_tell_which_averages_are_the_live_weights_at_first() -> None:
    sentence = "Before its start an average is the live weights: late_mean."
    effects = Effects(result())
    assert any(sentence in figure.caption for figure in drawn.curves(effects))
    assert sentence in speed.figures(effects)[0].caption
    early = Effects(result(arms={"short": "exponential(0.5)"}))
    assert not any("Before its start" in figure.caption for figure in drawn.curves(early))


def number(seed: Seed) -> float:
    return float(seed.number)


TRUE, FALSE, OPEN = Region.above(0), Region.below(0), Region.above(4)
PARTS = {
    (TRUE,): "holds", (TRUE, TRUE): "holds", (TRUE, OPEN): "undecided", (OPEN, FALSE): "does not hold",
    (TRUE, FALSE): "does not hold", (TRUE, OPEN, FALSE, TRUE): "does not hold",
}  # fmt: skip


@pytest.mark.parametrize(("regions", "verdict"), PARTS.items())
def test_a_sentence_of_several_parts_needs_all_of_them(
    regions: tuple[Region, ...], verdict: str
) -> None:
    """The seeds are 0 to 8: their mean is 4."""
    other = Claim("Another sentence.", number, TRUE)
    claims = (*(Claim("s", number, region) for region in regions), other)
    found = judge(result(claims=claims))
    assert [(each.sentence, each.verdict) for each in found] == [
        ("s", verdict),
        ("Another sentence.", "holds"),
    ]
    assert len(found[0].parts) == len(as_json(found)[0]["parts"]) == len(regions)


def test_a_median_and_a_geometric_mean_over_seeds() -> None:
    def grown(seed: Seed) -> float:
        return 2.0**seed.number

    def log_of(seed: Seed) -> float:
        return math.log(grown(seed))

    claims = (
        Claim("median", grown, TRUE, form="number", statistic="median", what="a power of 2"),
        Claim("factor", log_of, TRUE, form="factor"),
        Claim("percent", log_of, Region.between(0, math.log(3)), form="percent"),
    )
    middle, factor, percent = (each.parts[0] for each in judge(result(claims=claims)))
    assert middle.figure.startswith("16 [") and factor.figure.startswith("16.000 [")
    assert percent.figure.startswith("1500.00 % [") and percent.wanted == "from 0.00 % to 200.00 %"
    assert factor.wanted == "above 1.000"
    assert middle.quantity == "a power of 2, median over 9 seeds"
    assert factor.quantity == "geometric mean over 9 seeds"


@pytest.mark.parametrize(
    ("quantity", "shown"),
    [(gain("long"), "−30.0 %"), (difference("long"), "0.3"), (log_ratio("long"), "30.00 %"), (lambda _: 0.5, "50.0 %")],
    ids=["gain", "difference", "log ratio", "a function"],
)  # fmt: skip
def test_a_claim_prints_its_quantity_in_its_unit(quantity: Any, shown: str) -> None:
    def value(arm: str, *_: Any) -> float:
        return 1.3 if arm == "long" else 1.0

    claims = (Claim("s", quantity, Region.above(0)),)
    (judged,) = judge(result(9, value, claims=claims))
    assert judged.parts[0].figure.split(" [")[0] == shown


def test_an_unknown_form_is_refused() -> None:
    for make in (
        lambda: Claim("s", number, TRUE, form="decimal"),
        lambda: Published("s", number, 1.0, form="decimal"),
    ):
        with pytest.raises(ValueError, match="form is 'decimal', wanted "):
            make()


def caveats(made: Result) -> str:
    return " ".join(_caveats(Effects(made)))


def test_caveats_are_told_where_they_apply(made: Result) -> None:
    said = caveats(made)
    assert "Validation and test values are the same" not in said and "sets the learning" not in said
    one_part = caveats(result(value=lambda a, n, s, r, _: truth(a, n, s, r, "test")))
    assert "Validation and test values are the same" in one_part
    assert "Under plateau, short sets the learning rate and the stop" in caveats(stopped())
    assert caveats(result(caveats=("Mind this.",))).startswith("Mind this.")


ROWS = {  # arm -> (low, high): what the axis shows, and which arms it cuts off
    "none": ({"a": (-1, 2), "b": (-3, 1), "c": (2, 5)}, 5, []),
    "one arm is far": ({"a": (-1, 2), "b": (-2, 1), "c": (-90, -60)}, 8, ["c"]),
    "an interval is long": ({"a": (-1, 2), "b": (-2, 1), "c": (1, 70)}, 8, ["c"]),
    "most are 0": ({"a": (0, 0), "b": (0, 0), "c": (2, 5)}, 5, []),
    "all are 0": ({"a": (0, 0)}, 1, []),
    "infinite": ({"a": (-math.inf, 0), "b": (-1, 1)}, 1, ["a"]),
    "no arm": ({}, 1, []),
}  # fmt: skip


@pytest.mark.parametrize(("ends", "reach", "outside"), ROWS.values(), ids=ROWS)
def test_a_forest_is_not_stretched_by_one_arm(
    ends: dict[str, tuple[float, float]], reach: float, outside: list[str]
) -> None:
    rows = {name: Interval((a + b) / 2, a, b, 9) for name, (a, b) in ends.items()}
    assert charts.reach(rows) == reach
    said = charts.cut_off(rows, "{:g}".format)
    assert [name for name in rows if f" {name} " in said] == outside
    drawn = charts.forest(rows, "gain", "arm").to_dict()["layer"][1]["data"]["values"]
    for row in drawn:
        assert -reach <= row["low"] <= row["middle"] <= row["high"] <= reach
        far = abs(rows[row["name"]].estimate) > reach
        assert (row["kind"] != "circle") == far


def test_the_largest_gain_of_all_schedules_is_drawn() -> None:
    """Where averaging and annealing do the same work, one schedule has nearly all the gain."""

    def value(arm: str, seed: int, schedule: str, *_: Any) -> float:
        gain = 0.5 if schedule == "constant" and arm != "live" else 1.0
        return gain * (1 + seed / 1e4 * (arm == "live"))

    schedules = dict.fromkeys(("constant", "1", "2", "3", "4"), constant)
    (figure,) = figures.by_schedule(Effects(result(value=value, schedules=schedules)))
    points = figure.chart.to_dict()["layer"][1]["data"]["values"]
    assert {point["kind"] for point in points} == {"circle"} and len(points) == 5
    assert max(point["high"] for point in points) == pytest.approx(50, abs=0.1)
    assert "axis ends" not in figure.words


def constantly_zero(_: Seed) -> float:
    return 0.0


def test_effects_are_plain_computations(made: Result) -> None:
    effects = Effects(made)
    live = [truth("live", seed, "constant", 0.1, "test") for seed in range(9)]
    found = {each.arm: each for each in effects.of("constant")}
    pvalues = {}
    for arm in made.study.arms:
        ours = [truth(arm, seed, "constant", 0.1, "test") for seed in range(9)]
        ratios = np.array(ours) / live
        effect = found[arm]
        assert effects.mean(arm, "constant").estimate == pytest.approx(np.mean(ours))
        middle = effects.mean(arm, "constant", "last", "iqm").estimate
        assert middle == pytest.approx(stats.trim_mean(ours, 0.25))
        assert effect.gain.estimate == pytest.approx(1 - stats.gmean(ratios))
        assert effect.improvement.estimate == np.mean(ratios < 1)
        exact = stats.permutation_test(
            (np.log(ratios),), np.mean, permutation_type="samples", vectorized=True, n_resamples=np.inf
        ).pvalue  # fmt: skip
        pvalues[arm] = exact
    most = min(1.0, len(pvalues) * min(pvalues.values()))  # Holm's first step
    assert min(e.p for e in found.values()) == pytest.approx(most, abs=0.02)
    assert all(found[arm].p >= p * 0.5 for arm, p in pvalues.items())


def test_validation_chooses_and_the_test_part_does_not(made: Result) -> None:
    """The test values are better at the other learning rate, and `short` is best on validation."""
    assert {made.tuned(arm, s) for arm in made.study.arm_names for s in made.study.schedules} == {
        0.1
    }
    assert Effects(made).best("constant") in ("short", "half_life_1")


def test_a_metric_of_which_more_is_better_has_the_same_gains(made: Result) -> None:
    """accuracy = 1 / loss here, so that each log ratio changes its sign."""
    assert Effects(made).ranked("constant") == Effects(made, "accuracy").ranked("constant")
    losses, scores = Effects(made).of("constant"), Effects(made, "accuracy").of("constant")
    for a, b in zip(losses, scores, strict=True):
        assert -math.log1p(-a.gain.estimate) == pytest.approx(math.log1p(b.gain.estimate))
        assert a.improvement == b.improvement and a.p == b.p


def test_values_below_zero_are_compared_by_difference() -> None:
    def score(*place: Any) -> float:
        return truth(*place) - 1.0

    effects = Effects(result(value=score))
    pairs = effects.pairs("long", "constant")
    found = effects.gain("long", "constant").estimate
    assert not effects.is_share and found == pytest.approx(np.mean(pairs[1]) - np.mean(pairs[0]))
    assert [each.needed for each in effects.of("constant")] == [None] * 5


def test_an_average_that_lost_seeds_is_not_chosen_for_the_others() -> None:
    """`late_mean` is by far the best in the one seed in which it has a value."""

    def value(arm: str, seed: int, *place: Any) -> float | None:
        if arm != "late_mean":
            return truth(arm, seed, *place)
        return 0.1 if seed == 0 else None

    for metric in ("loss", "accuracy"):
        assert Effects(result(value=value), metric).ranked("constant")[-1] == "late_mean"


@pytest.mark.parametrize("negative", [1, 9])
@pytest.mark.parametrize(("ours", "theirs"), [(-0.2, -0.1), (0.1, -0.1), (-0.1, 0.1)])
def test_a_gain_is_no_share_of_a_negative_value(ours: float, theirs: float, negative: int) -> None:
    """A loss that falls from -0.1 to -0.2 has not grown by 100 %, nor fallen; the report says what to claim."""
    made, (judged,) = judged_below_zero(ours, theirs, negative)
    assert math.isnan(log_ratio("short")(made.seeds[0]))
    assert judged.verdict == ("undecided" if negative == 9 else "holds")
    assert without_a_gain(negative) in judged.parts[0].quantity


@pytest.mark.parametrize("negative", first_quick([1, 9]))
def test_the_page_says_what_to_claim_of_a_negative_value(negative: int, tmp_path: Path) -> None:
    made, _ = judged_below_zero(-0.2, -0.1, negative)
    page = write(made, tmp_path, "command").page
    assert without_a_gain(negative) in page.read_text(encoding="utf-8")


def without_a_gain(seeds: int) -> str:
    return f"{seeds} more without a value (there is no gain if a value is negative: then claim a d"


def judged_below_zero(ours: float, theirs: float, negative: int) -> tuple[Result, Any]:
    """A study with values below zero in some of 9 seeds, and what is said of its claim."""
    values = {"short": ours, "live": theirs}

    def value(arm: str, seed: int, *_: Any) -> float:
        return values.get(arm, 1.0) if seed < negative else 1.0

    claims = (Claim("s", gain("short"), Region.above(-1)),)
    fewer: dict[str, Any] = {
        "arms": {"short": "exponential(0.5)"},
        "schedules": {"constant": constant},
    }
    made = result(9, value, claims=claims, **fewer)
    return made, judge(made)


def test_one_average_under_two_names_is_pointed_out(made: Result) -> None:
    sentences = identical(made)
    assert sentences == [
        "short and half_life_1 are one average: their rules give every step the same weight."
    ]
    arms = {
        "a": "window(1)",
        "b": Arm(Exponential(0.5), recalibrate=True),
        "c": "exponential(0.5)",
    }
    found = identical(result(value=constantly(1.0), arms=arms))
    assert found[0].startswith("live and a are one average")
    assert found[1] == "live, a, b and c have equal values in every run."


def test_ages_and_half_lives() -> None:
    arms = {"ema": Arm(Exponential(0.9), every=2), "all": "uniform()", "window": "window(5)"}
    made = result(arms=arms)
    lives = half_lives(made)
    assert lives["all"] * 40 == pytest.approx(20, abs=1) and 0 < lives["window"] * 40 < 3
    ages = {name: nominal_age(arm.rule, arm.every) for name, arm in made.study.arms.items()}
    assert ages == {
        "ema": pytest.approx(2 * 0.81 / 0.19),
        "all": math.inf,
        "window": pytest.approx(2),
    }


def test_the_target_is_the_live_weights_last_value(made: Result) -> None:
    effects = Effects(made)
    last = [s.value("live", part="validation") for s in made.seeds]
    times = times_to_target(effects, "live", "constant")
    assert [math.isfinite(t) for t in times] == [v <= np.median(last) for v in last]
    assert set(times_to_target(effects, "long", "constant")) == {math.inf}
    assert set(times_to_target(effects, "short", "constant")) <= {40.0, math.inf}


@pytest.fixture(scope="module")
def page(made: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(made, tmp_path_factory.mktemp("any"), "polyak study run made").page


def test_too_few_seeds_are_the_reason_of_a_verdict() -> None:
    few, enough = (judge(result(seeds, claims=CLAIMS[:1]))[0] for seeds in (7, 8))
    assert few.verdict == "undecided" and few.parts[0].quantity == (
        "mean over 7 seeds, too few for a verdict"
    )
    assert enough.verdict == "holds" and enough.parts[0].quantity == "mean over 8 seeds"


@pytest.mark.slow
def test_the_page_has_every_section(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<section id="([\w-]+)"', text)
    assert found == [
        "verdicts", "effects", "curves", "half-life", "schedules", "geometry", "speed", "published",
        "metrics", "costs", "seeds", "caveats", "made",
    ]  # fmt: skip
    for claim in CLAIMS:
        assert claim.sentence in text
    for wanted in ("polyak study run made", "made up", "torch 2.", "init, order vary", "a table"):
        assert wanted in text
    assert (
        "over the live weights under the schedule constant, loss" in text
        and "Of 5 claims, 2 hold, 2 are undecided, 1 does not hold." in text
    )


@pytest.mark.slow
def test_charts_and_tables_lie_beside_the_page(page: Path) -> None:
    names = {path.stem for path in (page.parent / "charts").glob("*.svg")}
    assert names == {path.stem for path in (page.parent / "charts").glob("*.png")}
    assert {
        "gains_constant",
        "curves_cosine",
        "one_loss",
        "one_accuracy",
        "pairs_cosine",
        "half_life_constant",
        "by_schedule",
        "speed",
    } <= names
    arms = (page.parent / "tables" / "arms_constant.md").read_text(encoding="utf-8")
    assert "| late_mean |" in arms and "| never [" in arms
    assert "| loss of live | 1 |" in (page.parent / "tables" / "published_1.md").read_text()
    assert len(json.loads((page.parent / "verdicts.json").read_text())) == len(CLAIMS)


BAD: dict[str, dict[str, Any]] = {
    "one seed": {"seeds": 1},
    "two seeds, two schedules": {"seeds": 2, "schedules": {"constant": constant, "cosine": cosine}},
    "one learning rate, one arm": {"learning_rates": (0.1,), "arms": {"a": "uniform()"}},
    "no arm": {"arms": {}},
    "an arm without a number": {"value": lambda arm, *rest: None if arm == "long" else truth(arm, *rest)},
    "live without a number": {"value": lambda arm, *rest: None if arm == "live" else truth(arm, *rest)},
    "no number at all": {"value": constantly(None)},
    "all equal": {"value": constantly(1.0)},
    "all zero": {"value": constantly(0.0), "metrics": {"loss": Metric(loss)}},
    "huge and tiny": {"value": lambda *place: 1e300 if place[0] == "live" else 1e-300},
    "HTML in names": {"title": "<b>&", "arms": {"<i>a</i>": "uniform()", '"x"': "window(2)"}},
    "odd names of schedules": {"schedules": {"1/sqrt √": constant, "../a|b": cosine}},
}  # fmt: skip


def stopped(seeds: int = 9) -> Result:
    """Runs that stop after 2 to 4 evaluations and go on for two, with a loss 10 % higher each time."""
    made = result(seeds, schedules={"plateau": Plateau("short", after=2)})
    for record in made.records:
        last = 2 + record["seed"] % 3
        after = {"steps": [0, 0], "curves": {}}
        for arm, curves in record["curves"].items():
            for metric, values in curves.items():
                del values[last:]
                if arm in ("live", "short"):
                    grown = [values[-1] * 1.1, values[-1] * 1.21]
                    after["curves"].setdefault(arm, {})[metric] = grown  # type: ignore[attr-defined]
        for name in ("steps", "train_loss", "rates"):
            record[name] = record[name][:last]
        for name in ("distance", "cosine"):
            record[name] = {arm: values[:last] for arm, values in record[name].items()}
        for values in record["test"].values():
            values["selected"]["step"] = record["steps"][-1]
        record["after_stop"] = after
        record["stopped_early"] = True
    return made


def test_what_came_after_the_stop_is_shown_and_not_used() -> None:
    made = stopped()
    (figure,) = after_stop(Effects(made))
    assert figure.table.header == ("evaluations from the stop", "live", "short")
    shown = {row[0]: row[1].split()[0] for row in figure.table.rows}
    assert (shown["0"], shown["1"], shown["2"]) == ("1", "1.1", "1.21") and "−1" in shown
    assert half_lives(made)["late_mean"] == pytest.approx(10 / 2 / 30, abs=0.05)
    assert Effects(made).of("plateau") == Effects(stopped()).of("plateau")


@pytest.mark.parametrize("seeds", [1, 2, 3, 4, 5])
def test_the_effective_age_is_the_median_over_the_runs(seeds: int) -> None:
    """The EMA of decay .9 begins as a copy of the first weights: its age is the sum of .9^k, k = 1, ..., steps - 1."""
    made = stopped(seeds)
    table = tables.costs(Effects(made))
    found = {row[0]: row[table.header.index("effective mean age, steps")] for row in table.rows}
    ages = [sum(0.9**k for k in range(1, record["steps"][-1])) for record in made.records]
    assert found["long"] == f"{np.median(ages):.4g}"
    assert found["ensemble"] == found["live"] == "—"


@pytest.mark.slow
def test_a_report_of_runs_that_stop_early_is_written(tmp_path: Path) -> None:
    text = write(stopped(), tmp_path, "command").page.read_text(encoding="utf-8")
    assert 'id="after"' in text and "went on after their stop" in text


@pytest.mark.slow
@pytest.mark.parametrize("fields", BAD.values(), ids=BAD)
def test_a_report_of_a_poor_result_is_written(fields: dict[str, Any], tmp_path: Path) -> None:
    given: dict[str, Any] = {"seeds": 3, "schedules": {"constant": constant}}
    made = result(**given | fields)
    failed = {"seed": 3, "schedule": "constant", "learning_rate": 0.1, "failed": "ValueError: <x>"}
    page = write(Result(made.study, made.records, [failed]), tmp_path, "command").page
    text = page.read_text(encoding="utf-8")
    assert {path.parent.name for path in tmp_path.rglob("*.svg")} == {"charts"}
    assert all(chart.stat().st_size > 500 for chart in (tmp_path / "charts").iterdir())
    assert "<x>" not in text and "&lt;x&gt;" in text and "<i>a</i>" not in text
    assert not re.search(r">[^<]*\b(nan|inf)\b[^<]*<", text[: text.index("<script>")])
