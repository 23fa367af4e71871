"""What every integration keeps: one file, one framework, words for a framework that is missing."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from polyak import integrations
from test_layers import frameworks

HOME = Path(integrations.__file__).parent
ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in HOME.glob("[!_]*.py"))


def test_every_integration_is_named_and_has_an_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = "the name stands in __all__ of polyak.integrations, and is an extra in pyproject.toml"
    assert set(integrations.__all__) == set(NAMES), wanted
    assert set(NAMES) <= set(extras["optional-dependencies"]), wanted
    of = {name: set(lines) for name, lines in extras["optional-dependencies"].items()}
    within = next(line for line in of["peers"] if line.startswith("polyak["))
    tested = of["peers"].union(*(of[name] for name in within[7:-1].split(",")))
    assert all(of[name] <= tested for name in NAMES), "`peers` has its extra, or the same packages"
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    untold = [name for name in NAMES if f"polyak.integrations.{name}" not in pages]
    assert not untold, "a page in docs/ shows how to use it"


@pytest.mark.parametrize("name", NAMES)
def test_every_integration_keeps_the_contract(name: str) -> None:
    test = ROOT / "tests" / f"test_integration_{name}.py"
    wanted = f"{test.name} runs all of LAWS, as integration_contract.py says"
    assert test.exists() and 'parametrize("law", LAWS' in test.read_text(), wanted


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_framework_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = frameworks(HOME / f"{name}.py")[0]
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"polyak.integrations.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError) as caught:
        import_module(f"polyak.integrations.{name}")
    assert f'install polyak with its extra "{name}"' in str(caught.value)


@pytest.mark.parametrize("path", sorted(HOME.glob("*.py")), ids=lambda path: path.stem)
def test_integrations_are_short(path: Path) -> None:
    """Hooks need at most 150 lines of code; docstrings, comments and blank lines do not count."""
    tree = ast.parse(path.read_text())
    lines = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and not isinstance(getattr(node, "value", None), ast.Constant)
        for line in range(node.lineno, _own_end(node) + 1)
    }
    assert len(lines) <= 150


def test_no_filter_of_warnings_is_set_back_under_other_threads() -> None:
    """`catch_warnings` sets back what all threads share. A command has its process to itself."""
    home = HOME.parent
    callers = {p.relative_to(home).as_posix() for p in home.rglob("*.py") if _catches(p)}
    assert callers == {"cli/_process.py"}


def _catches(path: Path) -> bool:
    names = (
        getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(ast.parse(path.read_text()))
    )
    return "catch_warnings" in names


def _own_end(node: ast.stmt) -> int:
    """The last line of a statement without the statements inside it."""
    inside = [n.lineno for n in ast.walk(node) if isinstance(n, ast.stmt) and n is not node]
    return min(inside) - 1 if inside else node.end_lineno or node.lineno
