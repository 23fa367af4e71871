"""Advice: its numbers from whole matrices, its signs as the papers have them, its words, its command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from polyak.charts import advice_chart
from polyak.cli import app
from polyak.rules import Exponential
from polyak.theory import (
    CONVENTIONS,
    Advice,
    advise,
    equivalents,
    learning_rates,
    profile,
    quadratic_moments,
)
from polyak.theory import _advice as model

STEPS = 2000


@pytest.fixture(scope="module")
def advices() -> dict[str, Advice]:
    schedules = ("constant", "inverse_sqrt", "cosine", "linear", "wsd")
    return {name: advise(STEPS, schedule=name) for name in schedules}


def loss_by_matrices(c: np.ndarray, rates: np.ndarray, batch: float) -> float:
    """The loss of the average c @ weights; the weights are rows in the start and the noises."""
    h = model._CURVATURES
    total = 0.0
    for curvature, count in zip(h, model._multiplicities(h), strict=True):
        rows, now = np.zeros((len(rates), len(rates) + 1)), np.eye(len(rates) + 1)[0]
        for i, rate in enumerate(rates):
            now = (1 - rate * curvature) * now
            now[i + 1] += rate
            rows[i] = now
        squares = (c @ rows) ** 2
        total += count * curvature * (squares[0] + squares[1:].sum() * curvature / batch) / 2
    return float(total)


def test_a_gain_is_that_of_the_losses_of_whole_matrices() -> None:
    steps, batch = 100, 10.0
    advice = advise(steps, schedule="cosine", batch=batch)
    factors = learning_rates("cosine", steps, warmup=0.01)
    live, average = np.eye(1, steps, steps - 1)[0], profile(advice.retuned, steps)
    losses = [loss_by_matrices(live, peak * factors, batch) for peak in model._PEAKS]
    base = int(np.argmin(losses))
    gain = advice.of(advice.retuned)[0]
    same = loss_by_matrices(average, model._PEAKS[base] * factors, batch)
    own = loss_by_matrices(average, gain.rate * model._PEAKS[base] * factors, batch)
    assert gain.same == pytest.approx(1 - same / losses[base], rel=1e-6)
    assert gain.own == pytest.approx(1 - own / losses[base], rel=1e-6)
    assert gain.own >= gain.same and gain.rate <= 4


def test_sixty_curvatures_stand_for_the_three_hundred_of_1_over_i() -> None:
    h, counts = model._CURVATURES, model._multiplicities(model._CURVATURES)
    assert counts.sum() == pytest.approx(300) and (counts > 0).all()
    every = 1 / np.arange(1, 301)
    rates = [0.3 * learning_rates("cosine", 1000), 0.1 * learning_rates("constant", 1000)]
    c = [profile("exponential(0)", 1000), profile("exponential(half_life=100)", 1000)]
    for batch in (1, 100):
        few = quadratic_moments(c, rates, h).loss(h * counts, h / batch)
        all_ = quadratic_moments(c, rates, every).loss(every, every / batch)
        np.testing.assert_allclose(few, all_, rtol=0.03)


SIGNS = {"constant": True, "inverse_sqrt": True, "cosine": False}


@pytest.mark.parametrize("schedule", SIGNS)
def test_averaging_gains_unless_the_schedule_anneals(
    schedule: str, advices: dict[str, Advice]
) -> None:
    assert advices[schedule].worth == SIGNS[schedule]
    none = advices[schedule].verdict.startswith("none: your schedule anneals")
    assert none != SIGNS[schedule]


def test_the_more_a_schedule_anneals_the_less_averaging_gains(advices: dict[str, Advice]) -> None:
    """And an average wants a higher learning rate than the live weights at a constant one."""

    def least(name: str) -> float:
        return min(gain.same for gain in advices[name].of(advices[name].rule))

    assert least("constant") > least("linear") > least("cosine")
    raised = [gain.rate for gain in advices["constant"].of(advices["constant"].retuned)]
    assert min(raised) > 1.5 and max(raised) <= 4


def test_a_final_learning_rate_above_0_makes_averaging_worth_it() -> None:
    assert advise(STEPS, schedule="cosine", final=0.3, batch=10).worth


@pytest.mark.slow
def test_the_recommended_half_life_is_a_share_of_the_run_and_is_what_it_says() -> None:
    short, long = (advise(steps, schedule="constant", batch=10) for steps in (20_000, 2_000_000))
    assert isinstance(long.rule, Exponential) and isinstance(short.rule, Exponential)
    assert long.rule.half_life == 100 * (short.rule.half_life or 0)
    assert long.modelled == 20_000 and "modelled with 20000 steps" in str(long)
    assert short.half_life == pytest.approx(short.rule.half_life, rel=1e-6)
    assert [g.same for g in short.gains] == [g.same for g in long.gains]


def test_adamws_own_half_life() -> None:
    """With constant updates u, w <- (1 - lr wd) w + lr u has half of its way to go after so many steps."""
    lr, decay = 1e-2, 0.1
    found = advise(STEPS, schedule="cosine", batch=1, lr=lr, weight_decay=decay)
    w, goal, steps = 0.0, 1 / decay, 0
    while w < goal / 2:
        w, steps = (1 - lr * decay) * w + lr, steps + 1
    life = found.optimizer_half_life
    assert life is not None and math.ceil(life) == steps
    assert f"half-life {life:.6g} steps" in str(found)


def test_it_prints_gains_ranges_papers_and_limits(advices: dict[str, Advice]) -> None:
    text = str(advices["cosine"])
    assert "2000 steps, cosine to 0; batch of the model: 1, 10, 100" in text
    assert "arXiv 2502.06761" in text and "no drift of the optimum" in text
    assert "arXiv 1803.05407" not in text and "arXiv 1803.05407" in str(advices["constant"])
    assert all(row[0] in text for row in advices["cosine"].rows())
    found = json.loads(json.dumps(advices["cosine"].as_dict(), allow_nan=False))
    assert found["rule"] == str(advices["cosine"].rule) and found["worth"] is False
    assert found["equivalents"] == equivalents(found["rule"])
    assert len(found["gains"]) == 3 * 23


def test_its_chart_has_both_learning_rates_and_a_line_for_each_noise(
    advices: dict[str, Advice],
) -> None:
    chart = advice_chart(advices["wsd"]).to_dict()
    titles = [panel["layer"][0]["title"] for panel in chart["hconcat"]]
    assert titles == ["At the same learning rate", "At its own learning rate"]
    assert advices["wsd"].chart().to_dict()["title"] == chart["title"]
    assert "batch 100" in json.dumps(chart)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_its_chart_shows_the_gains_in_full_and_no_loss_larger_than_the_largest_gain(
    advices: dict[str, Advice], schedule: str
) -> None:
    """A line that leaves the chart is cut off, and does not follow its edge as if it were a value."""
    for panel in advice_chart(advices[schedule]).to_dict()["hconcat"]:
        drawn = panel["layer"][0]
        most = max(
            max(g.same, g.own) for g in advices[schedule].gains if "exponential" in str(g.rule)
        )
        low, high = (drawn["encoding"]["y"]["scale"][end] for end in ("domainMin", "domainMax"))
        assert -most <= low <= 0 < most < high < 1.2 * most
        assert drawn["mark"]["clip"] and "clamp" not in drawn["encoding"]["y"]["scale"]
        assert drawn["encoding"]["strokeDash"].get("legend", {}) is not None


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"steps": 99}, "steps is 99"),
        ({"schedule": "step"}, "schedule is 'step', wanted one of constant"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": math.nan}, "batch is nan"),
        ({"final": -1}, "final is -1"),
        ({"schedule": "constant", "final": 0.5}, "final of constant is 0.5"),
        ({"lr": 1e-3}, "(lr, weight_decay) is (0.001, None), wanted both or neither"),
        ({"lr": 1e-3, "weight_decay": 0}, "weight_decay is 0"),
        ({"lr": 2, "weight_decay": 1}, "lr * weight_decay is 2"),
        (
            {"lr": 1e-200, "weight_decay": 1e-200},
            "lr * weight_decay is 0.0, wanted a number above 0",
        ),
    ],
)
def test_what_cannot_be_advised_on_is_refused(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError) as caught:
        advise(**{"steps": 100, "schedule": "cosine", "batch": 1, **options})
    assert wanted in str(caught.value)


def test_the_command_prints_the_advice_and_the_peers_calls_of_an_average_that_is_worth_it() -> None:
    for schedule, worth in (("constant", True), ("cosine", False)):
        options = ["--steps", "400", "--schedule", schedule, "--batch", "10"]
        done = CliRunner().invoke(app, ["advise", *options])
        advice = advise(400, schedule=schedule, batch=10)
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith(str(advice)) and advice.worth == worth
        calls = equivalents(advice.rule)
        assert calls and all((call in done.stdout) == worth for call in calls.values())
        used = [how for library, how in CONVENTIONS.items() if library in calls]
        assert used and all((how in done.stdout) == worth for how in used)
    found = CliRunner().invoke(app, ["advise", *options, "--json"])
    assert json.loads(found.stdout) == json.loads(json.dumps(advice.as_dict()))


def test_a_wrong_schedule_is_one_line_of_the_command() -> None:
    done = CliRunner().invoke(app, ["advise", "--steps", "400", "--schedule", "cosinus"])
    assert done.exit_code == 2 and not done.stdout
    assert done.stderr == (
        "polyak: schedule is 'cosinus', wanted one of constant, inverse_sqrt, cosine, linear, wsd\n"
    )


PAGE = Path(__file__).parent.parent / "docs/how-to-choose.md"
ROWS = [
    ("constant", 0),
    ("inverse_sqrt", 0),
    ("cosine", 0.1),
    ("wsd", 0),
    ("linear", 0),
    ("cosine", 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "final"), ROWS)
def test_the_page_has_the_figures_of_the_command(schedule: str, final: float) -> None:
    advice = advise(20_000, schedule=schedule, final=final)
    same, own = (advice.of(rule) for rule in (advice.rule, advice.retuned))
    lives = [f"{100 * gains[0].half_life / 20_000:g} %" for gains in (same, own)]
    first, second = (f"{lives[0]} of the run", lives[1]) if advice.worth else ("none", "none")
    gains = [model._percents([g.same for g in same]), model._percents([g.own for g in own])]
    row = f"| {advice.schedule} | {first} | {gains[0]} | {second} | {gains[1]} | x {model._times(own)} |"
    assert row in PAGE.read_text()
