"""Describe in one line what a function of a recipe raised."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch


def is_recipes(error: BaseException) -> bool:
    """Whether an error is the recipe's own: its sys.exit() too, but not what ends this process, such as Ctrl-C."""
    return isinstance(error, Exception) or type(error) is SystemExit


def said(error: BaseException) -> str:
    """An error's type and message."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def placed(error: BaseException) -> str:
    """An error's type and message, with the last line of the recipe that it went through."""
    outside = [f for f in traceback.extract_tb(error.__traceback__) if not _is_inside(f.filename)]
    own = [f for f in outside if f.filename == outside[0].filename]
    return said(error) + (f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else "")


def _is_inside(file: str) -> bool:
    """Whether a file belongs to what runs recipes: polyak without the recipes that ship, or torch."""
    path, study = Path(file), Path(__file__).parent
    ours = study.parent in path.parents and study / "recipes" not in path.parents
    return ours or Path(torch.__file__).parent in path.parents
