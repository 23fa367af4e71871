"""A user's own rules and schedules: they have a text, files hold them, and what no file could is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import polyak
from models import assert_same, everything, wander
from own_rules import HalfWay, Stairs
from polyak import Averager, Exponential, Tail, checkpoints
from polyak.decays import Schedule
from polyak.rules import AVERAGE, Rule, Tick, Uniform

OWN: list[Rule] = [
    HalfWay(0.5),
    HalfWay(0.25, Uniform()),
    HalfWay(share=0.5, inner=HalfWay(0.125)),
    Exponential(Stairs()),
    Exponential(Stairs(3.0)),
    Tail(HalfWay(0.5), 2),
    Tail(Exponential(Stairs(2)), 1),
]


def train(model: nn.Module, averager: Averager, steps: range) -> None:
    for step in steps:
        wander(model, step)
        averager.update()


@pytest.mark.parametrize("rule", OWN, ids=str)
def test_its_text_is_the_rule(rule: Rule) -> None:
    assert polyak.parse(str(rule)) == rule


@pytest.mark.parametrize("rule", OWN, ids=str)
def test_a_file_holds_it_and_goes_on_bit_for_bit(tmp_path: Path, rule: Rule) -> None:
    model = everything()
    averager = Averager(model, {"own": rule, "other": "window(2)"})
    train(model, averager, range(5))
    polyak.save(tmp_path / "it", averager)
    again = Averager(model, {"own": str(rule), "other": "window(2)"})
    polyak.load(tmp_path / "it", again)
    found = checkpoints.read(tmp_path / "it")
    assert found.rules["own"] == rule
    for name, tensor in averager.average("own").items():
        if name != "frozen":
            assert torch.equal(found.averages["own"][name], tensor)
    for step in range(5, 9):
        wander(model, step)
        averager.update()
        again.update()
    assert_same(again.average("own"), averager.average("own"))


@pytest.mark.slow
def test_where_it_is_not_imported_the_file_says_what_to_import(tmp_path: Path) -> None:
    averager = Averager({"w": torch.zeros(2)}, Exponential(Stairs()))
    averager.update()
    polyak.save(tmp_path / "it", averager)
    code = "import polyak; polyak.checkpoints.read('it')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    words = (
        "its rule stairs(...) is the class own_rules.Stairs, and stairs means no class now: import"
    )
    assert words in done.stderr
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({tests!r}); import own_rules; {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def elsewhere() -> type[Rule]:
    @dataclass(frozen=True)
    class HalfWay(Uniform):
        """Another class of that name."""

        share: float = 0.5

    return HalfWay


def test_another_class_of_that_name_is_not_taken_for_it(tmp_path: Path) -> None:
    rule = HalfWay(0.5)
    averager = Averager({"w": torch.zeros(2)}, rule)
    averager.update()
    polyak.save(tmp_path / "it", averager)
    other = elsewhere()
    try:
        with pytest.raises(ValueError, match=r"is the class own_rules.HalfWay, and half_way means"):
            checkpoints.read(tmp_path / "it")
        with pytest.raises(ValueError, match=r"HalfWay cannot be saved.*reads as elsewhere"):
            Averager({"w": torch.zeros(2)}, rule)
        assert Averager({"w": torch.zeros(2)}, other()).rule == other()
    finally:
        from polyak._spelling import KNOWN

        KNOWN["half_way"] = HalfWay


@dataclass(frozen=True)
class ByFunction(Rule):
    """A rule with a field that no text can tell."""

    share: Callable[[float], float]

    def fractions(self, tick: Tick) -> dict[str, float]:
        return {AVERAGE: 1.0 if tick.n == 1 else self.share(tick.t)}


@dataclass(frozen=True)
class ByTable(Schedule):
    """A schedule with a field that no text can tell."""

    decays: tuple[float, ...]

    def __call__(self, t: float) -> float:
        return self.decays[min(int(t), len(self.decays) - 1)]


@dataclass(frozen=True)
class ByTableUnsaved(ByTable):
    """The same, and it says so."""

    SAVABLE: ClassVar = False


@dataclass(frozen=True)
class Silent(Uniform):
    """A rule whose text leaves out a field."""

    extra: float = 1.0

    def __str__(self) -> str:
        return "uniform()"


class Plain(Rule):
    """No dataclass."""

    def fractions(self, tick: Tick) -> dict[str, float]:
        return {AVERAGE: 1 / tick.n}


TEXTLESS: dict[str, Callable[[], Rule]] = {
    "a function": lambda: ByFunction(lambda _: 0.5),
    "a function in a tail": lambda: Tail(ByFunction(lambda _: 0.5), 1),
    "a table in a schedule": lambda: Exponential(ByTable((0.0, 0.5))),
    "a text that leaves out a field": lambda: Silent(2.0),
    "no dataclass": Plain,
}


@pytest.mark.parametrize("kind", TEXTLESS)
def test_what_no_file_could_hold_is_refused_when_the_averager_is_made(kind: str) -> None:
    weights = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"cannot be saved, so the first save would fail"):
        Averager(weights, TEXTLESS[kind]())
    averager = Averager(weights, "uniform()")
    with pytest.raises(ValueError, match="cannot be saved"):
        averager.change_rule(TEXTLESS[kind]())


def test_a_class_that_says_that_it_is_not_saved_is_taken(tmp_path: Path) -> None:
    for rule in (Exponential(ByTableUnsaved((0.0, 0.5))), Tail(Exponential(ByTableUnsaved((0.5,))), 1)):  # fmt: skip
        weights: dict[str, Any] = {"w": torch.zeros(2)}
        averager = Averager(weights, rule)
        averager.update()
        again = Averager(weights, rule)
        again.load_state_dict(averager.state_dict())
        with pytest.raises(ValueError, match=r"save: average 'average': .*SAVABLE is False"):
            polyak.save(tmp_path / "it", averager)
        assert not list(tmp_path.iterdir())
