"""Results of studies that never ran: records in the format of `results.jsonl`, with a known truth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyak.rules import Uniform
from polyak.study import (
    Arm,
    Claim,
    Data,
    Ensemble,
    Metric,
    Region,
    Result,
    Seed,
    Study,
    constant,
    cosine,
    gain,
)
from polyak.study._record_format import fingerprint

STEPS = 40
EVALUATED = [10, 20, 30, 40]


def data(split: int) -> Data:
    part = (torch.full((2, 1), float(split)),)
    return Data(part, part, part)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    value: Tensor = model(x).square().mean()
    return value


def study(**fields: Any) -> Study:
    """Two schedules, two learning rates, four averages and an ensemble, two metrics."""
    given: dict[str, Any] = {
        "name": "made",
        "title": "A study that never ran",
        "model": lambda: nn.Linear(1, 1),
        "data": data,
        "loss": loss,
        "arms": {
            "short": "exponential(0.5)",
            "long": "exponential(0.9)",
            "half_life_1": "exponential(half_life=1)",
            "late_mean": Arm(Uniform(), start=0.5),
            "ensemble": Ensemble(3),
        },
        "metrics": {"loss": Metric(loss), "accuracy": Metric(loss, lower_is_better=False)},
        "schedules": {"constant": constant, "cosine": cosine},
        "learning_rates": (0.1, 0.3),
        "steps": STEPS,
        "batch_size": 1,
        "evaluations": len(EVALUATED),
        "source": "made up",
    }
    return Study(**given | fields)


def truth(arm: str, seed: int, schedule: str, rate: float, part: str) -> float:
    """A loss above 0: `short` is 10 % better at a constant rate, `long` 30 % worse; best rate .1."""
    random = np.random.default_rng([seed, int(10 * rate), len(schedule)])
    luck = random.uniform(0.9, 1.1)
    gain = {"short": 0.9, "half_life_1": 0.9, "long": 1.3, "late_mean": 0.98, "ensemble": 0.95}
    own = np.random.default_rng([seed, len(arm), sum(map(ord, arm))]).normal(0, 0.01)
    factor = gain.get(arm, 1.0) if schedule == "constant" else 1.0
    own = 0.0 if arm in ("short", "half_life_1") else float(own)
    # On the test part the other rate looks better, which must not matter.
    worse = (1.2 if rate == 0.3 else 1.0) if part == "validation" else (0.8 if rate == 0.3 else 1.0)
    return float(luck * factor * worse * (1 + own))


Truth = Callable[[str, int, str, float, str], float | None]


def result(seeds: int = 9, value: Truth = truth, **fields: Any) -> Result:
    """The records of `seeds` seeds, whose values are those of a function."""
    made = study(**fields)
    records = [
        _record(made, seed, schedule, rate, value)
        for seed in range(seeds)
        for schedule in made.schedules
        for rate in made.learning_rates
    ]
    return Result(made, records)


def _record(made: Study, seed: int, schedule: str, rate: float, value: Truth) -> dict[str, Any]:
    names = made.arm_names
    validation = {a: value(a, seed, schedule, rate, "validation") for a in names}
    test = {a: value(a, seed, schedule, rate, "test") for a in names}
    return {
        "study": made.name, "seed": seed, "schedule": schedule, "learning_rate": rate,
        "fingerprint": fingerprint(_conditions(made, schedule)), "conditions": _conditions(made, schedule),
        "steps": EVALUATED, "train_loss": [1.0] * 4, "rates": [rate] * 4, "stopped_early": False,
        "curves": {a: _metrics(made, validation[a], (3.0, 2.0, 1.5, 1.0)) for a in names},
        "test": {a: {"last": _at(made, test[a]), "selected": {"step": 40, **_at(made, test[a])}} for a in names},
        "distance": {a: [0.1, 0.2, 0.3, 0.2] for a in made.arms},
        "cosine": {a: [0.8, 0.9, 0.95, 0.99] for a in made.arms},
        "seconds": {"train": 1e-3, "average": 1e-4, "evaluate": 1e-3},
        "bytes": dict.fromkeys(names, 1024), "forward_passes": {a: 3 if a == "ensemble" else 1 for a in names},
        "after_stop": {},
    }  # fmt: skip


def _conditions(made: Study, schedule: str) -> dict[str, Any]:
    return {
        "study": made.name, "steps": made.steps, "batch_size": made.batch_size,
        "evaluations": made.evaluations, "arms": {name: str(arm) for name, arm in made.arms.items()},
        "metrics": {name: metric.lower_is_better for name, metric in made.metrics.items()},
        "vary": ["init", "order"], "schedule": schedule,
    }  # fmt: skip


def folder(path: Path, made: Result, first: int = 0) -> Path:
    """A folder with the records of a result; its seeds are counted from `first`."""
    path.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record | {"seed": record["seed"] + first}) for record in made.records]
    (path / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _at(made: Study, value: float | None) -> dict[str, float | None]:
    return {
        name: value if metric.lower_is_better or value is None else 1 / value
        for name, metric in made.metrics.items()
    }


def _metrics(made: Study, last: float | None, factors: tuple[float, ...]) -> dict[str, Any]:
    at = [_at(made, None if last is None else last * factor) for factor in factors]
    return {name: [each[name] for each in at] for name in made.metrics}


def no_worse(seed: Seed) -> float:
    return float(seed.value("short") <= seed.value("live"))


CLAIMS = (
    Claim("Short is better.", gain("short"), Region.above(0), "a paper"),
    Claim("Long is better.", gain("long"), Region.above(0)),
    Claim("The late mean gains 2 % or more.", gain("late_mean"), Region.above(0.02)),
    Claim("Short is never worse.", no_worse, Region.above(0.6)),
    Claim("There is no such number.", lambda _: math.nan, Region.above(0), form="number"),
)
