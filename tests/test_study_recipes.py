"""The recipes that ship: their data are as stated, and they hold to the form of a recipe."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch
from torch import Tensor

from polyak.study import Data, Study
from polyak.study._rehearsal import rehearse
from polyak.study.recipes._characters import windows
from polyak.study.recipes._digits import digits

HOME = import_module("polyak.study.recipes").__path__
NAMES = sorted(m.name for m in iter_modules(HOME) if not m.name.startswith("_"))
ABOUT_DATA = {  # name: shapes of a row, classes
    "char_transformer": ([(33,)], None),
    "diffusion_2d": ([(2,), (2,), (1,)], None),
    "digits_cnn": ([(1, 8, 8), ()], 10),
    "digits_cnn_noisy": ([(1, 8, 8), ()], 10),
    "digits_mlp": ([(1, 8, 8), ()], 10),
    "digits_mlp_noisy": ([(1, 8, 8), ()], 10),
    "minilm": ([(16, 384), (16,), ()], 10),
    "noisy_quadratic": ([(100,)], None),
    "river_valley": ([()], None),
}
HEAVY = {"minilm"}  # its data take seconds


def study_of(name: str) -> Study:
    study: Study = import_module(f"polyak.study.recipes.{name}").study
    return study


def parts(data: Data) -> list[tuple[Tensor, ...]]:
    return [data.train, data.validation, data.test]


def test_every_recipe_is_described_here() -> None:
    wanted = "ABOUT_DATA, in this file, has one line for each recipe"
    assert set(NAMES) - {"article"} == set(ABOUT_DATA), wanted
    told = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"one of {len(ABOUT_DATA)} tasks" in told, "README.md counts them"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_one_screen(name: str) -> None:
    file = Path(str(import_module(f"polyak.study.recipes.{name}").__file__))
    assert len(file.read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", ABOUT_DATA)
def test_a_recipe_has_both_forms_sources_and_claims_that_can_be_read(name: str) -> None:
    study, quick = study_of(name), study_of(name).quickly()
    assert study.name == name
    assert study.title and study.source
    assert study.seeds >= 16 and 3 <= quick.seeds <= 4
    assert quick.steps < study.steps
    assert all(claim.sentence.endswith(".") for claim in study.claims)
    for form in (study, quick):
        rehearse(form)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in HEAVY)) for n in ABOUT_DATA]
)
def test_data_are_as_stated_and_belong_to_their_seed(name: str) -> None:
    shapes, classes = ABOUT_DATA[name]
    study = study_of(name)
    data, again, other = study.data(0), study.data(0), study.data(1)
    assert [tuple(tensor.shape[1:]) for tensor in data.train] == shapes
    for ours, same in zip(parts(data), parts(again), strict=True):
        assert all(map(torch.equal, ours, same))
    assert not all(map(torch.equal, data.train, other.train))
    if classes:
        for part in parts(data):
            assert set(part[-1].tolist()) <= set(range(classes))
        assert set(data.train[-1].tolist()) == set(range(classes))


def test_digits_are_split_without_loss_and_without_repetition() -> None:
    from sklearn.datasets import load_digits

    data, truth = digits(3), load_digits()
    assert [len(part[0]) for part in parts(data)] == [1000, 397, 400]
    images = (torch.cat([part[0] for part in parts(data)]).flatten(1) * 16).round().long()
    labels = torch.cat([part[1] for part in parts(data)])
    found = torch.cat([images, labels[:, None]], 1).tolist()
    wanted = [[*map(int, image), int(y)] for image, y in zip(truth.data, truth.target, strict=True)]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("noise", [0.4, 0.125])
def test_exactly_the_stated_share_of_training_labels_is_wrong(noise: float) -> None:
    clean, noisy = digits(5), digits(5, noise=noise)
    assert torch.equal(clean.train[0], noisy.train[0])
    wrong = clean.train[1] != noisy.train[1]
    assert int(wrong.sum()) == round(1000 * noise)
    offsets = (noisy.train[1] - clean.train[1])[wrong] % 10
    assert set(offsets.tolist()) == set(range(1, 10))  # every other label is drawn
    for ours, theirs in zip(parts(clean)[1:], parts(noisy)[1:], strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_characters_are_the_language_reference_with_each_article_once() -> None:
    from pydoc_data.topics import topics

    text = bytes(windows(33).flatten().tolist()).decode("ascii")
    articles = sorted({t.encode("ascii", "replace").decode() for t in topics.values()})
    whole = "\n".join(articles)
    assert text == whole[: len(text)] and len(whole) - len(text) < 33
    assert len(text) > 300_000


def test_rows_of_text_are_split_without_repetition() -> None:
    data = study_of("char_transformer").data(0)
    together = torch.cat([part[0] for part in parts(data)]).tolist()
    assert sorted(together) == sorted(windows(33).tolist())


def test_the_transformer_sees_no_later_character() -> None:
    torch.manual_seed(0)
    model = study_of("char_transformer").model().eval()
    rows = torch.randint(128, (3, 32))
    changed = rows.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 128
    before, after = model(rows), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amin(2).mean() > 0
    assert before.shape == (3, 32, 128)
