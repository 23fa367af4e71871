"""The plan's chart: what one average takes on the fullest rank, as ranks grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt

_COLOURS = ["#2a6fbb", "#3a8f5c", "#b3401a"]
_SOLID, _DASHED = [1, 0], [6, 4]


def save_chart(points: list[dict[str, Any]], folder: Path) -> None:
    """Writes `plan.png` and `plan.svg`; a point is a model's ranks, layout, GB and the mean of all ranks."""
    picture = _chart(points)
    picture.save(folder / "plan.png", scale_factor=2)
    picture.save(folder / "plan.svg")


def _chart(points: list[dict[str, Any]]) -> alt.LayerChart:
    base = alt.Chart(alt.InlineData(values=points)).encode(x=_ranks(points), color=_model(points))
    dash = alt.Scale(domain=["rows over all ranks", "experts spread"], range=[_SOLID, _DASHED])
    layout = alt.StrokeDash("layout:N", scale=dash, legend=None)
    lines = base.mark_line(point=True).encode(y=_gigabytes("GB"), strokeDash=layout)
    means = base.mark_line(opacity=0.5, strokeWidth=1).encode(
        y=_gigabytes("mean"), detail="layout:N"
    )
    title = alt.TitleParams(
        "One float32 average on the fullest rank",
        subtitle="rows over all ranks; dashed: experts spread; thin: total bytes over ranks; logarithmic",
        anchor="start",
        fontSize=15,
        subtitlePadding=6,
    )
    whole: alt.LayerChart = (
        alt.LayerChart(layer=[means, lines])
        .properties(width=480, height=300, title=title)
        .configure_axis(labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
        .configure_view(stroke=None)
        .configure_legend(titleFontWeight="normal", labelFontSize=11)
    )
    return whole


def _ranks(points: list[dict[str, Any]]) -> alt.X:
    values = list(dict.fromkeys(point["ranks"] for point in points))
    axis = alt.Axis(values=values, format=",d", title="ranks")
    return alt.X("ranks:Q", scale=alt.Scale(type="log", nice=False), axis=axis)


def _gigabytes(field: str) -> alt.Y:
    powers = [10.0**power for power in range(-4, 4)]
    axis = alt.Axis(title="GB", values=powers, format="~g")
    return alt.Y(f"{field}:Q", scale=alt.Scale(type="log"), axis=axis)


def _model(points: list[dict[str, Any]]) -> alt.Color:
    names = list(dict.fromkeys(point["model"] for point in points))
    legend = alt.Legend(title="model", symbolType="stroke", symbolOpacity=1, symbolSize=300)
    return alt.Color("model:N", scale=alt.Scale(domain=names, range=_COLOURS), legend=legend)
