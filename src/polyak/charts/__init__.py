"""Charts: one altair definition each, written as PNG, SVG and a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import altair as alt

from polyak.charts._files import save
from polyak.charts._results import advice_chart, fit_chart, synthesis_chart
from polyak.charts._rules import description_chart, rule_chart
from polyak.charts._sweeps import sweep_chart

__all__ = [
    "advice_chart", "chart_of", "description_chart", "fit_chart", "rule_chart", "save", "sweep_chart",
    "synthesis_chart",
]  # fmt: skip

_CHARTS: dict[str, Callable[[Any], alt.TopLevelMixin]] = {
    "Explanation": rule_chart,
    "Advice": advice_chart,
    "Sweep": sweep_chart,
    "Fit": fit_chart,
    "Synthesis": synthesis_chart,
    "Description": description_chart,
}


def chart_of(result: object) -> alt.TopLevelMixin:
    """Draw a result of `theory` or `offline`, without importing these."""
    return _CHARTS[type(result).__name__](result)
