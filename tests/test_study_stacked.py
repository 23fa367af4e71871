"""Runs that are trained stacked are the runs of the plain loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyak import Uniform
from polyak.study import Arm, Data, Metric, Plateau, Study, constant, cosine, run
from polyak.study._loop import Run, train
from polyak.study._stackable import require_stackable
from polyak.study._stacked import train_stacked
from quick import first_quick
from study_models import Scaled, Turned, Twice, cnn, cross_entropy, images, mlp, sgd, study


def in_float64(seed: int) -> Data:
    data = images(seed)
    parts = (
        tuple(t.double() if t.is_floating_point() else t for t in part)
        for part in (data.train, data.validation, data.test)
    )
    return Data(*parts)


def wide(model: Callable[[], nn.Module]) -> nn.Module:
    return model().double()


def adamw(parameters: Any, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=0.1)


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Where two records differ by more than 1e-9 (relative or absolute), times left out."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        return [
            d
            for k in ours
            if k != "seconds"
            for d in differences(ours[k], theirs[k], f"{path}.{k}")
        ]
    if isinstance(ours, list):
        assert len(ours) == len(theirs), path
        return [
            d
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
            for d in differences(a, b, f"{path}[{i}]")
        ]
    same = (
        ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)
        if isinstance(ours, float)
        else ours == theirs
    )
    return [] if same else [f"{path}: {ours} {theirs}"]


PLATEAU = Plateau("ema", patience=1, stop=3, after=2)
RUNS = [
    Run(0, "constant", 0.01),
    Run(1, "cosine", 0.05),
    Run(2, "plateau", 0.02),
    Run(0, "constant", 0.03),
]  # fmt: skip


def exact(model: Any, optimizer: Any, steps: int) -> Study:
    """The study in float64, without random layers."""
    schedules = {"constant": constant, "cosine": cosine, "plateau": PLATEAU}
    fields = {"model": partial(wide, model), "data": in_float64, "optimizer": optimizer}
    return study(**fields, schedules=schedules, steps=steps, evaluations=20)


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", first_quick([partial(mlp, 0.0), cnn, Scaled, Twice]))
@pytest.mark.parametrize("optimizer", [sgd, pytest.param(adamw, marks=pytest.mark.slow)])
def test_stacked_runs_are_the_plain_ones(model: Any, optimizer: Any, steps: int) -> None:
    """Several learning rates, schedules and seeds; one run stops early and is dropped."""
    several = exact(model, optimizer, steps)
    records = train_stacked(several, RUNS)
    for each, record in zip(RUNS, records, strict=True):
        assert differences(record, train(several, each)) == []
    assert len(records[2]["after_stop"]["steps"]) == 2
    assert records[2]["stopped_early"] or steps == 40
    require_stackable(several)


def test_a_stack_may_have_complex_numbers() -> None:
    require_stackable(study(model=Turned))


@pytest.mark.slow
def test_with_dropout_stacked_runs_have_the_same_distribution() -> None:
    """The mean paired difference over 200 seeds is below 5 standard errors: p < 1e-6 for equal means."""
    few = study(arms={}, steps=20, evaluations=1, model=partial(mlp, 0.5))
    runs = [Run(seed, "constant", 0.05) for seed in range(200)]
    stacked = train_stacked(few, runs)
    plain = [train(few, each) for each in runs]
    for values in (
        [a["train_loss"][0] - b["train_loss"][0] for a, b in zip(stacked, plain, strict=True)],
        [
            a["test"]["live"]["last"]["loss"] - b["test"]["live"]["last"]["loss"]
            for a, b in zip(stacked, plain, strict=True)
        ],
    ):
        difference = torch.tensor(values, dtype=torch.float64)
        assert difference.std() > 1e-3
        assert abs(difference.mean()) < 5 * difference.std() / len(values) ** 0.5


def test_dropout_masks_differ_between_runs() -> None:
    one = Run(0, "constant", 0.05)
    first, second = train_stacked(study(arms={}, evaluations=1), [one, one])
    assert first["train_loss"] != second["train_loss"]


def test_the_runner_stacks(tmp_path: Path) -> None:
    """torch warns of an operation that vmap computes one by one, and warnings are errors here."""
    one_by_one = Metric(lambda m, x, y: cross_entropy(m, x, y) + 0 * torch.histc(m(x)).max())
    small = study(steps=8, evaluations=2, stacked=3, metrics={"loss": one_by_one})
    result = run(small, tmp_path, jobs=1)
    assert [(r["seed"], r["schedule"]) for r in result.records] == [
        (0, "constant"), (0, "cosine"), (1, "constant"), (1, "cosine"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="stacked: True there, False now"):
        run(replace(small, stacked=0), tmp_path, jobs=1)


@pytest.mark.slow
def test_a_stack_is_the_same_however_it_was_interrupted(tmp_path: Path) -> None:
    """Its runs have dropout, whose masks are drawn for the whole stack."""
    small = study(steps=8, evaluations=2, stacked=3, seeds=3, arms={})
    whole = run(small, tmp_path / "whole", jobs=1)
    lines = (tmp_path / "whole" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "results.jsonl").write_text("".join([lines[4], lines[0]]))
    again = run(small, tmp_path / "torn", jobs=2)
    for one, two in zip(whole.records, again.records, strict=True):
        assert one["train_loss"] == two["train_loss"] and one["curves"] == two["curves"]
    assert len((tmp_path / "torn" / "results.jsonl").read_text().splitlines()) == 6


def test_a_run_that_fails_in_a_stack_is_told_alone(tmp_path: Path) -> None:
    """Only seed 2 has fewer rows; in a stack its error ends all, so they run one by one."""

    def sized(seed: int) -> Data:
        data = images(seed)
        short = (data.test[0][:5], data.test[1][:5])
        return Data(data.train, data.validation, short) if seed == 11 else data

    small = study(steps=4, evaluations=1, data=sized, schedules={"constant": constant}, seeds=4)
    few = Metric(_many_rows)
    result = run(replace(small, stacked=3, metrics={"loss": few}), tmp_path, jobs=1)
    assert [r["seed"] for r in result.records] == [0, 1, 3]
    assert "ValueError: only 5 rows" in result.failures[0]["failed"]


def _many_rows(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if len(x) < 10:
        raise ValueError(f"only {len(x)} rows")
    return cross_entropy(model, x, y)


class Norm(torch.optim.SGD):
    """A step of fixed length: it is not elementwise."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad /= parameter.grad.norm()
        return super().step(closure)


def first_faster(first: Any, *others: Any, lr: float) -> torch.optim.Optimizer:
    """The first parameter has another learning rate."""
    groups: list[dict[str, Any]] = [{"params": [first], "lr": 10 * lr}, {"params": others}]
    return torch.optim.SGD(groups, lr)


NOT_STACKABLE: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": lambda p, lr: Norm(p, lr)}, "not proportional to the learning rate, or not elem"),
    ({"optimizer": lambda p, lr: torch.optim.SGD(p, lr**2)}, "not proportional to the learning rate"),
    ({"optimizer": torch.optim.Rprop}, "not proportional to the learning rate"),
    ({"optimizer": lambda p, lr: first_faster(*p, lr=lr)}, "proportional to the learning rate, or not elementwise"),
    ({"arms": {"swa": Arm(Uniform(), recalibrate=True)}}, "swa recalibrates BatchNorm"),
    ({"metrics": {"loss": Metric(lambda m, x, y: cross_entropy(m, x, y).item())}}, "RuntimeError"),  # type: ignore[arg-type, return-value]
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), NOT_STACKABLE)
def test_what_cannot_be_stacked_is_told(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="the study cannot train runs at once") as refused:
        run(study(stacked=2, **changes), tmp_path / "out", jobs=1)
    assert message in str(refused.value) and "set stacked=0" in str(refused.value)
    assert not (tmp_path / "out").exists()
