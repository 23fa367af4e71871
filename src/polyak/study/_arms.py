"""Arms: the averages that the study compares. Every run tracks all of them.

| name | what |
|---|---|
| `live` | the live weights at the stop |
| `article_ema` | the article's EMA; only this arm sets the learning rate and the stop |
| `ema_D` | EMA of constant decay D, updated every step, starting with the first step's weights |
| `ema_0.999_debiased` | the same with Adam's bias correction |
| `sma_K` | mean of the weights after each of the last K steps |
| `lawa_K` | mean of the last K epoch-end weights |
| `swa_75` | mean of the epoch-end weights of the last quarter of the epochs run |
| `ensemble_K` | mean prediction of the networks of the last K epoch ends |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyak.averager import Averager
from polyak.rules import LIVE, Exponential, Rule, Uniform, Window
from polyak.study._model import Metrics, Probe
from polyak.study._settings import Settings

ARTICLE = "article_ema"
SWA_SHARE = 0.75
WEIGHTS = "weights"


@dataclass(frozen=True)
class Arms:
    """The arms besides the live weights; the integers are the sizes of windows."""

    rules: dict[str, Rule]
    last_steps: dict[str, int] = field(default_factory=dict)
    last_epochs: dict[str, int] = field(default_factory=dict)
    swa: tuple[str, ...] = ()
    ensembles: dict[str, int] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The names of all arms in the order of the tables, the live weights first."""
        return [LIVE, *self.specs()]

    def specs(self) -> dict[str, str]:
        """Arm -> its definition as text. Records store these texts, so they must not change."""
        return {
            **{name: f"{rule} of all steps" for name, rule in self.rules.items()},
            **{name: f"{Window(size)} of steps" for name, size in self.last_steps.items()},
            **{name: f"{Window(size)} of epoch ends" for name, size in self.last_epochs.items()},
            **dict.fromkeys(self.swa, f"uniform() of epoch ends after {SWA_SHARE} of those run"),
            **{name: f"mean prediction of {k} epoch ends" for name, k in self.ensembles.items()},
        }


def article_arm(settings: Settings) -> Arms:
    """The article's EMA alone. Every run needs it, since it sets the learning rate and the stop."""
    return Arms({ARTICLE: settings.article_rule()})


def all_arms(settings: Settings) -> Arms:
    """Every arm of the study."""
    return Arms(
        rules={
            ARTICLE: settings.article_rule(),
            **{f"ema_{decay}": Exponential(decay) for decay in (0.9, 0.99, 0.995, 0.999)},
            "ema_0.999_debiased": Exponential(0.999, debias=True),
        },
        last_steps={f"sma_{size}": size for size in (100, 500, 1000)},
        last_epochs={f"lawa_{size}": size for size in (5, 10, 20)},
        swa=("swa_75",),
        ensembles={f"ensemble_{size}": size for size in (5, 10, 20)},
    )


class Tracker:
    """The arms of one run: updated after each step and each epoch, and read at any time.

    All windows of steps share one ring of snapshots, which is averaged when a window is read.
    """

    def __init__(self, arms: Arms, flat: Tensor) -> None:
        self._arms = arms
        self._flat = flat.detach()
        self._averager = Averager({WEIGHTS: self._flat}, arms.rules)
        self._ring = Ring(max(arms.last_steps.values(), default=0), self._flat)
        self._epoch_ends: list[Tensor] = []
        self.update_rules = self._averager.update

    def after_step(self) -> None:
        """Updates the arms with the weights of one step."""
        self.update_rules()
        self._ring.keep()

    def after_epoch(self) -> None:
        """Updates the arms with the weights at the end of an epoch."""
        self._epoch_ends.append(self._flat.clone())

    def driver(self) -> Tensor:
        """The flat weights of the article's EMA."""
        return self._averager.average(ARTICLE)[WEIGHTS]

    def evaluate(self, probe: Probe) -> dict[str, Metrics]:
        """The metrics of every arm now, the live weights first."""
        return {
            LIVE: probe.evaluate(self._flat),
            **{name: probe.evaluate(flat) for name, flat in self.averages().items()},
            **{
                name: probe.judge(ensemble(probe, self._epoch_ends[-size:]))
                for name, size in self._arms.ensembles.items()
            },
        }

    def averages(self) -> dict[str, Tensor]:
        """The flat weights of every arm that is a single network."""
        ends = self._epoch_ends
        last = ends[first_of_swa(len(ends)) :]
        return {
            **{name: self._averager.average(name)[WEIGHTS] for name in self._arms.rules},
            **{name: mean(self._ring.last(size)) for name, size in self._arms.last_steps.items()},
            **{name: mean(ends[-size:]) for name, size in self._arms.last_epochs.items()},
            **{name: mean(last) for name in self._arms.swa},
        }


class Ring:
    """The last `size` values of a tensor."""

    def __init__(self, size: int, source: Tensor) -> None:
        self._source = source
        self._kept = source.new_empty((size, *source.shape)).unbind() if size else ()
        self._count = 0

    def keep(self) -> None:
        """Copies the tensor over the oldest value."""
        if self._kept:
            self._kept[self._count % len(self._kept)].copy_(self._source)
            self._count += 1

    def last(self, size: int) -> list[Tensor]:
        """The last `size` values, or all if there are fewer, the oldest first."""
        return [
            self._kept[i % len(self._kept)] for i in range(max(self._count - size, 0), self._count)
        ]


def mean(snapshots: Sequence[Tensor]) -> Tensor:
    """The uniform average of snapshots."""
    weights = {WEIGHTS: torch.empty_like(snapshots[0])}
    averager = Averager(weights, Uniform())
    for snapshot in snapshots:
        weights[WEIGHTS].copy_(snapshot)
        averager.update()
    return averager.average()[WEIGHTS]


def first_of_swa(epochs: int) -> int:
    """How many epochs SWA leaves out: 75 % of the epochs run, so that at least one remains.

    SWA fixes its budget in advance, but with early stopping the budget is known only at the stop.
    SWA's own learning rate is not used, since all arms share one training.
    """
    return min(math.ceil(SWA_SHARE * epochs), epochs - 1)


def ensemble(probe: Probe, networks: Sequence[Tensor]) -> Tensor:
    """The mean prediction of several networks, with one forward pass each."""
    return torch.stack([probe.predict(flat) for flat in networks]).mean(0)
