"""Numbers of numpy, torch and others are taken wherever a number is, and stored as Python's.

`DOORS` holds every place that takes a number; a new one joins by one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polyak
from polyak import (
    Averager,
    Bema,
    Exponential,
    Power,
    Recorder,
    Tail,
    Uniform,
    Window,
    decays,
    theory,
)
from polyak._checks import as_number
from polyak.rules import ArticleEMA, Tick


class Jaxish:
    """A scalar array of a library that is not known here: it has a shape, and converts itself."""

    shape = ()

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return float(self.value)


class Index(Jaxish):
    def __index__(self) -> int:
        return int(self.value)


FLOATS: dict[str, Callable[[float], Any]] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "longdouble": np.longdouble,
    "array": np.array,
    "tensor": torch.tensor,
    "bfloat16": lambda v: torch.tensor(v, dtype=torch.bfloat16),
    "parameter": lambda v: torch.nn.Parameter(torch.tensor(v)),
    "fraction": Fraction,
    "jaxish": Jaxish,
}
COUNTS: dict[str, Callable[[int], Any]] = {
    "int64": np.int64,
    "uint8": np.uint8,
    "array": np.array,
    "tensor": torch.tensor,
    "jaxish": Index,
}
FLOAT_DOORS: dict[str, Callable[[Callable[[float], Any]], Any]] = {
    "Exponential": lambda n: Exponential(n(0.75)),
    "half_life": lambda n: Exponential(half_life=n(0.75)),
    "from_half_life": lambda n: Exponential.from_half_life(n(0.75)),
    "span": lambda n: Exponential(span=n(6.0)),
    "Power": lambda n: Power(n(0.75)),
    "relative_std": lambda n: Power(relative_std=n(0.1875)),
    "Bema": lambda n: Bema(n(0.75), n(0.75), n(0.75), n(6.0)),
    "Tail": lambda n: Tail(Uniform(), n(0.75)),
    "ArticleEMA": lambda n: ArticleEMA(n(0.75), 3, n(0.75), n(0.75), n(0.5)),
    "Constant": lambda n: Exponential(decays.Constant(n(0.75))),
    "InversePower": lambda n: Exponential(decays.InversePower(n(0.75), n(0.5), n(0.5), n(0.75))),
    "Ratio": lambda n: Exponential(decays.Ratio(n(0.75))),
    "Cosine": lambda n: Exponential(decays.Cosine(n(0.75), n(6.0), n(0.875))),
    "HalfLifeRamp": lambda n: Exponential(decays.HalfLifeRamp(n(0.75), n(0.5))),
    "AnytimeTail": lambda n: Exponential(decays.AnytimeTail(n(0.75))),
    "Polynomial": lambda n: Exponential(decays.Polynomial(n(0.75))),
}


@pytest.mark.parametrize("make", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("door", FLOAT_DOORS.values(), ids=FLOAT_DOORS)
def test_a_rule_of_other_numbers_is_the_rule_of_pythons(
    door: Callable[[Callable[[float], Any]], Any], make: Callable[[float], Any]
) -> None:
    """The values are exact in every dtype, so the rules must be equal, print and hash alike."""
    plain, other = door(float), door(make)
    assert (other, hash(other), str(other), repr(other)) == (
        plain,
        hash(plain),
        str(plain),
        repr(plain),
    )
    assert polyak.parse(str(other)) == plain
    pair = [rule.fractions(Tick(3, 9.0, 2.0, Tick(2, 8.0, 2.0))) for rule in (plain, other)]
    assert pair[0] == pair[1] and all(type(f) is float for f in pair[1].values())


def weights() -> dict[str, torch.Tensor]:
    return {"w": torch.ones(3)}


def every_of(value: Any) -> object:
    averager = Averager(weights(), "uniform()", every=value)
    for _ in range(9):
        averager.update()
    return averager.every, averager.count


def recorded(value: Any, folder: Path) -> float:
    return Recorder(Averager(weights(), "uniform()"), folder, every=value).every


COUNT_DOORS: dict[str, Callable[[Any, Path], Any]] = {
    "Window": lambda v, _: (Window(v), str(Window(v))),
    "update_after_step": lambda v, _: str(ArticleEMA(0.9, v)),
    "Averager every": lambda v, _: every_of(v),
    "EMA": lambda v, _: polyak.EMA(torch.nn.Linear(1, 1), update_every=v).update_every,
    "Recorder": recorded,
    "profile": lambda v, _: theory.profile("uniform()", v, every=v).tolist(),
    "coefficients": lambda v, _: theory.coefficients("power(1)", [v, v]).tolist(),
    "explain": lambda v, _: json.dumps(theory.explain("uniform()", v, every=v).as_dict()),
    "match": lambda v, _: theory.match(Window, like="uniform()", steps=v),
    "cadence": lambda v, _: theory.cadence("uniform()", steps=v),
    "displacement": lambda v, _: theory.displacement("uniform()", v, every=v),
    "learning_rate_decay": lambda v, _: theory.learning_rate_decay("sqrt", v).tolist(),
    "Column": lambda v, _: theory.fit(
        [theory.Column(Uniform(), "average", v)], "uniform()", [1.0] * 3
    ).coefficients.tolist(),
}


@pytest.mark.parametrize("make", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("door", COUNT_DOORS.values(), ids=COUNT_DOORS)
def test_a_count_of_another_library_is_that_of_python(
    door: Callable[[Any, Path], Any], make: Callable[[int], Any], tmp_path: Path
) -> None:
    assert door(make(3), tmp_path / "other") == door(3, tmp_path / "plain")


TIMES = [(make, 2.0) for make in FLOATS.values()] + [(make, 2) for make in COUNTS.values()]


@pytest.mark.parametrize(("make", "time"), TIMES, ids=[*FLOATS, *COUNTS])
def test_an_elapsed_time_of_another_library(make: Callable[[Any], Any], time: float) -> None:
    averagers = [Averager(weights(), "power(3)") for _ in range(2)]
    for averager, times in zip(averagers, ([2, 2], [make(time)] * 2), strict=True):
        for time in times:
            averager.update(time)
    states = [averager.state_dict()["averages"]["average"]["tick"] for averager in averagers]
    assert states[0] == states[1]
    assert all(type(number) in (int, float, type(None)) for number in states[1])


def test_errors_and_correlations_of_another_library() -> None:
    c = theory.profile("exponential(0.9)", 100)
    plain = theory.noise_gain(c, correlation=0.5)
    assert theory.noise_gain(c, correlation=np.float64(0.5)) == plain
    assert theory.cadence("uniform()", steps=100, error=np.float64(0.1)) == theory.cadence(
        "uniform()", steps=100, error=0.1
    )
    fractions: dict[str, Any] = {"batch": Fraction(10), "final": Fraction(1, 2)}
    advice = theory.advise(100, schedule="cosine", **fractions)
    assert advice.schedule == "cosine to 0.5"


NO_NUMBERS: dict[str, Any] = {
    "True": True,
    "numpy's True": np.True_,
    "torch's True": torch.tensor(True),
    "text": "0.5",
    "numpy's text": np.str_("0.5"),
    "a list": [0.5],
    "a vector": np.array([0.5]),
    "a tensor with a dimension": torch.tensor([0.5]),
    "a complex number": np.complex64(0.5),
    "a complex tensor": torch.tensor(0.5j),
    "a tensor without content": torch.tensor(0.5, device="meta"),
    "NaN": np.float32("nan"),
    "infinity": torch.tensor(float("inf")),
    "None": None,
}


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_what_is_no_number(value: Any) -> None:
    """A vector of one, a bool and a string are no numbers, of whatever library."""
    for make in (
        lambda: Power(value),
        lambda: decays.Constant(value),
        lambda: Window(value),
        lambda: Averager(weights(), "uniform()", every=value),
        lambda: theory.profile("uniform()", value),
        lambda: theory.cadence("uniform()", error=value, steps=10),
    ):
        with pytest.raises(ValueError, match=r" is .*, wanted |takes exactly one"):
            make()
    if value is not None:
        with pytest.raises(ValueError, match=r"elapsed is .*, wanted a finite number > 0"):
            Averager(weights(), "uniform()").update(value)


@pytest.mark.parametrize("value", [np.float32(2), torch.tensor(2.0), 2.0, np.float64(2)], ids=repr)
def test_a_count_is_not_a_float(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Window\.size is 2\.0, wanted an integer >= 1"):
        Window(value)


def test_what_is_converted_is_of_python() -> None:
    values = [np.float32(0.5), np.int16(2), torch.tensor(3), Fraction(1, 2), np.longdouble(0.5)]
    assert [type(as_number(value)) for value in values] == [float, int, int, float, float]
