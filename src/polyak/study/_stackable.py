"""Find out by trying whether the runs of a study can be trained at once."""

from __future__ import annotations

from dataclasses import replace

import torch

from polyak.study._errors import said
from polyak.study._flat import Flat
from polyak.study._loop import Run, alone
from polyak.study._stacked import move_, stack, train_stacked, trained_in
from polyak.study._study import Arm, Study

TRIED_STEPS = 30
DRIFT = 3.0  # of the gradients, in deviations: some optimizers let a step grow up to a bound


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
    """Compare the steps of one optimizer of two stacked models, joined as in a stack, with those of two optimizers."""
    torch.manual_seed(0)
    models = [study.model().double() for _ in range(2)]
    rates = torch.tensor([1.0, 0.25], dtype=torch.float64) * study.learning_rates[0]
    alone_ = [study.optimizer(m.parameters(), float(r)) for m, r in zip(models, rates, strict=True)]
    weights, trained = stack(models), trained_in(models[0])
    together = Flat({name: weights[name] for name in trained}, batch=1)
    gradients, joined = Flat(together.views, batch=1), list(together.tensors.values())
    optimizer = study.optimizer(joined, 1.0)
    for _ in range(TRIED_STEPS):
        for parameter, gradient in zip(joined, gradients.tensors.values(), strict=True):
            parameter.grad = gradient.normal_(DRIFT)
        for number, model in enumerate(models):
            for name in trained:
                model.get_parameter(name).grad = gradients.views[name][number].clone()
        move_(optimizer, joined, rates)
        for each in alone_:
            each.step()
    for name, several in together.views.items():
        single = torch.stack([model.get_parameter(name).detach() for model in models])
        few = torch.finfo(single.dtype).eps ** 0.5  # complex numbers stay in single precision
        if not torch.allclose(several, single, rtol=few, atol=few):
            raise ValueError(
                "a step of its optimizer is not proportional to the learning rate, or not elementwise"
            )
