"""The house stays readable: short modules, functions that fit a screen, plain docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import polyak

SOURCE = Path(polyak.__file__).parent
MODULE, FUNCTION = 300, 40
"""The most lines of a module, and of code in a function: without signature, docstring and comments."""

# A name may leave these lists, and none may join: split by idea, or find what can go.
LARGE_MODULES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()

Function = ast.FunctionDef | ast.AsyncFunctionDef


def code_lines(function: Function, lines: list[str]) -> int:
    """The lines of a function's body that are code."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    shown = (line.strip() for line in lines[body[0].lineno - 1 : function.end_lineno])
    return sum(bool(line) and not line.startswith("#") for line in shown)


def functions() -> Iterator[tuple[str, int]]:
    """Every function as module:name, with its lines of code."""
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function):
                name = f"{path.relative_to(SOURCE).as_posix()}:{node.name}"
                yield name, code_lines(node, text.splitlines())


def test_no_module_is_too_long_but_those_in_the_list() -> None:
    lengths = {
        path.relative_to(SOURCE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCE.rglob("*.py")
    }
    assert {name for name, length in lengths.items() if length > MODULE} == LARGE_MODULES


def test_no_function_is_too_long_but_those_in_the_list() -> None:
    assert {name for name, length in functions() if length > FUNCTION} == LONG_FUNCTIONS


def test_code_is_counted_without_signature_docstring_and_comments() -> None:
    text = 'def f(\n    a,\n):\n    """Words.\n\n    More.\n    """\n    # Why.\n\n    b = a\n    return b\n'
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    assert code_lines(function, text.splitlines()) == 2


def test_a_docstring_begins_with_a_verb_or_a_noun() -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    asking = [
        f"{path.relative_to(SOURCE).as_posix()}: {text.splitlines()[0]}"
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, documented) and (text := ast.get_docstring(node) or "")
        if text.split(maxsplit=1)[0] == "What"
    ]
    assert not asking
