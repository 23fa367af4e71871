"""Running statistics are never extrapolated, whatever way an average is read out.

A variance that is extrapolated as weights are turns negative, and BatchNorm makes NaN of it.
`DOORS` holds every way to the average of a model; a new one joins by one line. `RULES` holds rules
that extrapolate, each with the rule whose average their running statistics must be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import polyak
from polyak import Averager, Recorder, checkpoints, offline
from polyak.checkpoints import export
from polyak.rules import AVERAGE, LIVE, Bema, Exponential, Rule, Tail, Tick
from polyak.theory import coefficients

STATISTICS = ("1.running_mean", "1.running_var")


@dataclass(frozen=True)
class Faster(Rule):
    """A rule of a user that extrapolates: twice a fast average less a slow one (DEMA's shape)."""

    @property
    def slots(self) -> tuple[str, ...]:
        return ("slow", "fast")

    def fractions(self, tick: Tick) -> dict[str, float]:
        return {"slow": 1.0 if tick.n == 1 else 0.1, "fast": 1.0 if tick.n == 1 else 0.3}

    def readout(self, tick: Tick) -> dict[str, float]:  # noqa: ARG002
        return {"slow": -1.0, "fast": 2.0}


@dataclass(frozen=True)
class InnerOfBema(Rule):
    """The average inside `Bema()`, with the clock written out."""

    start: float = 0.0

    def fractions(self, tick: Tick) -> dict[str, float]:
        since = tick.t - self.start - 1
        return {AVERAGE: (10 + since) ** -0.5 if since > 0 else 1.0}


RULES: dict[str, tuple[Rule, Rule]] = {
    "bema": (Bema(), InnerOfBema()),
    "a late bema": (Tail(Bema(), 3), InnerOfBema(3)),
    "a rule of a user": (Faster(), Exponential(0.7)),
}
STEPS = 60


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=0.5)).double()


def training(model: nn.Module) -> Iterator[int]:
    """Weights that wander, and activations that shrink, so that variances fall towards 0."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        model(torch.randn(16, 3, generator=generator, dtype=torch.float64) / (1 + step))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.01)
        yield step


def averaged(rule: Rule) -> tuple[nn.Module, Averager, dict[str, Tensor]]:
    """A trained model, its averager, and what its statistics must be by the plain inner average."""
    extrapolating, inner = rule, next(i for r, i in RULES.values() if r is rule)
    model = network()
    averager = Averager(model, extrapolating)
    history: list[dict[str, Tensor]] = []
    for _ in training(model):
        averager.update()
        history.append({name: model.state_dict()[name].clone() for name in STATISTICS})
    shares = coefficients(inner, [1.0] * STEPS).tolist()
    wanted = {
        name: torch.stack([c * each[name] for c, each in zip(shares, history, strict=True)]).sum(0)
        for name in STATISTICS
    }
    return model, averager, wanted


class Run(NamedTuple):
    """A trained model, its averager, and a folder for files."""

    model: nn.Module
    averager: Averager
    folder: Path


Read = Callable[[Run], Mapping[str, Tensor]]


def applied(run: Run) -> Mapping[str, Tensor]:
    with run.averager.applied():
        return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def copied_to(run: Run) -> Mapping[str, Tensor]:
    other = network()
    run.averager.copy_to(other)
    return other.state_dict()


def resumed(run: Run) -> Mapping[str, Tensor]:
    again = Averager(run.model, run.averager.rules)
    again.load_state_dict(run.averager.state_dict())
    return again.average("average")


def saved(run: Run) -> Mapping[str, Tensor]:
    polyak.save(run.folder / "average.safetensors", run.averager)
    return dict(checkpoints.read(run.folder / "average.safetensors").average())


def loaded(run: Run) -> Mapping[str, Tensor]:
    polyak.save(run.folder / "average.safetensors", run.averager)
    again = Averager(run.model, run.averager.rules)
    polyak.load(run.folder / "average.safetensors", again)
    return again.average("average")


def exported(run: Run) -> Mapping[str, Tensor]:
    export(run.folder / "model.safetensors", run.averager)
    return load_file(run.folder / "model.safetensors")


def exported_from_a_file(run: Run) -> Mapping[str, Tensor]:
    polyak.save(run.folder / "average.safetensors", run.averager)
    export(run.folder / "model.safetensors", checkpoints.read(run.folder / "average.safetensors"))
    return load_file(run.folder / "model.safetensors")


def tensor_by_tensor(run: Run) -> Mapping[str, Tensor]:
    weights = run.averager.weights()
    return {name: weights[name] for name in weights}


DOORS: dict[str, Read] = {
    "average": lambda run: run.averager.average(),
    "weights": tensor_by_tensor,
    "applied": applied,
    "copy_to": copied_to,
    "state_dict": resumed,
    "save": saved,
    "load": loaded,
    "export": exported,
    "export of a file": exported_from_a_file,
}
OF_FILES = {"save", "load", "export of a file"}  # a file holds a rule as its spec: none of a user
CASES = [
    pytest.param(door, rule, id=f"{door}-{name}")
    for door in DOORS
    for name, (rule, _) in RULES.items()
    if not (door in OF_FILES and isinstance(rule, Faster))
]


@pytest.mark.parametrize(("door", "rule"), CASES)
def test_statistics_are_those_of_the_inner_average(door: str, rule: Rule, tmp_path: Path) -> None:
    model, averager, wanted = averaged(rule)
    found = DOORS[door](Run(model, averager, tmp_path))
    assert all(found[name].isfinite().all() for name in found)
    for name in STATISTICS:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9, atol=1e-15)
    assert found["1.running_var"].min() >= 0


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES.values()], ids=RULES)
def test_the_same_terms_would_make_a_variance_negative(rule: Rule) -> None:
    """The negative control: read out as a weight is, the variance of this run is below 0."""
    model, averager, _ = averaged(rule)
    slots = averager.state_dict()["averages"]["average"]["slots"]
    slots |= {LIVE: model.state_dict()}
    readout = rule.readout(averager.clock)
    variance = sum(c * slots[slot]["1.running_var"] for slot, c in readout.items())
    assert torch.as_tensor(variance).min() < 0


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES.values()], ids=RULES)
def test_weights_are_extrapolated_as_before(rule: Rule) -> None:
    model, averager, _ = averaged(rule)
    slots = averager.state_dict()["averages"]["average"]["slots"] | {LIVE: model.state_dict()}
    for name in ("0.weight", "1.bias"):
        terms = (c * slots[s][name] for s, c in rule.readout(averager.clock).items())
        wanted = sum(terms, torch.zeros(()))
        np.testing.assert_allclose(averager.average()[name].detach(), wanted.detach(), rtol=1e-12)


def test_a_mapping_knows_statistics_by_their_names() -> None:
    weights = {"bn.running_var": torch.ones(2), "w": torch.ones(2)}
    averager = Averager(weights, "bema()")
    for _ in range(5):
        averager.update()
        for tensor in weights.values():
            tensor.mul_(0.1)
    averager.update()
    assert averager.average()["bn.running_var"].min() >= 0 > averager.average()["w"].max()


def test_the_summary_says_so() -> None:
    averager = Averager(network(), {"lead": "bema()", "calm": "exponential(0.9)"})
    reasons = {row.name: row.reason for row in averager.summary().rows}
    said = "; read out without extrapolation (of lead)"
    assert all(reasons[name].endswith(said) for name in STATISTICS)
    assert not any(said in reason for name, reason in reasons.items() if name not in STATISTICS)
    alone = {row.name: row.reason for row in Averager(network(), "bema()").summary().rows}
    assert alone[STATISTICS[0]].endswith("; read out without extrapolation")
    calm = str(Averager(network(), "exponential(0.9)").summary())
    assert "extrapolation" not in calm


# Over files.


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    model = network()
    for step in training(model):
        if step % 5 == 4:
            paths.append(tmp_path / f"step-{step + 1}.safetensors")
            save_file(model.state_dict(), paths[-1])
    return paths


def stacked(files: list[Path], name: str) -> Tensor:
    return torch.stack([load_file(path)[name] for path in files])


def test_over_files_a_rule_gives_statistics_its_inner_average(files: list[Path]) -> None:
    made = offline.average(files, "bema()", elapsed=[5.0] * len(files))
    assert made.coefficients.min() < 0 <= made.statistics.min()
    held, clock = load_file(files[0]), 0.0
    for path in files[1:]:
        clock += 5
        share = (10 + clock) ** -0.5
        held = {name: old + share * (load_file(path)[name] - old) for name, old in held.items()}
    for name in STATISTICS:
        np.testing.assert_allclose(made[name], held[name], rtol=1e-6)
    wanted = (torch.tensor(made.coefficients)[:, None, None] * stacked(files, "0.weight")).sum(0)
    np.testing.assert_allclose(made["0.weight"], wanted, rtol=1e-6)


@pytest.mark.parametrize("shares", [[2.0, -1.0], [-0.5, 0.5, 1.0], [0.5, -1.0, 0.0, 1.5]])
def test_over_files_negative_coefficients_count_zero(
    files: list[Path], shares: list[float]
) -> None:
    """`max(c, 0) / sum of max(c, 0)`, for the mean as for the variance."""
    made = offline.average(files[: len(shares)], shares)
    above = np.maximum(shares, 0)
    np.testing.assert_allclose(made.statistics, above / above.sum(), rtol=1e-15)
    for name in STATISTICS:
        terms = torch.tensor(made.statistics)[:, None] * stacked(files[: len(shares)], name)
        np.testing.assert_allclose(made[name], terms.sum(0), rtol=1e-6)


@pytest.mark.parametrize("merge", [polyak.theory.wsm, polyak.theory.qam])
def test_merges_of_a_decay_have_no_coefficient_below_zero(
    files: list[Path], merge: Callable[[Tensor], np.ndarray[tuple[int], np.dtype[np.float64]]]
) -> None:
    shares = merge(polyak.theory.learning_rate_decay("sqrt", len(files)))  # type: ignore[arg-type]
    made = offline.average(files, shares)
    np.testing.assert_array_equal(made.statistics, made.coefficients)
    assert made["1.running_var"].min() >= 0


@pytest.mark.parametrize("spec", ["bema()", "exponential(half_life=3)", "tail(uniform(), 40)"])
def test_a_synthesis_has_no_negative_variance(tmp_path: Path, spec: str) -> None:
    model = network()
    rules = {str(s): f"power(relative_std={s})" for s in (0.05, 0.1)}
    averager = Averager(model, {**rules, "lead": "bema()"})
    recorder = Recorder(averager, tmp_path / "run", every=5)
    direct = Averager(model, spec)
    for _ in training(model):
        averager.update()
        direct.update()
        recorder.update()
    made = polyak.synthesize(tmp_path / "run", spec, max_error=9, max_amplification=1e9)
    assert sum(term.coefficient for term in made.statistics) == pytest.approx(1)
    assert min(term.coefficient for term in made.statistics) > 0
    assert made.average()["1.running_var"].min() >= 0
    if spec == "bema()":  # its inner average was recorded, so it is exact
        for name in STATISTICS:
            np.testing.assert_allclose(made.average()[name], direct.average()[name], rtol=1e-6)


def test_a_synthesis_of_plain_checkpoints_has_no_negative_variance(files: list[Path]) -> None:
    steps = {int(path.stem.partition("-")[2]): path for path in files}
    made = polyak.synthesize(None, "bema()", checkpoints=steps, max_error=99, max_amplification=99)
    assert min(term.coefficient for term in made.terms) < 0
    assert made.average()["1.running_var"].min() >= 0
