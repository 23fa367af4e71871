"""Feedback, against published and closed forms, and a simulation by the averager and a plain loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from polyak.theory import feedback

STEPS = (0.02, 0.1, 0.9, 1.7)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("step", STEPS)
def test_without_a_pull_they_are_sgd_and_its_ema(step: float, decay: float) -> None:
    rho, live = 1 - step, step / (2 - step)
    ema = live * (1 - decay) * (1 + decay * rho) / ((1 + decay) * (1 - decay * rho))
    found = feedback(step, decay, pull=0)
    assert found.live == pytest.approx(live, rel=1e-9)
    assert found.average == pytest.approx(ema, rel=1e-9)
    assert found.covariance == pytest.approx(live * (1 - decay) / (1 - decay * rho), rel=1e-9)
    assert found.time == pytest.approx(-1 / math.log(max(abs(rho), decay)), rel=1e-9)


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (6, 0.8), (1, 0.3)])
@pytest.mark.parametrize("step", STEPS)
def test_lookahead_is_its_proposition_2(step: float, k: int, alpha: float) -> None:
    rho = 1 - step
    top = alpha**2 * (1 - rho ** (2 * k))
    ratio = top / (top + 2 * alpha * (1 - alpha) * (1 - rho**k))
    found = feedback(step, (1 - alpha) ** (1 / k), pull=1, every=k, update_every=k)
    assert found.average == pytest.approx(ratio * step / (2 - step), rel=1e-9)
    assert found.live == pytest.approx(found.average, rel=1e-9)


@pytest.mark.parametrize(
    ("pull", "variance"), [(0, 0.004588), (0.02, 0.003883), (0.1, 0.002405), (0.3, 0.001232)]
)
def test_pace_is_its_lyapunov_system(pull: float, variance: float) -> None:
    assert feedback(0.1, 0.99, pull=pull, with_step=True).average == pytest.approx(
        variance, abs=5e-7
    )


def test_a_pull_all_the_way_at_every_step_is_sgd_at_a_smaller_rate() -> None:
    """live = average: both move by (1 - decay) of each step."""
    found, slow = feedback(0.5, 0.9, pull=1), feedback(0.5 * 0.1, 0, pull=0)
    assert found.live == found.average == pytest.approx(slow.live, rel=1e-9)
    assert found.time == pytest.approx(slow.time, rel=1e-9)


CASES: dict[str, dict[str, Any]] = {
    "weak pull": {"step": 0.2, "decay": 0.95, "pull": 0.1},
    "switch": {"step": 0.1, "decay": 0.9, "pull": 1.0, "every": 10},
    "with the step": {"step": 0.2, "decay": 0.9, "pull": 0.2, "with_step": True},
    "seldom with the step": {"step": 0.3, "decay": 0.9, "pull": 0.5, "with_step": True, "every": 4},
    "both seldom": {"step": 0.2, "decay": 0.97, "pull": 0.5, "every": 6, "update_every": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_plain_simulation_agrees(case: str) -> None:
    """50 000 runs at once; 4 % is more than six standard errors of a variance."""
    options = {"every": 1, "update_every": 1, "with_step": False, **CASES[case]}
    step, decay, pull = options["step"], options["decay"], options["pull"]
    random = np.random.default_rng(0)
    live = average = np.zeros(50_000)
    for done in range(1, 241):
        pulled = pull * (average - live)
        live = live - step * (live + random.normal(size=live.size))
        if options["with_step"] and done % options["every"] == 1 % options["every"]:
            live = live + pulled
        if done % options["update_every"] == 0:
            average = average + (1 - decay ** options["update_every"]) * (live - average)
        if not options["with_step"] and done % options["every"] == 0:
            live = live + pull * (average - live)
    found = feedback(**options)
    np.testing.assert_allclose(live.var(), found.live, rtol=0.04)
    np.testing.assert_allclose(average.var(), found.average, rtol=0.04)
    np.testing.assert_allclose((live * average).mean(), found.covariance, rtol=0.06)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"step": 2.0}, "step is 2.0"),
        ({"step": 0}, "step is 0"),
        ({"decay": 1}, "the growth in one period is 1.0"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"pull": -0.1}, "pull is -0.1"),
        ({"every": 5, "update_every": 2}, "every is 5, wanted a multiple of update_every, 2"),
        ({"step": 1.9, "pull": 0.9, "with_step": True}, "the growth in one period is"),
    ],
)
def test_what_has_no_stationary_state_is_refused(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        feedback(**{"step": 0.1, "decay": 0.9, "pull": 0.1, **options})
