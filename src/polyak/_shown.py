"""What has a chart: `chart()`, and in a notebook the chart and the text as the result of a cell."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Charted:
    """A result with a chart, which `polyak.charts` draws; `str` of it is a table.

    The room of charts stands above the results, so it is imported by name when a chart is asked for.
    """

    def chart(self) -> Any:
        """The altair chart. Raises `ModuleNotFoundError` without altair (the extra `study`)."""
        return import_module("polyak.charts").chart_of(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """What a notebook shows: the chart where altair is installed, and the text."""
        text = {"text/plain": str(self)}
        try:
            chart = self.chart()
        except ModuleNotFoundError:
            return text
        bundle = chart._repr_mimebundle_(include, exclude)
        drawn = bundle[0] if isinstance(bundle, tuple) else bundle
        return {**drawn, **text}
