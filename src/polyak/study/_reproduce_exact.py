"""Exact lines: the noisy quadratic, scaling rules, feedback, post-hoc averages, merges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import numpy as np

from polyak.rules import Exponential, Power
from polyak.study._region import Region
from polyak.study._reproduce import Line
from polyak.theory import (
    Column,
    Profile,
    coefficients,
    feedback,
    fit,
    learning_rate_decay,
    noise_gain,
    profile,
    qam,
    quadratic_moments,
    ramp_lag,
    wsm,
)

_EXACT = 0.002  # the figures have three or four digits
_STEP = 0.1  # learning rate * curvature
_RATIOS = {0.9: 0.50139, 0.99: 0.08718, 0.999: 0.00942}


def lines() -> list[Line]:
    """All exact lines."""
    return [
        *_quadratic(), *_acting(), *_scaling(), *_cadence(), *_post_hoc(), *_merging(),
    ]  # fmt: skip


def variances(
    topic: str, tolerance: float, kept: Callable[[float], float], decays: Sequence[float]
) -> Iterator[Line]:
    """The share of SGD's variance that averages of these decays keep, learning rate * h = .1."""
    closed = "closed form (1 - b)(1 + b rho) / ((1 + b)(1 - b rho))"
    for decay in decays:
        yield Line.figure(
            topic, f"variance of an EMA of decay {decay} / of SGD", closed, _RATIOS[decay], tolerance,
            partial(kept, decay),
        )  # fmt: skip


def _quadratic() -> Iterator[Line]:
    topic = "noisy quadratic, learning rate * h = .1"
    yield from variances(topic, _EXACT, _kept, list(_RATIOS))
    yield Line.figure(
        topic, "variance of the mean of 3000 steps that start stationary",
        "Polyak and Juditsky 1992: tends to 1 / steps", 3.323e-4, _EXACT, _variance_of_a_mean,
    )  # fmt: skip
    yield Line.figure(
        "anytime tail averaging", "variance of the average * (share of the steps * steps), white noise",
        "Le Roux 2019, arXiv 1902.05083", 1.0, 1e-9,
        lambda: 500 * noise_gain(profile("exponential(anytime_tail(0.5))", 1000)),
    )  # fmt: skip


def _kept(decay: float) -> float:
    """The variance of an EMA as a share of that of SGD, after 20 000 steps on a curvature of 1."""
    rules = [profile(Exponential(each), 20_000) for each in (decay, 0.0)]
    average, live = quadratic_moments(rules, [[_STEP] * 20_000], [1.0]).noise.ravel()
    return float(average / live)


def _variance_of_a_mean() -> float:
    found = quadratic_moments([profile("uniform()", 3000)], [[_STEP] * 3000], [1.0])
    return float((found.start**2 * _STEP / (2 - _STEP) + found.noise).item())


def _acting() -> Iterator[Line]:
    topic = "averages that act on the live weights, learning rate * h = .1"
    yield Line.figure(
        topic, "Lookahead(k=5, alpha=.5): variance / SGD's", "arXiv 1907.08610, proposition 2", 0.4430, _EXACT,
        lambda: feedback(_STEP, 0.5 ** (1 / 5), pull=1, every=5, update_every=5).average
        / feedback(_STEP, 0, pull=0).live,
    )  # fmt: skip
    for pull, variance in ((0.0, 0.004588), (0.02, 0.003883), (0.1, 0.002405), (0.3, 0.001232)):
        yield Line.figure(
            topic, f"PACE, decay .99, pull {pull:g}: variance of the average",
            "the Lyapunov equation of arXiv 2606.25086's update", variance, _EXACT,
            partial(_pace, pull),
        )  # fmt: skip


def _pace(pull: float) -> float:
    return feedback(_STEP, 0.99, pull=pull, with_step=True).average


def _scaling() -> Iterator[Line]:
    source = "Busbridge et al. 2023, arXiv 2307.13813; the table follows from their rule"
    topic = (
        "batch * kappa, learning rate * kappa, decay^kappa; learning rate * h = .001, decay .999"
    )
    table = ((8, 1.002, 996), (32, 1.008, 984), (128, 1.037, 937), (512, 1.230, 765))
    for kappa, ratio, lag in table:
        yield Line.figure(
            topic, f"variance of the EMA at kappa {kappa} / at 1", source, ratio, 5e-4,
            partial(_scaled_variance, kappa),
        )  # fmt: skip
        yield Line.figure(
            topic, f"lag of the EMA at kappa {kappa}, in steps of the small batch", source, lag, 1e-3,
            partial(_scaled_lag, kappa),
        )  # fmt: skip


def _scaled(kappa: int) -> Profile:
    """The profile of an EMA in which each update counts for kappa steps of the small batch."""
    return coefficients(Exponential(0.999), [float(kappa)] * (40_000 // kappa))


def _scaled_lag(kappa: int) -> float:
    return kappa * ramp_lag(_scaled(kappa))


def _scaled_variance(kappa: int) -> float:
    return _variance(kappa) / _variance(1)


@cache
def _variance(kappa: int) -> float:
    c, rate = _scaled(kappa), 0.001 * kappa
    return float(quadratic_moments([c], [[rate] * len(c)], [1.0]).noise.item()) / kappa


def _cadence() -> Iterator[Line]:
    def ratio() -> float:
        rule, steps = Exponential(0.99), 16_000
        often, seldom = (profile(rule, steps, every=every) for every in (1, 16))
        return noise_gain(seldom, correlation=0.999) / noise_gain(often, correlation=0.999)

    yield Line.figure(
        "updates every 16 steps", "noise kept by an EMA of decay .99, every 16 steps / every step, correlated steps",
        "no difference: Morales-Brotons et al. 2024, arXiv 2411.18704", 1.0, 0.005, ratio,
    )  # fmt: skip


def _post_hoc() -> Iterator[Line]:
    topic, source = "post-hoc EMA", "EDM2, arXiv 2312.02696"
    for std, gamma in ((0.05, 16.97), (0.1, 6.94)):
        yield Line.figure(
            topic, f"gamma of a power average of relative std {std:g}", source, gamma, _EXACT,
            partial(_gamma, std),
        )  # fmt: skip
    two, one = (0.05, 0.1), (0.1,)
    yield Line.figure(
        topic, "squared error of post-hoc averages ~ snapshots^-p, two EMAs stored: p", source, 4, 0.05,
        lambda: math.log2(_squared_error(32, two) / _squared_error(64, two)),
    )  # fmt: skip
    yield Line.figure(
        topic, "squared error of post-hoc averages ~ snapshots^-p, one EMA stored: p", "EDM2: much lower accuracy; the order is ours", 2, 0.05,
        lambda: math.log2(_squared_error(32, one) / _squared_error(64, one)),
    )  # fmt: skip
    yield Line.claim(
        topic, "relative squared error of relative std .15 from 32 snapshots of two EMAs",
        "EDM2: a few dozen snapshots are enough", Region.below(1e-5), lambda: _squared_error(32, two),
    )  # fmt: skip
    yield Line.figure(
        topic, "inner product of two power profiles / its closed form", "EDM2, algorithm 3", 1.0, 1e-4, _inner_product,
    )  # fmt: skip


def _gamma(std: float) -> float:
    return Power(relative_std=std).gamma


def _squared_error(snapshots: int, stds: tuple[float, ...]) -> float:
    steps, wanted = 8192, Power(relative_std=0.15)
    every = steps // snapshots
    columns = [
        Column(Power(relative_std=std), "average", step)
        for std in stds
        for step in range(every, steps + 1, every)
    ]
    return fit(columns, wanted, [1.0] * steps).relative_error ** 2


def _inner_product() -> float:
    first, second, steps = Power(relative_std=0.05), Power(relative_std=0.1), 20_000
    product = float(profile(first, steps) @ profile(second, steps))
    a, b = first.gamma, second.gamma
    return product / ((a + 1) * (b + 1) / ((a + b + 1) * steps))


def _merging() -> Iterator[Line]:
    topic = "merging 8 checkpoints as if the learning rate had decayed"
    yield Line.claim(
        topic, "weights of a linear decay: largest distance from the plain mean", "WSM, arXiv 2507.17634",
        Region.below(1e-12), lambda: float(np.abs(wsm(learning_rate_decay("linear", 8)) - 1 / 8).max()),
    )  # fmt: skip
    yield Line.claim(
        topic, "quadratic-accurate weights, cosine: distance from gradient descent with that decay",
        "QAM 2026: exact on a quadratic", Region.below(1e-12), partial(_merging_error, quadratic=True),
    )  # fmt: skip
    yield Line.claim(
        topic, "the plain weights of the same decay: the distance that is left", "WSM keeps the gradients of the run",
        Region.above(1e-3), partial(_merging_error, quadratic=False),
    )  # fmt: skip
    yield Line.figure(
        "warm-up min(d, (1 + n) / (10 + n))", "mean age after 1000 steps / steps", "TensorFlow's num_updates; derived: 1 / 10",
        0.1, 0.01, lambda: ramp_lag(profile("exponential(ratio(0.9999))", 1000)) / 1000,
    )  # fmt: skip


def _merging_error(quadratic: bool) -> float:
    """Gradient descent on curvatures 1 and .1 with rate .5: a merge against a run whose rate decays."""
    multipliers, curvatures = learning_rate_decay("cosine", 8), np.array([1.0, 0.1])
    checkpoints, decayed = [np.ones(2)], np.ones(2)
    for w in multipliers:
        checkpoints.append(checkpoints[-1] * (1 - 0.5 * curvatures))
        decayed = decayed * (1 - 0.5 * w * curvatures)
    weights = (qam if quadratic else wsm)(multipliers)
    return float(np.abs(weights @ np.stack(checkpoints) - decayed).max())
