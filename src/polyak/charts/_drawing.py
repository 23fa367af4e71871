"""How charts are drawn: colours, axes, lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from polyak.theory._curves import Curve

# A page replaces these colours in the dark: page.css.
SERIES = ("#b3401a", "#1b6ca8", "#5f6670", "#2b7a4b", "#7a4fa3", "#8a6a00")
INK, SOFT, LINE = "#1d2126", "#4a525c", "#d5dae0"
RED, BLUE, GREY, *_OTHERS = SERIES
COLOURS = (BLUE, *_OTHERS, GREY, RED)
FONT = "Helvetica, Arial, DejaVu Sans, sans-serif"
AXES = {
    "labelFontSize": 13, "titleFontSize": 14, "titleFontWeight": "normal", "titleColor": INK,
    "labelColor": INK, "gridColor": LINE, "domainColor": SOFT, "tickColor": SOFT,
}  # fmt: skip
STYLE: dict[str, Any] = {
    "font": FONT, "background": "white", "axis": AXES, "text": {"fontSize": 13},
    "title": {"color": INK, "subtitleColor": SOFT}, "view": {"stroke": None},
    "legend": {
        "labelFontSize": 13, "titleFontSize": 13, "labelColor": INK, "titleColor": INK, "titleFontWeight": "normal",
        "labelLimit": 360, "orient": "top", "direction": "vertical", "symbolSize": 400,
    },
}  # fmt: skip
_WIDTH, _HEIGHT = 420, 240
WIDE, HIGH = 560, 320
# Plain numbers down to 0.001, powers of ten below.
NUMBER = (
    "datum.value == 0 || abs(datum.value) >= 0.001"
    " ? format(datum.value, '~g') : format(datum.value, '~e')"
)


def styled(chart: Any, title: str, **properties: Any) -> alt.TopLevelMixin:
    """The chart under a title, in the common style; `properties` are altair's."""
    above = alt.TitleParams(title, anchor="middle", fontSize=16, **properties)
    drawn: alt.TopLevelMixin = chart.properties(title=above).configure(**STYLE)
    return drawn


def around(values: Sequence[float]) -> alt.Scale:
    """The range of the values with some room around it; a tenth of the value if it is alone."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    room = (high - low) / 6 or abs(low) / 10 or 1.0
    return alt.Scale(nice=False, zero=False, domainMin=low - room, domainMax=high + room)


def few_decades(limits: tuple[float, float], title: str) -> alt.Axis:
    """Lines at 1, 2 and 5 of each power of ten; over many decades only at powers of ten."""
    low, high = (math.floor(math.log10(limit)) for limit in limits)
    steps = (1, 2, 5) if high - low <= 4 else (1,)
    lines = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    within = [line for line in lines if limits[0] <= line <= limits[1]]
    return alt.Axis(title=title, labelExpr=NUMBER, values=within)


def log_scale(limits: tuple[float, float]) -> alt.Scale:
    return alt.Scale(type="log", nice=False, domainMin=limits[0], domainMax=limits[1])


def decades(limits: tuple[float, float], title: str) -> alt.Axis:
    low, high = (math.log10(limit) for limit in limits)
    powers = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    return alt.Axis(title=title, labelExpr=NUMBER, values=powers)


def lines(curves: Mapping[str, Curve], title: str, x: alt.X, y: alt.Y) -> alt.Chart:
    rows = [
        {"x": place, "y": value, **({"rule": name} if len(curves) > 1 else {})}
        for name, curve in curves.items()
        for place, value in zip(*curve, strict=True)
    ]
    chart: alt.Chart = points(rows).mark_line(color=BLUE).encode(x=x, y=y)
    if len(curves) > 1:
        scale = alt.Scale(domain=list(curves), range=COLOURS[: len(curves)])
        chart = chart.encode(
            color=alt.Color("rule:N", scale=scale, title=None),
            strokeDash=alt.StrokeDash("rule:N", scale=alt.Scale(domain=list(curves)), title=None),
        )
    sized: alt.Chart = chart.properties(title=title, width=_WIDTH, height=_HEIGHT)
    return sized


def points(rows: list[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=rows))


def colour_of(field: str, kinds: Sequence[str], title: str) -> alt.Color:
    """A colour for each kind of row, and a legend if there are several."""
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(kinds))]
    legend = alt.Legend(title=title, symbolSize=100) if len(kinds) > 1 else None
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=kinds, range=colours), legend=legend)


def labelled(base: alt.Chart, mark: alt.Chart, **place: Any) -> list[alt.Chart]:
    """A mark, and its `label` in bold on a white halo."""
    text = base.encode(text="label:N")
    place["fontWeight"] = "bold"
    halo = text.mark_text(color="white", stroke="white", strokeWidth=4, **place)
    return [mark, halo, text.mark_text(color=RED, **place)]
