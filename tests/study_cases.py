"""The article's plain script, and its recipe cut to a few epochs, for the tests of the study."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from polyak.study import Study
from polyak.study._record_format import RecordFormat
from polyak.study.recipes import article

FORM = RecordFormat(dict, dict)  # of a file to which no record is added


def short(epochs: int) -> Study:
    """The article's recipe for a few epochs."""
    return replace(article.study, steps=50 * epochs, evaluations=epochs)


@lru_cache
def plain_article() -> ModuleType:
    """The plain script, which is no part of any package."""
    path = Path(__file__).parents[1] / "benchmarks" / "plain_article.py"
    specification = importlib.util.spec_from_file_location("plain_article", path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules["plain_article"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module
