"""Charts: one altair definition, written as PNG, SVG and a self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

import altair as alt


def save(chart: alt.TopLevelMixin, folder: Path, name: str) -> None:
    """Writes `folder/name.png` (at twice the resolution), `.svg` and `.html` (opens offline)."""
    folder.mkdir(parents=True, exist_ok=True)
    chart.save(folder / f"{name}.png", scale_factor=2)
    chart.save(folder / f"{name}.svg")
    chart.save(folder / f"{name}.html", inline=True)
