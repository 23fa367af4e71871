"""The article as a recipe is the plain script, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polyak.study import Study, recipes
from polyak.study._loop import Run, alone, train
from polyak.study.recipes._regression import data
from polyak.study.recipes.article import study
from study_cases import plain_article


def test_the_data_are_the_plain_script_s() -> None:
    train_x, valid_x, train_y, valid_y = plain_article().load_data()
    ours = data(0)
    wanted = ((train_x, train_y), (valid_x, valid_y), (valid_x, valid_y))
    for part, theirs in zip((ours.train, ours.validation, ours.test), wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, theirs, strict=True))


def short(epochs: int) -> Study:
    """The recipe for a few epochs."""
    return replace(study, steps=50 * epochs, evaluations=epochs)


@pytest.mark.parametrize(("epochs", "seed"), [(4, 0), pytest.param(500, 0, marks=pytest.mark.slow)])
def test_a_run_is_the_plain_script_s(epochs: int, seed: int) -> None:
    """4 epochs go past the end of the EMA's copies, at step 102; 500 go to the early stop."""
    with alone():
        order = torch.Generator().manual_seed(4 * seed + 1)
        outcome = plain_article().train(4 * seed, epochs, order, 4 * seed + 2)
    record = train(short(epochs), Run(seed, "plateau", 1e-3))
    history = outcome.history
    assert record["train_loss"] == history.train_loss
    assert record["curves"]["live"]["mse"] == history.val_loss_original
    assert record["curves"]["article_ema"]["mse"] == history.val_loss_ema
    assert record["stopped_early"] == (epochs == 500)
    for arm, theirs in (("live", outcome.live), ("article_ema", outcome.average)):
        ours = record["test"][arm]["last"]
        assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-4)


def test_the_recipe_ships() -> None:
    assert recipes()["article"] is study
