"""Every recipe, cut to seconds, runs through the study's runner; its loss runs over stacked models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyak.rules import Exponential
from polyak.study import Data, Study, recipes, run

NAMES = sorted(set(recipes()) - {"article"})
NOT_STACKED = {"minilm"}  # transformers' own layers


def few_rows(study: Study) -> Callable[[int], Data]:
    def cut(split: int) -> Data:
        data = study.data(split)
        parts = (data.train, data.validation, data.test)
        return Data(*(tuple(tensor[:16] for tensor in part) for part in parts))

    return cut


def shorter(name: str, arm: Any) -> Any:
    """An arm that 20 steps are enough for."""
    faster = {"rule": Exponential(0.5)} if name.startswith("ema") else {}
    return replace(arm, every=1, **faster)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_quick_form_runs_and_every_claim_has_its_numbers(name: str, tmp_path: Path) -> None:
    quick = recipes()[name].quickly()
    rates = quick.learning_rates[:1]
    small: dict[str, Any] = {"batch_size": min(quick.batch_size, 16), "data": few_rows(quick)}
    small["arms"] = {name: shorter(name, arm) for name, arm in quick.arms.items()}
    cut = replace(quick, steps=20, evaluations=4, learning_rates=rates, **small)
    result = run(cut, tmp_path, seeds=1, jobs=1)
    assert not result.failures
    assert len(result.records) == len(cut.schedules)
    for seed in result.seeds:
        for arm in cut.arm_names:
            for metric in cut.metrics:
                for schedule in cut.schedules:
                    value = seed.value(arm, metric, schedule)
                    assert math.isfinite(value), f"{arm}, {metric}, {schedule}"
        assert all(math.isfinite(claim.quantity(seed)) for claim in cut.claims)


class Losing(nn.Module):
    """The loss as a module's output, so that its parameters can be replaced by stacked ones."""

    def __init__(self, study: Study) -> None:
        super().__init__()
        self.model, self.study = study.model().train(), study

    def forward(self, *batch: Tensor) -> Tensor:
        return self.study.loss(self.model, *batch)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NOT_STACKED])
def test_losses_and_gradients_of_stacked_models_are_those_of_each(name: str) -> None:
    study = recipes()[name]
    batches = [tuple(t[:4] for t in study.data(seed).train) for seed in range(2)]
    alone: list[Any] = []
    for _ in batches:
        torch.manual_seed(len(alone))
        alone.append(Losing(study).double())
    doubled = [tuple(t.double() if t.is_floating_point() else t for t in b) for b in batches]
    parameters, buffers = torch.func.stack_module_state(alone)
    stacked = [torch.stack(tensors) for tensors in zip(*doubled, strict=True)]

    def loss(parameters: Any, buffers: Any, batch: Any) -> Any:
        return torch.func.functional_call(alone[0], (parameters, buffers), batch)

    vmapped = torch.func.vmap(torch.func.grad_and_value(loss))
    gradients, losses = vmapped(dict(parameters), dict(buffers), tuple(stacked))
    for index, (model, batch) in enumerate(zip(alone, doubled, strict=True)):
        value = model(*batch)
        value.backward()
        torch.testing.assert_close(losses[index], value.detach(), rtol=1e-9, atol=1e-12)
        for key, parameter in model.named_parameters():
            got = gradients[key][index]
            torch.testing.assert_close(got, parameter.grad, rtol=1e-7, atol=1e-10)
