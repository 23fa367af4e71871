"""The contract of a schedule, the schedule that never changes, and the one that your training sets."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from polyak._checks import require_decay
from polyak._spelling import Spec


class Schedule(Spec, ABC):
    """The base of all schedules: a frozen dataclass that is called with a time and gives a decay.

    At decay 0 an update copies. At decay 1 the average stays as it is.
    """

    @abstractmethod
    def __call__(self, t: float) -> float:
        """The decay per unit of time, in [0, 1], at time `t` > 0 (1 at the first update)."""

    def rate(self, t: float) -> float:
        """`-ln decay(t)`: an update over `elapsed` moves by `1 - exp(-rate elapsed)`.

        A decay next to 1 has lost the digits of its distance from 1: at decay 1 - 1e-15, one digit
        is left. Schedules that come so near to 1 compute the rate without the decay.
        """
        if (decay := self(t)) == 0:
            return math.inf
        # A decay below 0 or NaN gives a fraction of NaN, which is refused with the rule's name.
        return -math.log(decay) if decay > 0 else math.nan


def rate_of(lost: float) -> float:
    """Compute the rate of a decay of `1 - lost`: `-ln(1 - lost)`, to all digits."""
    return -math.log1p(-lost) if lost < 1 else math.inf


@dataclass(frozen=True)
class Constant(Schedule):
    """The same decay at all times: `decay(t) = decay`.

    >>> Constant(0.99)(1), Constant(0.99)(1e6)
    (0.99, 0.99)

    Raises `ValueError` for a decay outside [0, 1].
    """

    CHECKS: ClassVar = {"decay": require_decay}

    decay: float

    def __call__(self, t: float) -> float:
        return self.decay


@dataclass(frozen=True)
class Told(Schedule):
    """A decay that your training sets: `decay(t) = d` after `tell(d)`, `start` before the first.

    Use it if your training computes the decay. Files do not store the decay: set it again after a
    resume. Theory uses its present value.

    >>> momentum = Told(0.996)
    >>> momentum(1)
    0.996
    >>> momentum.tell(0.999)
    >>> momentum(2), print(momentum)
    told(0.996)
    (0.999, None)

    Raises `ValueError` for a decay outside [0, 1].
    """

    start: float
    _last: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tell(self.start)

    def tell(self, decay: float) -> None:
        """Sets the decay of the updates that follow."""
        self._set("_last", require_decay("Told decay", decay))

    def __call__(self, t: float) -> float:
        return self._last
