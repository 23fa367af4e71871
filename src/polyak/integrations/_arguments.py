"""The arguments of the callbacks for two trainers, checked before a training begins."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from polyak._checks import require_count
from polyak._engine.pulling import require_pull
from polyak.averager import Averager
from polyak.rules import Rule
from polyak.specs import named_rules

LONGEST = 60
"""Characters in the part of a file's name that averages give it."""
_UNFIT = re.compile(
    r'[\\:*?"<>|\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE
)


def checked(
    rule: Rule | str | Mapping[str, Rule | str], start: Any, options: Mapping[str, Any]
) -> tuple[dict[str, Rule], int]:
    """Return name -> rule, and the start; raises what `Averager` would raise when a training begins."""
    inspect.signature(Averager).bind(None, rule, **options)
    require_count("every", options.get("every", 1), "optimizer steps per update")
    steps = require_count("start", start, "optimizer steps before the first update", least=0)
    rules = named_rules(rule)
    require_file_names(list(rules))
    require_pull(options.get("pull"), rules)
    return rules, steps


def require_kind(call: str, what: str, got: object, kind: type) -> None:
    """Raise `TypeError` unless an argument is of the wanted kind, such as an `Averager`."""
    if not isinstance(got, kind):
        found, wanted = (
            f"{each.__module__.partition('.')[0]}.{each.__name__}" for each in (type(got), kind)
        )
        raise TypeError(f"{call}: {what} is of type {found}, wanted {wanted}")


def is_named(found: object, *kinds: str) -> bool:
    """Whether the class of an object, or a base of it, has one of these names.

    The packages `lightning` and `pytorch_lightning` have the same classes twice.
    """
    return any(base.__name__ in kinds for base in type(found).__mro__)


def require_file_names(names: list[str]) -> None:
    """Raise `ValueError` unless files on every system can have these names, as checkpoints give them."""
    for name in names:
        if _UNFIT.search(name) or len(name) > LONGEST:
            raise ValueError(
                f"an average's name is {name!r}, and files get that name: wanted one of at most "
                f"{LONGEST} characters, without "
                'control characters and \\ : * ? " < > |, with no dot or space at its end, and not a name '
                "that Windows reserves, such as con"
            )
    if len({name.casefold() for name in names}) < len(names):
        raise ValueError(
            f"the averages are {', '.join(names)}, and files get these names: wanted names that differ "
            "by more than upper and lower case"
        )
