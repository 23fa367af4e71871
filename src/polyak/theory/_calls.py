"""Read the name and the arguments of a Python call from text, without running anything."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from polyak._checks import is_number, require

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Source:
    """An argument that is not a literal: only its text is known."""

    text: str


@dataclass(frozen=True)
class Call:
    """`name(*args, **kwargs)`; each argument is a number, a text, a list of them, a `Call` or a `Source`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def parse_call(text: str) -> Call:
    """The call that a text is; raises `ValueError` if it is not one call.

    >>> parse_call("EMA(model, beta=1 - 1/100)")
    Call(name='EMA', args=(Source(text='model'),), kwargs={'beta': 0.99})
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        node = None
    if not isinstance(node, ast.Call):
        raise ValueError(
            f'{text!r} is not a call, wanted for example "ema_pytorch.EMA(model, beta=0.995)"'
        )
    return _call(node)


def _call(node: ast.Call) -> Call:
    kwargs = {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg}
    if len(kwargs) < len(node.keywords) or any(isinstance(a, ast.Starred) for a in node.args):
        raise ValueError(f"{ast.unparse(node)}: write the arguments out, without * and **")
    return Call(ast.unparse(node.func), tuple(map(_value, node.args)), kwargs)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return _call(node)
    try:
        return _literal(node)
    except (ValueError, ArithmeticError):
        return Source(ast.unparse(node))


def _literal(node: ast.expr) -> Any:
    """A literal, or a sum, difference, product or quotient of numbers; else `ValueError`."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _literal(node.left), _literal(node.right)
        if isinstance(left, int | float) and isinstance(right, int | float):
            return _OPERATORS[type(node.op)](left, right)
    return ast.literal_eval(node)


def number(name: str, value: Any) -> float:
    """An argument that is a number, of the type that was written."""
    if isinstance(value, Source | Call):
        text = value.text if isinstance(value, Source) else f"{value.name}(...)"
        raise ValueError(f"{name} is {text}, wanted its value: write the number in its place")
    require(is_number(value), name, value, "a number")
    return float(value) if isinstance(value, float) else int(value)


def count(name: str, value: Any) -> int:
    """An argument that is an integer, 0 at least."""
    counted = number(name, value)
    require(counted == int(counted) and counted >= 0, name, value, "an integer >= 0")
    return int(counted)
