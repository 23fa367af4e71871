"""The exact gain of an average on the noisy quadratic model.

In the direction of curvature h, SGD does `w <- w - rate (h w + noise)` with independent noise. The weights
are linear in the start and in the noise of each step, and so is every average of them. So its second
moments need no simulation: they are sums of squares of responses. The averages are profiles, so
any rule has them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polyak._checks import require
from polyak.theory._profiles import NOTHING, Profile

_SWEPT = 32  # steps between looks for numbers that became too small


class Moments(NamedTuple):
    """The second moments of averages, each of shape (averages, schedules, directions).

    `E[average^2] = start^2 E[w_0^2] + noise Var(noise of a gradient)`: `start` is the part of the first
    weights that is left, `noise` the sum over steps of the squared responses to a step's noise.
    """

    start: Profile
    noise: Profile

    def loss(
        self, curvatures: npt.ArrayLike, variances: npt.ArrayLike, *, start: npt.ArrayLike = 1.0
    ) -> Profile:
        """`sum of h E[average^2] / 2` over the directions: the expected loss, (averages, schedules).

        `variances` of the gradient's noise and `start`, the second moments of the first weights, are
        one for all directions or one for each.
        """
        second = self.start**2 * np.asarray(start) + self.noise * np.asarray(variances)
        loss: Profile = second @ np.asarray(curvatures, dtype=np.float64) / 2
        return loss


def quadratic_moments(
    profiles: npt.ArrayLike, rates: npt.ArrayLike, curvatures: npt.ArrayLike
) -> Moments:
    """Compute the exact second moments of averages of SGD on a quadratic, in each direction.

    `w_i = (1 - rate_i h) w_{i-1} + rate_i noise_i`, average = sum_i c_i w_i. The response of the
    average to a unit of weight at step i is `G_i = c_i + (1 - rate_{i+1} h) G_{i+1}`, so that
    `start = (1 - rate_1 h) G_1` and `noise = sum_i (rate_i G_i)^2`.

    Args:
        profiles: a row for each average, as `profile` returns it: (averages, steps). The live
            weights are the profile 0, ..., 0, 1.
        rates: the learning rate of each step, a row for each schedule: (schedules, steps).
        curvatures: h of each direction: (directions,).

    >>> import numpy as np
    >>> live, mean = [0, 0, 0, 1], [0.25, 0.25, 0.25, 0.25]
    >>> found = quadratic_moments([live, mean], [[0.5] * 4], [1.0])
    >>> found.start.ravel(), found.noise.ravel()
    (array([0.0625  , 0.234375]), array([0.33203125, 0.15356445]))

    About 4 s for 20 averages, 20 schedules, 300 directions and 20 000 steps. Raises `ValueError` for
    shapes that do not fit, and for values that are not finite.
    """
    c, rate, h = _array("profiles", profiles, 2), _array("rates", rates, 2), _array("curvatures", curvatures, 1)  # fmt: skip
    wanted = f"{c.shape[1]}: a learning rate for each step of the profiles"
    require(rate.shape[1] == c.shape[1], "steps of rates", rate.shape[1], wanted)
    response = np.zeros((len(c), len(rate), len(h)))
    noise, square = np.zeros_like(response), np.empty_like(response)
    kept: Profile | float = 0.0
    for step in range(c.shape[1] - 1, -1, -1):
        response *= kept
        response += c[:, step, None, None]
        np.multiply(response, response, out=square)
        now = rate[:, step, None]
        square *= now**2
        noise += square
        kept = 1 - now * h
        if step % _SWEPT == 0:  # denormal numbers are slow, and their squares are 0
            response[np.abs(response) < NOTHING] = 0.0
    return Moments(response * kept, noise)


def _array(name: str, given: npt.ArrayLike, dimensions: int) -> Profile:
    array = np.asarray(given, dtype=np.float64)
    wanted = f"{dimensions} dimension{'s' * (dimensions > 1)}, none empty"
    require(array.ndim == dimensions and array.size > 0, f"shape of {name}", array.shape, wanted)
    require(bool(np.isfinite(array).all()), name, given, "finite numbers")
    return array
