"""Lines that run the averager itself: thousands of runs at once, each an element of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from polyak.averager import Averager
from polyak.study._reproduce import Line
from polyak.study._reproduce_exact import variances

_RUNS = 20_000
_STEP = 0.1
_TOLERANCE = 0.05  # five standard errors of a variance over 20 000 runs


def lines() -> list[Line]:
    """All lines that are simulated with `Averager`."""
    return [*_averages(), *_pulls()]


def _averages() -> Iterator[Line]:
    topic = "20 000 runs of SGD with Averager, learning rate * h = .1"
    yield from variances(topic, _TOLERANCE, _kept, (0.9, 0.99))
    yield Line.figure(
        topic, "variance of the mean of 1000 steps that start stationary * steps",
        "Polyak and Juditsky 1992: tends to 1", 0.991, _TOLERANCE, lambda: 1000 * _variances()["mean"],
    )  # fmt: skip


def _pulls() -> Iterator[Line]:
    topic = "20 000 runs of SGD with Averager.pull, learning rate * h = .1"
    yield Line.figure(
        topic, "Lookahead(k=5, alpha=.5): variance / SGD's", "arXiv 1907.08610, proposition 2", 0.4430, _TOLERANCE,
        lambda: _pulled(0.5 ** (1 / 5), 1.0, every=5, steps=200) / (_STEP / (2 - _STEP)),
    )  # fmt: skip
    yield Line.figure(
        topic, "PACE, decay .99, pull .1: variance of the average",
        "the Lyapunov equation of arXiv 2606.25086's update", 0.002405, _TOLERANCE,
        lambda: _pulled(0.99, 0.1, every=None, steps=800),
    )  # fmt: skip


def _kept(decay: float) -> float:
    return _variances()[str(decay)] / _variances()["live"]


@cache
def _variances() -> dict[str, float]:
    """The variances over runs of SGD that start at the stationary distribution."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_RUNS, generator=generator, dtype=torch.float64)
    weights = {"w": noise * (_STEP / (2 - _STEP)) ** 0.5}
    rules = {"0.9": "exponential(0.9)", "0.99": "exponential(0.99)", "mean": "uniform()"}
    averager = Averager(weights, rules)
    for _ in range(1000):
        weights["w"].mul_(1 - _STEP).add_(noise.normal_(generator=generator), alpha=_STEP)
        averager.update()
    tensors = {name: averager.average(name)["w"] for name in rules} | {"live": weights["w"]}
    return {name: float(tensor.square().mean()) for name, tensor in tensors.items()}


def _pulled(decay: float, pull: float, *, every: int | None, steps: int) -> float:
    """The variance of the average; a pull every n steps, or with every gradient step (None)."""
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.zeros(_RUNS, dtype=torch.float64)}
    averager = Averager(weights, f"exponential({decay})", every=every or 1)
    if every is not None:
        averager.begin()
    noise = torch.empty_like(weights["w"])
    for step in range(1, steps + 1):
        gradient = weights["w"] + noise.normal_(generator=generator)
        if every is None and step > 1:
            averager.pull(pull)
        weights["w"].sub_(gradient, alpha=_STEP)
        averager.update()
        if every is not None and step % every == 0:
            averager.pull(pull)
    return float(averager.average()["w"].square().mean())
