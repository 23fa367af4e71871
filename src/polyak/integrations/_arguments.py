"""The arguments of the callbacks for two trainers, checked before a training begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from polyak._checks import require_count
from polyak.averager import Averager
from polyak.rules import Rule
from polyak.specs import named_rules


def checked(
    rule: Rule | str | Mapping[str, Rule | str], start: Any, options: Mapping[str, Any]
) -> tuple[dict[str, Rule], int]:
    """Return name -> rule, and the start; raises what `Averager` would raise when a training begins."""
    inspect.signature(Averager).bind(None, rule, **options)
    require_count("every", options.get("every", 1), "optimizer steps per update")
    steps = require_count("start", start, "optimizer steps before the first update", least=0)
    return named_rules(rule), steps
