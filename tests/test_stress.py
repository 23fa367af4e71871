"""The stress command (`python benchmarks/stress.py`) finds what is broken, by the law that it breaks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import stress_signals
import stress_world
from polyak import Averager, Uniform
from polyak.rules import Tick
from stress_programs import Outcome, Program, run
from stress_rules import coefficients


def _counts_twice(averager: Averager, elapsed: Any = None) -> None:
    _UPDATE(averager, elapsed)
    _UPDATE(averager, elapsed)


def _never_refuses(averager: Averager, elapsed: Any = None) -> None:
    with suppress(Exception):
        _UPDATE(averager, elapsed)


def _always_refuses(averager: Averager, elapsed: Any = None) -> None:
    raise RuntimeError(f"update of {averager} after {elapsed}: not today")


def _stays(*_: Any) -> Any:
    return nullcontext()


def _off_by_one(_: Uniform, tick: Tick) -> dict[str, float]:
    return {"average": 1.0 if tick.n == 1 else 1 / (tick.n + 1)}


def _forgets(*_: Any) -> None:
    return None


_UPDATE = Averager.update

BROKEN: dict[str, tuple[type, str, Callable[..., Any], str]] = {
    "an update that counts twice": (Averager, "update", _counts_twice, "clock"),
    "an update that swallows its errors": (Averager, "update", _never_refuses, "accepted update"),
    "an update that is refused": (Averager, "update", _always_refuses, "refused update"),
    "a block that applies nothing": (Averager, "applied", _stays, "inside"),
    "a rule that is off by one": (Uniform, "fractions", _off_by_one, "theory"),
    "a state that is not taken over": (Averager, "load_state_dict", _forgets, "clock"),
}
"""What is broken -> where, by what, and the law that finds it."""


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_broken_is_found(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, wrong, law = BROKEN[broken]
    monkeypatch.setattr(place, name, wrong)
    coefficients.cache_clear()
    found = next(filter(_fails(law), (run(Program(seed)) for seed in range(300))), None)
    coefficients.cache_clear()
    assert found is not None


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 50))
def test_programs_have_no_fault(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on a clock: no timers, no races, and patience without an end."""
    monkeypatch.setattr(stress_signals, "TIMERS", 0.0)
    monkeypatch.setattr(stress_world, "PATIENCE", 1000.0)
    for seed in range(first, first + 50):
        program = Program(seed, without=("race",))
        outcome = run(program)
        assert outcome.fault is None, f"{program}: {outcome.fault}"


def _fails(law: str) -> Callable[[Outcome], bool]:
    return lambda outcome: outcome.fault is not None and outcome.fault.law == law
