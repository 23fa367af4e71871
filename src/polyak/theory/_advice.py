"""Advise which average suits a schedule, by the noisy quadratic.

The model has the curvatures 1 to 1/300, as many of each as 1/i has, gradients with the noise covariance
curvature / batch, and first weights at distance 1. Its losses are exact, for every average, learning
rate and noise. `LIMITS` says what the model lacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from polyak._checks import require, require_count, require_positive, require_share
from polyak._shown import Charted, Table
from polyak.rules import Exponential, Power, Rule, Tail, Uniform
from polyak.theory._libraries import equivalents
from polyak.theory._measures import half_life
from polyak.theory._profiles import Profile, profile
from polyak.theory._published import Published, published
from polyak.theory._quadratic import quadratic_moments
from polyak.theory._rates import ANNEALING, learning_rates

LIMITS = (
    "The model is convex, with plain SGD: no generalisation gap, no drift of the optimum, no BatchNorm.",
    "Where weights drift, shorter averages win: papers find 1 % of a run where the model says 10 %.",
    "Averages of most of the run gain here because a quadratic has no drift: test them before use.",
    "It says nothing of accuracy, of samples or of robustness, only of the training loss.",
    "A gain is a share of the loss above its minimum, which a real loss does not show.",
)
_SHARES = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
_STDS = (0.05, 0.1, 0.15, 0.2, 0.25)
_STARTS = (0.9, 0.75, 0.5, 0.25, 0.0)
_BATCHES = (1.0, 10.0, 100.0)
_PEAKS = np.geomspace(0.002, 1.9, 28)
_CURVATURES = np.geomspace(1, 1 / 300, 60)
_LONGEST = 20_000
_RAISED = 4.0  # no paper raises an average's learning rate further
_WORTH = 0.1  # a smaller gain at the same learning rate is called none


class Gain(NamedTuple):
    """The gain of one average under one noise: shares of the loss of the live weights.

    `same` is the gain at the live weights' best learning rate. `own` is the gain at the average's own
    best, which is `rate` times the other and at most 4 times. A gain of 0.1 is a loss 10 % lower.
    """

    rule: Rule
    half_life: float
    batch: float
    same: float
    own: float
    rate: float


@dataclass(frozen=True)
class Advice(Charted):
    """Which average to take for a run, and what to expect of it. `print` shows it as a table.

    `rule` is the EMA that does best at the live weights' learning rate over the noises of `batches`;
    `worth` says whether it gains 10 % or more under one of them. `retuned` is the EMA that does best
    at its own learning rate. `gains` has every average that was tried, under every noise; `modelled`
    is the number of steps of the model. `optimizer_half_life` is that of AdamW's own average.
    """

    steps: int
    schedule: str
    batches: tuple[float, ...]
    modelled: int
    rule: Rule
    retuned: Rule
    worth: bool
    gains: tuple[Gain, ...]
    published: tuple[Published, ...]
    optimizer_half_life: float | None = None

    def of(self, rule: Rule) -> tuple[Gain, ...]:
        """The gains of one average, one for each noise."""
        return tuple(gain for gain in self.gains if gain.rule == rule)

    @property
    def half_life(self) -> float:
        """The half-life of `rule`, in steps."""
        return self.of(self.rule)[0].half_life

    @property
    def verdict(self) -> str:
        """The advice in one sentence."""
        same = _percents([gain.same for gain in self.of(self.rule)])
        retuned = self.of(self.retuned)
        own = f"{_percents([gain.own for gain in retuned])} at its own (x {_times(retuned)}"
        own += f", with {self.retuned})" if self.retuned != self.rule else ")"
        expect = f"expect {same} less loss at the same learning rate, {own}"
        if not self.worth:
            why = "your schedule anneals; " if self.schedule.startswith(ANNEALING) else ""
            return f"none: {why}{expect}"
        return f"{self.rule}, {self._share(self.half_life)}: {expect}"

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The best averages: rule, half-life, gains at the same and at its own rate, that rate."""
        families = [_best(self.gains, family, "same") for family in (Power, Tail)]
        rows = []
        for rule in dict.fromkeys((self.rule, self.retuned, *families)):
            gains = self.of(rule)
            life = f"{gains[0].half_life:.6g} steps, {self._share(gains[0].half_life)}"
            same, own = (_percents([getattr(g, at) for g in gains]) for at in ("same", "own"))
            rows.append((str(rule), life, same, own, f"x {_times(gains)}"))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Everything by name, rules as their specs: ready for JSON."""
        gains = [{**gain._asdict(), "rule": str(gain.rule)} for gain in self.gains]
        rules = {"rule": str(self.rule), "retuned": str(self.retuned), "gains": gains}
        papers = {"published": [each._asdict() for each in self.published], "limits": [*LIMITS]}
        advice = {"verdict": self.verdict, "equivalents": equivalents(self.rule)}
        return {**vars(self), "half_life": self.half_life, **rules, **papers, **advice}

    def __str__(self) -> str:
        noises = ", ".join(f"{batch:g}" for batch in self.batches)
        head = f"{self.steps} steps, {self.schedule}; batch of the model: {noises}"
        head += f"; modelled with {self.modelled} steps" * (self.modelled < self.steps)
        heads = ("average", "half-life", "gain at the same rate", "at its own rate", "own rate")
        lines = Table(heads, self.rows(), left=len(heads)).lines()
        papers = [f"{each.average}: {each.gain} [{each.source}]" for each in self.published]
        listed = [("Published", papers), ("What the model cannot say", LIMITS)]
        notes = [f"\n{title}:\n  " + "\n  ".join(items) for title, items in listed]
        return "\n".join([head, f"advice: {self.verdict}", *self._optimizer(), "", *lines, *notes])

    def _optimizer(self) -> list[str]:
        if (life := self.optimizer_half_life) is None:
            return []
        about = "AdamW's weights already are an average of its updates: half-life"
        return [f"{about} {life:.6g} steps, {self._share(life)}"]

    def _share(self, half_life: float) -> str:
        return f"{100 * half_life / self.steps:.3g} % of the run"


def advise(
    steps: int,
    *,
    schedule: str,
    batch: float | None = None,
    final: float = 0.0,
    warmup: float = 0.01,
    lr: float | None = None,
    weight_decay: float | None = None,
) -> Advice:
    """Advise an average, its half-life and its gain, for a run of `steps` steps under a schedule.

    Every average is compared with the live weights at *their* best learning rate, once at that rate and
    once at its own best. All are exact on the noisy quadratic model; the result also has the ranges that
    papers report. Schedules, `final` and `warmup` are those of `learning_rates`.

    `batch` is the batch size of the model: a batch of 1 is as noisy as the curvature, so that 1, 10
    and 100 (the default, all three) are a run full of noise, one in between, and a calm one.
    With `lr` and `weight_decay` of AdamW, its own half-life is given too: ln 2 / -ln(1 - lr wd).

    >>> advice = advise(2000, schedule="constant", batch=10)
    >>> print(advice.rule, advice.worth)
    exponential(half_life=100) True
    >>> advise(2000, schedule="cosine", batch=10).worth
    False

    Takes about 2 s; a longer run than 20 000 steps is modelled with 20 000. Raises `ValueError`
    unless steps >= 100 and batch > 0, for a wrong schedule, and for one of lr and weight_decay alone.
    Source: the noisy quadratic model, Zhang et al. (arXiv 1907.04164); AdamW as an EMA, Wang and
    Aitchison (arXiv 2405.13698).
    """
    steps = require_count("steps", steps, least=100)
    batches = _BATCHES if batch is None else (float(require_positive("batch", batch)),)
    modelled, final = min(steps, _LONGEST), require_share("final", final)
    factors = learning_rates(schedule, modelled, final=final, warmup=warmup)
    rules = _candidates(modelled)
    profiles = [profile(rule, modelled) for rule in rules]
    gains = _gains(profiles, factors, batches)
    table = tuple(
        Gain(rule, half_life(c) * steps / modelled, *numbers)
        for rule, c, found in zip(_candidates(steps), profiles, gains, strict=True)
        for numbers in found
    )
    rule = _best(table, Exponential, "same")
    return Advice(
        steps=steps,
        schedule=schedule + f" to {final:g}" * (schedule in ANNEALING),
        batches=batches,
        modelled=modelled,
        rule=rule,
        retuned=_best(table, Exponential, "own"),
        worth=max(gain.same for gain in table if gain.rule == rule) >= _WORTH,
        gains=table,
        published=published(anneals=schedule in ANNEALING and final <= 0.1),
        optimizer_half_life=_optimizer_half_life(lr, weight_decay),
    )


def _candidates(steps: int) -> list[Rule]:
    """The averages that are tried: EMAs by their share of the run, powers, means of the last part."""
    return [
        *(Exponential(half_life=_rounded(share * steps)) for share in _SHARES),
        *(Power(relative_std=std) for std in _STDS),
        *(Tail(Uniform(), start=round(start * steps)) for start in _STARTS),
    ]


def _gains(
    profiles: Sequence[Profile], factors: Profile, batches: Sequence[float]
) -> list[list[tuple[float, float, float, float]]]:
    """For each average and noise: the batch, both gains, and the ratio of the learning rates."""
    h, live = _CURVATURES, np.eye(1, len(factors), len(factors) - 1)
    moments = quadratic_moments([*live, *profiles], np.outer(_PEAKS, factors), h)
    losses = {batch: moments.loss(h * _multiplicities(h), h / batch) for batch in batches}
    return [[(batch, *_gain(loss, k)) for batch, loss in losses.items()] for k in range(1, 1 + len(profiles))]  # fmt: skip


def _gain(losses: Profile, average: int) -> tuple[float, float, float]:
    base = int(losses[0].argmin())
    allowed = np.where(_RAISED * _PEAKS[base] >= _PEAKS, losses[average], np.inf)
    own, least = int(allowed.argmin()), losses[0, base]
    same = 1 - losses[average, base] / least
    return float(same), float(1 - allowed[own] / least), float(_PEAKS[own] / _PEAKS[base])


def _multiplicities(h: Profile) -> Profile:
    """How many of the curvatures 1, 1/2, 1/3, ... each of these counts for: the integral of dh / h^2."""
    between = np.sqrt(h[1:] * h[:-1])
    ends = np.concatenate(([2.0], between, [1 / (1 / h[-1] + 0.5)]))
    counts: Profile = 1 / ends[1:] - 1 / ends[:-1]
    return counts


def _best(gains: Sequence[Gain], family: type[Rule], at: str) -> Rule:
    """The rule of a family with the least mean logarithm of its losses over the noises."""
    losses: dict[Rule, float] = {}
    for gain in gains:
        if isinstance(gain.rule, family):
            losses[gain.rule] = losses.get(gain.rule, 0.0) + math.log(1 - getattr(gain, at))
    return min(losses, key=lambda rule: losses[rule])


def _optimizer_half_life(lr: float | None, weight_decay: float | None) -> float | None:
    if lr is None and weight_decay is None:
        return None
    wanted = "both or neither: AdamW keeps 1 - lr * weight_decay of its weights at each step"
    require(lr is not None and weight_decay is not None, "(lr, weight_decay)", (lr, weight_decay), wanted)  # fmt: skip
    lost = require_positive("lr", lr) * require_positive("weight_decay", weight_decay)
    require(0 < lost < 1, "lr * weight_decay", lost, "a number above 0 and below 1")
    return math.log(2) / -math.log1p(-lost)


def _rounded(steps: float) -> float:
    """A half-life to three digits, as an int where it is one."""
    rounded = float(f"{steps:.3g}")
    return int(rounded) if rounded.is_integer() else rounded


def _percents(shares: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{round(100 * share)}" for share in (min(shares), max(shares)))
    return " to ".join(ends) + " %"


def _times(gains: Sequence[Gain]) -> str:
    rates = [gain.rate for gain in gains]
    return " to ".join(dict.fromkeys(f"{rate:.2g}" for rate in (min(rates), max(rates))))
