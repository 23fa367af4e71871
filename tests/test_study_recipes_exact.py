"""The noisy quadratic and the river valley: what the study measures is what the closed forms say.

A mean over seeds must lie within five of its standard errors of the exact expectation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest

from polyak.rules import Exponential
from polyak.study import Arm, Result, Study, constant, cosine, run
from polyak.study.recipes import noisy_quadratic, river_valley
from polyak.theory import profile, quadratic_moments

STEPS, SEEDS = 120, 24
RULES = {"fast": Exponential(0.8), "slow": Exponential(0.97)}
SCHEDULES = {"constant": constant, "cosine": cosine}


def measured(study: Study, rate: float, folder: Path) -> Result:
    arms = {name: Arm(rule) for name, rule in RULES.items()}
    cut = replace(study, steps=STEPS, evaluations=4, arms=arms, claims=(), schedules=SCHEDULES)
    return run(replace(cut, learning_rates=(rate,)), folder, seeds=SEEDS, jobs=1)


def rates(schedule: Callable[[float], float], rate: float) -> list[float]:
    return [rate * schedule(step / STEPS) for step in range(STEPS)]


def profiles() -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The coefficients of the live weights and of each average."""
    return np.stack([np.eye(STEPS)[-1], *(profile(rule, STEPS) for rule in RULES.values())])


def check(result: Result, schedule: str, expected: dict[str, float]) -> None:
    for arm, wanted in expected.items():
        values = [seed.value(arm, schedule=schedule) for seed in result.seeds]
        assert len(values) == SEEDS
        error = stdev(values) / math.sqrt(SEEDS)
        assert abs(fmean(values) - wanted) < 5 * error, f"{schedule}, {arm}"
        assert error < 0.2 * wanted  # else the law says nothing


@pytest.mark.slow
def test_the_quadratics_excess_loss_is_its_exact_expectation(tmp_path: Path) -> None:
    result = measured(noisy_quadratic.study, 0.4, tmp_path)
    curvatures = noisy_quadratic.CURVATURES.double().numpy()
    for name, schedule in SCHEDULES.items():
        moments = quadratic_moments(profiles(), [rates(schedule, 0.4)], curvatures)
        losses = moments.loss(curvatures, curvatures / noisy_quadratic.BATCH)[:, 0]
        check(result, name, dict(zip(("live", *RULES), losses.tolist(), strict=True)))


@pytest.mark.slow
def test_the_valleys_excess_loss_is_river_plus_hillside(tmp_path: Path) -> None:
    result = measured(river_valley.study, 0.3, tmp_path)
    for name, schedule in SCHEDULES.items():
        used, x = rates(schedule, 0.3), [0.0]
        for rate in used:
            x.append(x[-1] + rate * math.exp(-x[-1]))
        river = np.exp(-(profiles() @ np.array(x[1:])))
        hill = quadratic_moments(profiles(), [used], [1.0]).loss([1.0], river_valley.NOISE**2)
        expected = dict(zip(("live", *RULES), (river + hill[:, 0]).tolist(), strict=True))
        check(result, name, expected)


def test_the_hillside_of_a_long_run_is_the_stationary_variance() -> None:
    rate, decay = 0.3, 0.97
    kept, variance = 1 - rate, river_valley.NOISE**2
    live = rate * variance / (2 * (2 - rate))
    share = (1 - decay) * (1 + decay * kept) / ((1 + decay) * (1 - decay * kept))
    long = np.stack([np.eye(800)[-1], profile(Exponential(decay), 800)])
    exact = quadratic_moments(long, [[rate] * 800], [1.0]).loss([1.0], variance)[:, 0]
    assert exact.tolist() == pytest.approx([live, live * share], rel=1e-6)


def test_the_river_falls_like_one_over_the_distance_travelled() -> None:
    x, rate = 0.0, 0.1
    for _ in range(20_000):
        x += rate * math.exp(-x)
    assert math.exp(-x) == pytest.approx(1 / (1 + rate * 20_000), rel=0.01)
