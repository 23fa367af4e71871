"""Each rule against a plain formula of its average, written out here: no rule is on both sides.

`PLAIN` holds, for every rule and every schedule, a function of the live values and of the times
after each update. A new rule or schedule joins by one line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch

from polyak import EMA, Averager
from polyak.decays import SCHEDULES
from polyak.rules import RULES
from polyak.theory import coefficients
from quick import first_quick

Values = Sequence[float]
Plain = Callable[[Values, Values], float]


def ema(decay: Callable[[float, float], float]) -> Plain:
    """`average <- d average + (1 - d) live`, d of the time after the update and of its length."""

    def average(live: Values, times: Values) -> float:
        held = live[0]
        for i in range(1, len(live)):
            d = decay(times[i], times[i] - times[i - 1])
            held = d * held + (1 - d) * live[i]
        return held

    return average


def scheduled(decay: Callable[[float], float]) -> Plain:
    """An EMA whose decay per unit of time is read at the time after the update."""
    return ema(lambda t, dt: decay(t) ** dt)


def debiased(decay: float) -> Plain:
    """Adam's: a zero start, divided by what it has received so far."""

    def average(live: Values, times: Values) -> float:
        held, before = 0.0, 0.0
        for x, t in zip(live, times, strict=True):
            d = decay ** (t - before)
            held, before = d * held + (1 - d) * x, t
        return held / (1 - math.pow(decay, times[-1]))

    return average


def power(gamma: float) -> Plain:
    """The integral of s^gamma over each update's stretch of time, as a share of the whole."""

    def average(live: Values, times: Values) -> float:
        ends = [0.0, *times]
        shares = [b ** (gamma + 1) - a ** (gamma + 1) for a, b in pairwise(ends)]
        return float(np.dot(shares, live) / times[-1] ** (gamma + 1))

    return average


def relative_std(gamma: float) -> float:
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def mean(live: Values, _: Values) -> float:
    return sum(live) / len(live)


def newest(size: int) -> Plain:
    return lambda live, times: mean(live[-size:], times[-size:])


def bema(kappa: float, eta: float, gamma: float, rho: float) -> Plain:
    """Block and Zhang: the anchor is the first live value, s the time since it was taken."""

    def average(live: Values, times: Values) -> float:
        held, alpha = live[0], 0.0
        for x, t in zip(live[1:], times[1:], strict=True):
            s = t - times[0]
            beta, alpha = (rho + gamma * s) ** -kappa, (rho + gamma * s) ** -eta
            held = (1 - beta) * held + beta * x
        return held + alpha * (live[-1] - live[0])

    return average


def tail(inner: Plain, start: float) -> Plain:
    """The live value until `start`; then the inner average of what is later, on its own clock."""

    def average(live: Values, times: Values) -> float:
        first = next((i for i, t in enumerate(times) if t > start), len(live) - 1)
        offset = times[first - 1] if first else 0.0
        return inner(live[first:], [t - offset for t in times[first:]])

    return average


def article(
    beta: float, after: int, inv_gamma: float, power: float, low: float, copies_once_more: bool
) -> Plain:
    """The article's class; time is the number of the call."""

    def average(live: Values, times: Values) -> float:
        held, averaging = live[0], False
        for i, (x, n) in enumerate(zip(live, times, strict=True)):
            if i == 0 or n - 1 <= after or (copies_once_more and not averaging):
                held, averaging = x, n - 1 > after
                continue
            e = n - after - 1
            decay = min(max(1 - (1 + e / inv_gamma) ** -power, low), beta) if e > 0 else 0.0
            held = decay * held + (1 - decay) * x
        return held

    return average


def anytime(c: float) -> Callable[[float], float]:
    def decay(t: float) -> float:
        if t * (t - 1) < (1 - c) / c**2:
            return (t - 1) / t
        return c * (t - 1) / (1 + c * (t - 1)) * (1 - math.sqrt((1 - c) / (t * (t - 1))) / c)

    return decay


PLAIN: dict[str, Plain] = {
    "exponential(0.9)": ema(lambda _, dt: 0.9**dt),
    "exponential(0.0)": ema(lambda *_: 0.0),
    "exponential(half_life=7)": ema(lambda _, dt: 2 ** (-dt / 7)),
    "exponential(span=19)": ema(lambda _, dt: 0.9**dt),
    "exponential(0.9, debias=True)": debiased(0.9),
    "exponential(half_life=7, debias=True)": debiased(2 ** (-1 / 7)),
    "exponential(constant(0.7))": ema(lambda _, dt: 0.7**dt),
    "exponential(told(0.7))": ema(lambda _, dt: 0.7**dt),
    "exponential(inverse_power(5, 0.7))": scheduled(lambda t: 1 - (1 + (t - 1) / 5) ** -0.7),
    "exponential(inverse_power(5, 1, 0.3, 0.6))": scheduled(
        lambda t: min(max(1 - 1 / (1 + (t - 1) / 5), 0.3), 0.6)
    ),
    "exponential(ratio(0.9999))": scheduled(lambda t: t / (9 + t)),
    "exponential(ratio(0.6))": scheduled(lambda t: min(t / (9 + t), 0.6)),
    "exponential(cosine(0.5, 400, 0.9))": scheduled(
        lambda t: 0.9 - 0.4 * (math.cos(math.pi * (t - 1) / 400) + 1) / 2
    ),
    "exponential(half_life_ramp(1000, ratio=0.3))": scheduled(lambda t: 2 ** (-1 / (0.3 * t))),
    "exponential(half_life_ramp(10, ratio=0.3))": scheduled(lambda t: 2 ** (-1 / min(0.3 * t, 10))),
    "exponential(anytime_tail(0.3))": scheduled(anytime(0.3)),
    "exponential(polynomial(2))": scheduled(lambda t: 1 - 3 / (t + 2)),
    "power(3)": power(3.0),
    "power(0)": power(0.0),
    "power(-0.3)": power(-0.3),
    f"power(relative_std={relative_std(6.5)!r})": power(6.5),
    "uniform()": mean,
    "window(1)": newest(1),
    "window(5)": newest(5),
    "window(100)": newest(100),
    "bema()": bema(0.5, 0.2, 1.0, 10.0),
    "bema(0.7, 0.3, 2, 1)": bema(0.7, 0.3, 2.0, 1.0),
    "tail(uniform(), 10)": tail(mean, 10),
    "tail(window(4), 7)": tail(newest(4), 7),
    "tail(exponential(ratio(0.9999)), 7)": tail(scheduled(lambda t: t / (9 + t)), 7),
    "tail(bema(), 9)": tail(bema(0.5, 0.2, 1.0, 10.0), 9),
    "tail(tail(power(2), 3), 6.5)": tail(tail(power(2.0), 3), 6.5),
    "article_ema(0.8, 5)": article(0.8, 5, 1.0, 2 / 3, 0.0, True),
    "article_ema(0.9, 0, 2.0, 0.75, 0.4, False)": article(0.9, 0, 2.0, 0.75, 0.4, False),
}

ONES = [1.0] * 40
UNEVEN = [1.0, 3.0, 1.0, 1.0, 7.0, 2.0, 16.0, 1.0, 4.0, 1.0, 1.0, 40.0, 5.0, 9.0, 1.0, 2.0]
LATE = [5.0, *UNEVEN, 0.5, 2.5]
TIMES = {"ones": ONES, "uneven": UNEVEN, "late": LATE}


def test_every_rule_and_every_schedule_has_a_plain_formula() -> None:
    named = {cls.spec_name() for cls in (*RULES, *SCHEDULES)}
    missing = {name for name in named if not any(f"{name}(" in spec for spec in PLAIN)}
    assert not missing, "write a spec and its plain formula into PLAIN, in this file"


@pytest.mark.parametrize(
    "elapsed", first_quick([LATE, UNEVEN, ONES]), ids=["late", "uneven", "ones"]
)
@pytest.mark.parametrize("spec", PLAIN)
def test_an_average_of_tensors_is_its_plain_formula(spec: str, elapsed: list[float]) -> None:
    live = np.random.default_rng(7).normal(size=len(elapsed)).cumsum().tolist()
    times = list(accumulate(elapsed))
    weights = {"w": torch.zeros(3, dtype=torch.float64)}
    averager = Averager(weights, spec)
    for i, time in enumerate(elapsed):
        weights["w"].fill_(live[i])
        averager.update(time)
        wanted = PLAIN[spec](live[: i + 1], times[: i + 1])
        got = averager.average()["w"]
        np.testing.assert_allclose(got, [wanted] * 3, rtol=1e-12, atol=1e-12, err_msg=f"update {i}")
        profile = coefficients(spec, elapsed[: i + 1])
        np.testing.assert_allclose(profile @ live[: i + 1], wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spec", PLAIN)
def test_a_plain_formula_of_a_constant_is_that_constant(spec: str) -> None:
    """The formulas above are averages, or their bug would be taken for a rule's."""
    times = list(accumulate(UNEVEN))
    assert PLAIN[spec]([2.5] * len(times), times) == pytest.approx(2.5, rel=1e-12)


# BEMA as TRL computes it: its clock is the trainer's step, also after a burn-in.


def trl_bema(
    weights: Values,
    *,
    update_freq: int = 400,
    ema_power: float = 0.5,
    bias_power: float = 0.2,
    lag: float = 10,
    update_after: int = 0,
    multiplier: float = 1.0,
) -> list[float]:
    """The BEMA weights after each step; `weights[0]` are those before training."""
    anchor = held = shown = weights[0]
    history = []
    for step in range(1, len(weights)):
        live = weights[step]
        if step == update_after:
            anchor = held = shown = live
        elif step > update_after and (step - update_after) % update_freq == 0:
            beta = (lag + multiplier * step) ** -ema_power
            alpha = (lag + multiplier * step) ** -bias_power
            held = (1 - beta) * held + beta * live
            shown = held + alpha * (live - anchor)
        history.append(shown)
    return history


@pytest.mark.parametrize("update_freq", [1, 7, 40])
@pytest.mark.parametrize("update_after", [0, 1, 25])
@pytest.mark.parametrize("multiplier", [1.0, 0.3])
def test_bema_is_trls_callback_also_after_a_burn_in(
    update_freq: int, update_after: int, multiplier: float
) -> None:
    live = np.random.default_rng(3).normal(size=201).cumsum().tolist()
    options = {"update_freq": update_freq, "update_after": update_after, "multiplier": multiplier}
    wanted = trl_bema(live, **options)  # type: ignore[arg-type]
    weights = {"w": torch.tensor([live[0]], dtype=torch.float64)}
    rho = 10 + multiplier * update_after
    averager = Averager(weights, f"bema(gamma={multiplier}, rho={rho})")
    if update_after == 0:
        averager.update()
    for step in range(1, 201):
        weights["w"].fill_(live[step])
        if step < update_after or (step - update_after) % update_freq:
            continue
        averager.update(step if step == update_after else update_freq)
        assert averager.average()["w"].item() == pytest.approx(wanted[step - 1], rel=1e-12)


def test_bemas_clock_begins_at_its_anchor() -> None:
    """Anchored by `update()`, then five times 400 steps: the figures of the paper's formula."""
    weights = {"w": torch.zeros(1, dtype=torch.float64)}
    averager = Averager(weights, "bema()")
    averager.update()
    found = []
    for value in range(1, 6):
        weights["w"].fill_(value)
        averager.update(400)
        found.append(averager.average()["w"].item())
    assert found == pytest.approx([0.350, 0.642, 0.926, 1.209, 1.493], abs=5e-4)


# The article's class, written out: what is averaged, copied and ignored at every call.


@pytest.mark.parametrize("update_every", [1, 2, 3])
@pytest.mark.parametrize("update_after_step", [0, 2, 5])
def test_the_articles_class_is_its_plain_form(update_after_step: int, update_every: int) -> None:
    """Calls up to `update_after_step` + 1 copy everything, and so does the first averaging call."""
    model = torch.nn.Linear(1, 1).double()
    model.register_buffer("noted", torch.zeros(1, dtype=torch.float64))
    ema = EMA(
        model,
        beta=0.9,
        update_after_step=update_after_step,
        update_every=update_every,
        ignore_names={"bias"},
        param_or_buffer_names_no_ema={"noted"},
    )
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaging = False
    for n in range(1, 15):
        live = {name: torch.full_like(t, n + 10.0 * len(name)) for name, t in held.items()}
        model.load_state_dict(live)
        ema.update()
        if (n - 1) % update_every == 0:
            if n - 1 <= update_after_step or not averaging:
                held, averaging = dict(live), n - 1 > update_after_step
            e = n - update_after_step - 1
            decay = min(max(1 - (1 + e) ** (-2 / 3), 0.0), 0.9) if e > 0 else 0.0
            held["weight"] = decay * held["weight"] + (1 - decay) * live["weight"]
            held["noted"] = live["noted"]
        for name, tensor in ema.ema_model.state_dict().items():
            np.testing.assert_allclose(tensor, held[name], rtol=1e-12, err_msg=f"{name}, call {n}")
