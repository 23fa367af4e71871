"""The studies that ship, and those in a user's file."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from polyak.study import recipes as package
from polyak.study._errors import is_recipes, said
from polyak.study._study import Study


def recipes() -> dict[str, Study]:
    """Return the studies that polyak contains, by name."""
    return {name: _study_of(_shipped(name), name) for name in names()}


def names() -> list[str]:
    """The names of the studies that ship."""
    modules = pkgutil.iter_modules(package.__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


@contextmanager
def opened_recipe(name_or_file: str) -> Iterator[Study]:
    """The study of a name, or of a Python file that has a module-level `study = Study(...)`.

    Inside the block, the file's folder is on the search path, so that it can import its neighbours.

    Raises `ValueError` for an unknown name, a file without a study, and a file that does not run; the
    cause has its own traceback. Raises `FileNotFoundError` for a file that does not exist.
    """
    if not name_or_file.endswith(".py"):
        name = name_or_file.replace("-", "_")
        if name not in names():
            wanted = f"{', '.join(names())}, or a file that ends in .py"
            raise ValueError(f"there is no study {name_or_file!r}, wanted {wanted}")
        yield _study_of(_shipped(name), name)
        return
    path = Path(name_or_file).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {name_or_file}")
    with _on_search_path(path.parent):
        module = _executed(path)
        try:
            yield _study_of(module, name_or_file)
        finally:
            cloudpickle.unregister_pickle_by_value(module)
            del sys.modules[module.__name__]


def _shipped(name: str) -> ModuleType:
    return importlib.import_module(f"{package.__name__}.{name}")


def _executed(path: Path) -> ModuleType:
    """The module of a file. Other processes get its functions by value: they cannot import it."""
    specification = importlib.util.spec_from_file_location(f"{path.stem}_recipe", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        specification.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module.__name__]
        if is_recipes(error):
            raise ValueError(f"{path.name} does not run: {_said(error, path)}") from error
        raise
    cloudpickle.register_pickle_by_value(module)
    return module


def _said(error: BaseException, path: Path) -> str:
    """An error in one line, with the line of the file in which it happened."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return said(error) + (f" (line {frames[-1].lineno})" if frames else "")


def _study_of(module: Any, name: str) -> Study:
    study = getattr(module, "study", None)
    if not isinstance(study, Study):
        got = "no `study`" if study is None else f"`study`, a {type(study).__name__}"
        raise ValueError(f"{name} has {got}, wanted a module-level study = Study(...)")
    return study


@contextmanager
def _on_search_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
