"""The noisy quadratic model, against brute force, matrices of (live, slots), closed forms, simulation."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from polyak import Averager
from polyak.rules import LIVE, START, Rule
from polyak.specs import as_rule
from polyak.theory import learning_rates, profile, quadratic_moments
from rule_examples import RULE_EXAMPLES

Array = npt.NDArray[np.float64]
RULES = [str(rule) for examples in RULE_EXAMPLES.values() for rule in examples]
SCHEDULES = ["constant", "inverse_sqrt", "cosine", "linear", "wsd"]
STEPS = 40


def rates_of(schedule: str, steps: int = STEPS, peak: float = 0.7) -> Array:
    return peak * learning_rates(schedule, steps, warmup=0.1)


def by_brute_force(c: Array, rates: Array, h: float) -> tuple[float, float]:
    """The same two numbers from the whole matrix: row i is w_i in the start and in all noises."""
    rows = np.zeros((len(rates), len(rates) + 1))
    now = np.eye(len(rates) + 1)[0]
    for i, rate in enumerate(rates):
        now = (1 - rate * h) * now
        now[i + 1] += rate
        rows[i] = now
    average = c @ rows
    return float(average[0]), float(average[1:] @ average[1:])


def by_matrices(rule: Rule, rates: Array, h: float) -> tuple[float, float]:
    """The covariance of (live, slots) step by step, from the rule's fractions and readout."""
    slots = list(rule.slots)
    start, noise = np.zeros(1 + len(slots)), np.zeros((1 + len(slots),) * 2)
    start[0], tick = 1.0, START
    for rate in rates:
        tick = rule.tick(tick, 1.0)
        move = np.eye(1 + len(slots))
        move[0, 0] = 1 - rate * h
        step = np.eye(1 + len(slots))
        for slot, fraction in rule.fractions(tick).items():
            k = 1 + slots.index(slot)
            step[k, 0], step[k, k] = fraction, 1 - fraction
        start, noise = move @ start, move @ noise @ move.T
        noise[0, 0] += rate**2
        start, noise = step @ start, step @ noise @ step.T
    out = np.zeros(1 + len(slots))
    for slot, c in rule.readout(tick).items():
        out[0 if slot == LIVE else 1 + slots.index(slot)] += c
    return float(out @ start), float(out @ noise @ out)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", RULES)
def test_moments_are_those_of_the_whole_matrix_and_of_live_and_slots(
    rule: str, schedule: str
) -> None:
    c, rates = profile(rule, STEPS), rates_of(schedule)
    found = quadratic_moments([c], [rates], [1.0, 0.05])
    for i, h in enumerate((1.0, 0.05)):
        got = float(found.start[0, 0, i]), float(found.noise[0, 0, i])
        assert got == pytest.approx(by_brute_force(c, rates, h), rel=1e-10, abs=1e-13)
        assert got == pytest.approx(by_matrices(as_rule(rule), rates, h), rel=1e-9, abs=1e-12)


def test_a_group_of_averages_schedules_and_directions_is_each_alone() -> None:
    c = np.stack([profile(rule, STEPS) for rule in ("uniform()", "exponential(0.9)")])
    rates, h = np.stack([rates_of(each) for each in SCHEDULES]), np.array([1.0, 0.3, 0.01])
    found = quadratic_moments(c, rates, h)
    assert found.start.shape == found.noise.shape == (2, 5, 3)
    for i, j, k in np.ndindex(2, 5, 3):
        alone = quadratic_moments(c[i : i + 1], rates[j : j + 1], h[k : k + 1])
        assert found.start[i, j, k] == pytest.approx(alone.start.item(), rel=1e-13)
        assert found.noise[i, j, k] == pytest.approx(alone.noise.item(), rel=1e-13)
    losses = found.loss(h, 2 * h, start=3.0)
    assert losses[1, 2] == pytest.approx(
        sum(h[k] * (3 * found.start[1, 2, k] ** 2 + 2 * h[k] * found.noise[1, 2, k]) / 2 for k in range(3))
    )  # fmt: skip


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("step", [0.02, 0.5])
def test_at_a_constant_rate_they_tend_to_the_stationary_closed_forms(
    decay: float, step: float
) -> None:
    """Live step / (2 - step); its EMA (1 - b)(1 + b rho) / ((1 + b)(1 - b rho)) of that."""
    steps, rho = round(25 / (1 - decay) + 25 / step), 1 - step
    c = [np.eye(1, steps, steps - 1)[0], profile(f"exponential({decay})", steps)]
    live, ema = quadratic_moments(c, [[step] * steps], [1.0]).noise[:, 0, 0]
    ratio = (1 - decay) * (1 + decay * rho) / ((1 + decay) * (1 - decay * rho))
    assert live == pytest.approx(step / (2 - step), rel=1e-9)
    assert ema == pytest.approx(live * ratio, rel=1e-9)


def test_the_mean_of_a_run_has_polyak_and_juditskys_variance() -> None:
    """V / T * ((1 + rho) / (1 - rho) - 2 rho (1 - rho^T) / (T (1 - rho)^2)) of a stationary start."""
    steps, step = 3000, 0.1
    rho, v = 1 - step, step / (2 - step)
    found = quadratic_moments([profile("uniform()", steps)], [[step] * steps], [1.0])
    second = float((found.start**2 * v + found.noise).item())
    inner = (1 + rho) / (1 - rho) - 2 * rho * (1 - rho**steps) / (steps * (1 - rho) ** 2)
    assert second == pytest.approx(v / steps * inner, rel=1e-10)
    assert second == pytest.approx(1 / steps, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_simulation_by_the_averager_itself_agrees(schedule: str) -> None:
    """20 000 runs at once, each an element of the weights; 5 % is five standard errors of a variance."""
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(20_000, generator=generator, dtype=torch.float64)}
    rules = {"ema": "exponential(0.9)", "bema": "bema()", "window": "window(20)"}
    averager = Averager(weights, rules)
    rates = rates_of(schedule, 100, peak=0.3)
    for rate in rates:
        noise = torch.randn(20_000, generator=generator, dtype=torch.float64)
        weights["w"].sub_(rate * (0.5 * weights["w"] + noise))
        averager.update()
    c = np.stack([profile(rule, 100) for rule in rules.values()])
    found = quadratic_moments(c, [rates], [0.5])
    wanted = (found.start**2 + found.noise).ravel()
    got = [float(averager.average(name)["w"].square().mean()) for name in rules]
    np.testing.assert_allclose(got, wanted, rtol=0.05)


def test_schedules_have_their_ends_and_their_middles() -> None:
    middle = {
        "constant": 1.0,
        "inverse_sqrt": 0.25,
        "cosine": 0.5,
        "linear": 0.5,
        "wsd": 1.0,
    }
    for name, wanted in middle.items():
        assert learning_rates(name, 1000)[499] == pytest.approx(wanted, abs=1e-12)
    assert [learning_rates(name, 10)[-1] for name in ("cosine", "linear", "wsd")] == [0, 0, 0]
    assert learning_rates("wsd", 1000, final=0.2)[[800, 949, 999]] == pytest.approx(
        [0.2 + 0.8 * (1 - math.sqrt(x)) for x in (0.005, 0.75, 1)]
    )
    warm = learning_rates("linear", 1000, warmup=0.1)
    assert warm[49] == pytest.approx(0.5 * 0.95) and warm[99] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"schedule": "step"}, "schedule is 'step', wanted one of constant"),
        ({"steps": 0}, "steps is 0"),
        ({"final": 0.1}, "final of constant is 0.1, wanted 0: only cosine, linear, wsd"),
        ({"warmup": 2}, "warmup is 2"),
        ({"warmup": math.nan}, "warmup is nan"),
    ],
)
def test_a_wrong_schedule_is_refused(arguments: dict[str, object], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted.replace("(", r"\(")):
        learning_rates(**{"schedule": "constant", "steps": 10, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (([1.0], [[0.1]], [1.0]), "shape of profiles is"),
        (([[1.0]], [[0.1, 0.1]], [1.0]), "steps of rates is 2, wanted 1"),
        (([[1.0]], [[0.1]], []), "shape of curvatures is"),
        (([[1.0]], [[math.inf]], [1.0]), "rates is"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(given: tuple[object, ...], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        quadratic_moments(*given)  # type: ignore[arg-type]
