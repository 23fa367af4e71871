"""Averages that act on the weights that train.

Switch-EMA, Hare and Tortoise, Lookahead and PACE pull the live weights towards their average. On a
quadratic, live weights and average are then a linear system of two states, driven by the gradient's
noise, and its stationary variances solve one linear equation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from polyak._checks import (
    as_number,
    is_number,
    require,
    require_count,
    require_decay,
    require_share,
)
from polyak.theory._profiles import Profile


class Feedback(NamedTuple):
    """Stationary second moments of live weights and average, just after a pull.

    In units of (standard deviation of the gradient's noise / curvature)^2. `time` is the number of
    steps in which the mean distance from the minimum falls by a factor e, in the long run: a pull
    that calms the average also slows the training down, so compare at equal `time`.
    """

    live: float
    average: float
    covariance: float
    time: float


def feedback(
    step: float,
    decay: float,
    *,
    pull: float,
    every: int = 1,
    update_every: int = 1,
    with_step: bool = False,
) -> Feedback:
    """Compute stationary variances on a quadratic if the live weights are pulled towards their EMA.

    Each step does `live <- live - step (live + noise)`, where `step` = learning rate * curvature. Each
    `update_every` steps the average moves, `average <- lerp(average, live, 1 - decay^update_every)`.
    Each `every` steps follows `live <- lerp(live, average, pull)`. With `with_step` the pull is added
    to the gradient step instead: both start from the same weights, and use the average before it.

    | method | call |
    |---|---|
    | Switch-EMA, Hare and Tortoise | pull=1, every = steps between the switches |
    | Lookahead(k, alpha) | decay=(1 - alpha)^(1/k), pull=1, every=k, update_every=k |
    | PACE | pull=lambda, with_step=True |
    | no pull | pull=0 |

    >>> round(feedback(0.1, 0.99, pull=0).average, 6), round(feedback(0.1, 0.99, pull=0.1, with_step=True).average, 6)
    (0.004588, 0.002405)
    >>> lookahead = feedback(0.1, 0.5 ** (1 / 5), pull=1, every=5, update_every=5)
    >>> round(lookahead.average / feedback(0.1, 0, pull=0).live, 4)
    0.443

    Raises `ValueError` for a decay or pull outside [0, 1], an `every` that is not a multiple of
    `update_every`, and where the system has no stationary state: step outside (0, 2), decay 1.
    Source: Lookahead (arXiv 1907.08610, proposition 2); Switch-EMA (arXiv 2402.09240); Hare and
    Tortoise (arXiv 2406.02596); PACE (arXiv 2606.25086).
    """
    step, pull = as_number(step), require_share("pull", pull)
    require(is_number(step) and 0 < step < 2, "step", step, "learning rate * curvature in (0, 2)")
    decay = require_decay("decay", decay)
    every, update_every = require_count("every", every), require_count("update_every", update_every)
    wanted = f"a multiple of update_every, {update_every}"
    require(every % update_every == 0, "every", every, wanted)
    matrix, noise = _period(step, 1 - decay**update_every, pull, every, update_every, with_step)
    largest = float(np.abs(np.linalg.eigvals(matrix)).max())
    hint = "below 1: else the weights have no stationary variance; take a smaller step or decay"
    require(largest < 1, "the growth in one period", round(largest, 6), hint)
    # V = M V M' + N, with the matrices as vectors.
    second = np.linalg.solve(np.eye(4) - np.kron(matrix, matrix), noise.ravel())
    time = -every / math.log(largest) if largest > 0 else 0.0
    return Feedback(float(second[0]), float(second[3]), float(second[1]), time)


def _period(
    step: float, fraction: float, pull: float, every: int, update_every: int, with_step: bool
) -> tuple[Profile, Profile]:
    """The matrix of (live, average) over one period, and the covariance of the noise in it."""
    towards = np.array([[1 - pull, pull], [0.0, 1.0]])
    update = np.array([[1.0, 0.0], [fraction, 1 - fraction]])
    first = np.array([[1 - step, 0.0], [0.0, 1.0]])
    matrix, noise, received = np.eye(2), np.zeros((2, 2)), np.diag([step**2, 0.0])
    for done in range(1, every + 1):
        move = first + (towards - np.eye(2) if with_step and done == 1 else 0.0)
        matrix, noise = _after(move, matrix, noise)
        noise = noise + received
        if done % update_every == 0:
            matrix, noise = _after(update, matrix, noise)
    return (matrix, noise) if with_step else _after(towards, matrix, noise)


def _after(move: Profile, matrix: Profile, noise: Profile) -> tuple[Profile, Profile]:
    return move @ matrix, move @ noise @ move.T
