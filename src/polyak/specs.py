"""Specs: rules as text, for the command line, for files and for logs.

A spec is a call with numbers: `exponential(0.999)`, `exponential(half_life=5000)`,
`tail(uniform(), start=100)`, `exponential(inverse_power(power=2/3))`. The names are those of the
classes in `rules` and `decays`, in snake case; the arguments are those of the classes. A rule or
schedule of your own has a name as soon as its class is defined.

>>> parse("exponential(half_life=5000)")
Exponential(half_life=5000)
>>> print(parse("power(relative_std=1/10)"))
power(relative_std=0.1)
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping

from polyak._spelling import KNOWN
from polyak.decays import SCHEDULES, Schedule
from polyak.rules import RULES, Rule

__all__ = [
    "ONLY", "as_rule", "as_specs", "class_of", "named_rules", "own_classes", "parse", "path_of",
    "savable_rule",
]  # fmt: skip

ONLY = "average"
"""The name of the average if there is only one."""

_LONGEST = 1000
_CLASSES: dict[str, type] = {cls.spec_name(): cls for cls in (*RULES, *SCHEDULES)}


def parse(spec: str) -> Rule:
    """Return the rule that a spec describes; `str(rule)` parses back to the same rule.

    >>> print(parse("tail(exponential(0.999, debias=True), start=1000)"))
    tail(exponential(0.999, debias=True), 1000)

    Only numbers, their quotients and calls of the known names are evaluated. Raises `ValueError`
    for text that is not a spec, an unknown name or option, a value out of range; `TypeError` for a
    value that is not text.
    """
    if not isinstance(spec, str):
        raise TypeError(f'a spec is {spec!r}, wanted text such as "exponential(0.999)"')
    if len(spec) > _LONGEST:
        raise ValueError(f"a spec of {len(spec)} characters, wanted at most {_LONGEST}")
    try:
        rule = _build(ast.parse(spec.strip(), mode="eval").body, spec)
    except SyntaxError as error:
        raise ValueError(f"spec {spec!r} does not read as name(arguments): {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"spec {spec!r} is nested too deep") from None
    if not isinstance(rule, Rule):
        raise ValueError(f"spec {spec!r} is {rule!r}, wanted a rule; {_known()}")
    return rule


def _build(node: ast.expr, spec: str) -> object:
    """The value of a node: a number, a flag, a rule or a schedule."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, spec)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _quotient(_number(left, spec), _number(right, spec), spec)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            options = _named([(k.arg, _build(k.value, spec)) for k in keywords], spec)
            return _construct(name, [_build(a, spec) for a in args], options, spec)
    raise ValueError(
        f"{ast.unparse(node)!r} in spec {spec!r} is not a number or a call; {_known()}"
    )


def _named(options: list[tuple[str | None, object]], spec: str) -> dict[str, object]:
    """The options by name; raises `ValueError` for one given twice, or unpacked by `**`."""
    names = [name for name, _ in options]
    for name in names:
        if name is None or names.count(name) > 1:
            problem = "unpacks options by **" if name is None else f"gives {name} twice"
            raise ValueError(f"spec {spec!r} {problem}; wanted each option once, by name")
    return {str(name): value for name, value in options}


def _number(node: ast.expr, spec: str) -> float:
    value = _build(node, spec)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{ast.unparse(node)!r} in spec {spec!r} is not a number")
    return value


def _quotient(above: float, below: float, spec: str) -> float:
    try:
        return above / below
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{above}/{below} in spec {spec!r}: {error}") from None


def _construct(name: str, args: list[object], options: dict[str, object], spec: str) -> object:
    """Call the class of a name."""
    made = class_of(name)
    if made is None:
        raise ValueError(f"{name!r} in spec {spec!r} is unknown; {_known()}")
    signature = inspect.signature(made)
    try:
        bound = signature.bind(*args, **options)
    except TypeError as error:
        takes = f"it takes ({', '.join(signature.parameters)})"
        raise ValueError(f"{name} in spec {spec!r}: {error}; {takes}") from None
    return made(*bound.args, **bound.kwargs)


def class_of(name: str) -> type | None:
    """Return the class that a name in a spec means, or None."""
    return _CLASSES.get(name) or KNOWN.get(name)


def own_classes(spec: str) -> dict[str, str]:
    """Return name -> module and name of each class in a spec that is not one of polyak's."""
    names = {node.func.id for node in ast.walk(ast.parse(spec)) if _is_call(node)}  # type: ignore[attr-defined]
    return {name: path_of(class_of(name)) for name in sorted(names - _CLASSES.keys())}


def path_of(known: type | None) -> str:
    """Return the module and the name of a class; an empty text for None."""
    return "" if known is None else f"{known.__module__}.{known.__qualname__}"


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def _known() -> str:
    rules = ", ".join(cls.spec_name() for cls in RULES)
    schedules = ", ".join(cls.spec_name() for cls in SCHEDULES)
    return f"rules: {rules}; schedules for exponential: {schedules}"


def as_specs(rules: Mapping[str, Rule | None]) -> dict[str, str]:
    """Return name -> spec of the rules, to compare or store them."""
    return {name: str(rule) for name, rule in rules.items()}


def as_rule(rule: Rule | str) -> Rule:
    """Return a rule unchanged, or parse a spec; anything else raises `TypeError`."""
    if isinstance(rule, str):
        return parse(rule)
    if not isinstance(rule, Rule):
        hint = "Exponential(0.999)"
        if isinstance(rule, (Schedule, float)):
            hint = f"Exponential({rule})"
        raise TypeError(f"a rule is {rule!r}, wanted a polyak rule such as {hint}, or its spec")
    return rule


def savable_rule(rule: Rule | str) -> Rule:
    """Return a rule, or parse a spec; raise `ValueError` unless its text reads as the rule.

    A file holds the text, so such a rule would fail at the first save. A rule with `SAVABLE =
    False` is returned unchecked.
    """
    made = as_rule(rule)
    try:
        if not made.savable() or (again := parse(str(made))) == made:
            return made
        problem = f"its text {str(made)!r} reads as {again!r}"
    except (ValueError, TypeError) as error:
        problem = str(error)
    raise ValueError(
        f"{type(made).__name__} cannot be saved, so the first save would fail: {problem}. Make "
        "it a frozen dataclass of numbers, rules and schedules at the top of a module; or write SAVABLE "
        "= False in the class, if it is never saved"
    )


def named_rules(rule: Rule | str | Mapping[str, Rule | str]) -> dict[str, Rule]:
    """Return name -> rule that can be saved; a single rule is called "average"."""
    if not isinstance(rule, Mapping):
        return {ONLY: savable_rule(rule)}
    if not rule:
        raise ValueError("rule is an empty mapping, wanted at least one name -> rule")
    for name in rule:
        if not isinstance(name, str) or not name:
            raise TypeError(f"an average's name is {name!r}, wanted a string that is not empty")
        if "/" in name:
            raise ValueError(f"an average's name is {name!r}, wanted one without a slash")
    return {name: savable_rule(each) for name, each in rule.items()}
