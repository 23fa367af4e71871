"""Find out by trying whether the runs of a study can be trained at once."""

from __future__ import annotations

from dataclasses import replace

import torch

from polyak.study._errors import said
from polyak.study._loop import Run, alone
from polyak.study._stacked import move_, train_stacked
from polyak.study._study import Arm, Study

TRIED_STEPS = 3


def require_stackable(study: Study) -> None:
    """Raise `ValueError` with the reason if the runs of a study cannot be trained at once.

    vmap must run the model, the loss and every metric. A step of the optimizer must treat every number
    alone and be proportional to the learning rate, as SGD, Adam and AdamW are. No arm is recalibrated.
    """
    recalibrated = [n for n, a in study.arms.items() if isinstance(a, Arm) and a.recalibrate]
    try:
        if recalibrated:
            raise ValueError(f"{', '.join(recalibrated)} recalibrates BatchNorm")
        with alone():
            _require_proportional(study)
        tiny = replace(study, steps=2, evaluations=1, quick={})
        run = Run(0, next(iter(study.schedules)), study.learning_rates[0])
        train_stacked(tiny, [run, run._replace(seed=1)])
    except Exception as error:
        raise ValueError(
            f"the study cannot train runs at once ({said(error)}); set stacked=0"
        ) from error


def _require_proportional(study: Study) -> None:
    """Compare the steps of one optimizer of two stacked models with those of two optimizers."""
    torch.manual_seed(0)
    models = [study.model().double() for _ in range(2)]
    rates = torch.tensor([1.0, 0.25], dtype=torch.float64) * study.learning_rates[0]
    alone_ = [study.optimizer(m.parameters(), float(r)) for m, r in zip(models, rates, strict=True)]
    pairs = list(zip(*(model.parameters() for model in models), strict=True))
    together = [torch.stack([p.detach().flatten() for p in pair]) for pair in pairs]
    optimizer = study.optimizer(together, 1.0)
    for _ in range(TRIED_STEPS):
        for parameter, pair in zip(together, pairs, strict=True):
            parameter.grad = torch.randn_like(parameter)
            for number, single in enumerate(pair):
                single.grad = parameter.grad[number].view_as(single).clone()
        move_(optimizer, together, rates)
        for each in alone_:
            each.step()
    for parameter, pair in zip(together, pairs, strict=True):
        if not torch.allclose(
            parameter, torch.stack([p.flatten() for p in pair]), rtol=1e-8, atol=1e-8
        ):
            raise ValueError(
                "a step of its optimizer is not proportional to the learning rate, or not elementwise"
            )
