"""Lines that train: the claims of recipes, each run in its small form over a few seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from polyak._checks import is_integer, require
from polyak.study._claims import Claim
from polyak.study._judging import interval, over_seeds
from polyak.study._recipes import opened_recipe
from polyak.study._reproduce import Line
from polyak.study._result import Result
from polyak.study._run import run
from polyak.study._statistics import Interval

NAMES = ("digits_mlp", "digits_mlp_noisy", "diffusion_2d")
_SEEDS = 8  # with fewer, no claim is decided


def lines(folder: Path, *, jobs: int = -1, names: tuple[str, ...] = NAMES) -> list[Line]:
    """The claims of the recipes; their runs are stored below a folder, and resumed from there.

    Raises `ValueError` for a number of processes that is not one.
    """
    require(is_integer(jobs, 1) or jobs == -1, "jobs", jobs, "a number of processes, or -1")
    found = []
    for name in names:
        with opened_recipe(name) as recipe:
            study = recipe.quickly()
        result = cache(partial(run, study, folder / study.name, seeds=_SEEDS, jobs=jobs))
        for claim in study.claims:
            topic, source = f"{study.title}; {study.steps} steps", claim.source
            measure = _quantity(result, claim)
            found.append(Line.claim(topic, claim.sentence, source, claim.region, measure))
    return found


def _quantity(result: Callable[[], Result], claim: Claim) -> Callable[[], Interval]:
    return lambda: interval(over_seeds(claim.sentence, claim.quantity, result().seeds))
