"""The public names: complete, importable, documented."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import polyak

NAMES = {
    "ArticleEMA", "Averager", "Bema", "EMA", "Exponential", "Power", "Pull", "Recorder", "Rule", "Tail",
    "Uniform", "Window", "checkpoints", "decays", "load", "offline", "parse", "recalibrate", "save",
    "sweep", "synthesize", "theory",
}  # fmt: skip
THEORY = {
    "profile", "half_life", "mean_age", "effective_window", "noise_gain", "relative_std",
    "frequency_response", "cutoff", "learning_rate_profile", "explain", "match", "equivalents",
    "fit", "wsm", "qam", "learning_rate_decay", "learning_rates", "quadratic_moments", "feedback",
}  # fmt: skip

MODULES = {
    "polyak", "polyak.__main__", "polyak.averager", "polyak.charts", "polyak.checkpoints",
    "polyak.cli", "polyak.decays", "polyak.ema", "polyak.integrations",
    "polyak.integrations.accelerate", "polyak.integrations.fabric", "polyak.integrations.ignite",
    "polyak.integrations.lightning", "polyak.integrations.transformers", "polyak.norms", "polyak.offline", "polyak.rules",
    "polyak.snapshots", "polyak.specs", "polyak.study", "polyak.theory",
}  # fmt: skip


def public_modules() -> set[str]:
    """Every module of the package whose dotted name has no part that begins with an underscore."""
    home = Path(polyak.__file__).parent
    names = {
        ".".join(("polyak", *path.relative_to(home).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for path in home.rglob("*.py")
    }
    recipes = {n for n in names if n.startswith("polyak.study.recipes")}  # found by name, as data
    return {n for n in names - recipes if n == "polyak.__main__" or "._" not in n}


def test_the_public_modules_are_these() -> None:
    assert public_modules() == MODULES


@pytest.mark.parametrize("module", sorted(MODULES - {"polyak.__main__"}))
def test_every_public_module_says_what_is_public(module: str) -> None:
    home = importlib.import_module(module)
    assert home.__all__ and all(hasattr(home, name) for name in home.__all__)


def test_the_public_list_is_complete() -> None:
    assert set(polyak.__all__) == NAMES
    assert set(dir(polyak)) == NAMES | {"__version__"}
    assert set(polyak.theory.__all__) >= THEORY


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_there_and_documented(name: str) -> None:
    assert inspect.getdoc(getattr(polyak, name))


@pytest.mark.parametrize("module", sorted(MODULES - {"polyak.__main__", "polyak.cli"}))
def test_every_public_function_says_what_it_does_in_the_imperative(module: str) -> None:
    home = importlib.import_module(module)
    for name in home.__all__:
        value = getattr(home, name)
        if inspect.isclass(value):
            assert inspect.getdoc(value), name
        if inspect.isfunction(value) and value.__module__.startswith("polyak"):
            first, _, _ = (inspect.getdoc(value) or "").partition(" ")
            assert first.isalpha() and first.istitle(), name
            assert first not in {"The", "A", "An", "What", "How", "Which", "Where", "Every"}, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'polyak' has no attribute 'Averagr'"):
        _ = polyak.Averagr


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert polyak.__version__ == version("polyak")
