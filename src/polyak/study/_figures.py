"""The kinds of charts in reports, in one style, each narrow enough for a phone.

A series has a colour and a line style, so that it is known without colour.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import altair as alt

from polyak.charts._drawing import AXES, FONT, INK, LINE, NUMBER, SERIES, SOFT
from polyak.rules import LIVE
from polyak.study._statistics import Interval
from polyak.study._text import between

Rows = list[dict[str, Any]]
Chart = Any  # what altair's fluent calls are to a type checker

DASHES = ([1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [4, 4], [12, 4])
WIDTH, HEIGHT = 380, 290
TITLE = 48  # characters of a line of a title, which fit the width
MOST_SERIES = len(SERIES)


def bands(
    rows: Rows, x_title: str, y_title: str, *, log: bool = False, domain: Sequence[float] = ()
) -> Chart:
    """A line of `middle` by `x` for each `curve`, over a band from `low` to `high` where rows have it."""
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=_x("x:Q", x_title, nice=False), color=_series(rows, alt.Color)
    )
    kind: dict[str, Any] = {"type": "log", "nice": False} if log else {"zero": False}
    scale = alt.Scale(**kind | ({"domain": list(domain)} if domain else {}))
    line = base.mark_line(strokeWidth=2, clip=True).encode(
        y=alt.Y("middle:Q", title=None, scale=scale), strokeDash=_series(rows, alt.StrokeDash)
    )
    area = base.mark_area(opacity=0.18, clip=True).encode(
        y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q"
    )
    return report_chart((area + line) if "low" in rows[0] else line, y_title)


def forest(rows: Mapping[str, Interval], x_title: str, title: str, *, furthest: float = 4) -> Chart:
    """An estimate with its interval for each name; a hollow point where the interval holds 0.

    What lies outside `reach` is cut off; an arrow points to an estimate there.
    """
    most = reach(rows, furthest)
    values = [
        {
            "name": name,
            **{n: max(-most, min(v, most)) for n, v in (("middle", i.estimate), ("low", i.low), ("high", i.high))},
            "clear": not i.low <= 0 <= i.high,
            "kind": "circle" if abs(i.estimate) <= most else f"triangle-{'left' if i.estimate < 0 else 'right'}",
        }
        for name, i in rows.items()
    ]  # fmt: skip
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=170))
    )
    bar = base.mark_rule(strokeWidth=2, color=SERIES[1]).encode(x=_x("low:Q", x_title), x2="high:Q")
    fill = alt.condition("datum.clear", alt.value(SERIES[1]), alt.value("white"))
    point = base.mark_point(size=60, color=SERIES[1], strokeWidth=2, opacity=1).encode(
        x="middle:Q", fill=fill, shape=alt.Shape("kind:N", scale=None, legend=None)
    )
    height = max(120, 22 * len(values) + 70)
    return report_chart(rule(0, "x") + bar + point, title, height)


def reach(rows: Mapping[str, Interval], furthest: float = 4) -> float:
    """How far from 0 a forest is drawn: to the furthest end, but at most to `furthest` times the median one."""
    ends = [end for i in rows.values() if 0 < (end := max(-i.low, i.high)) < math.inf] or [1.0]
    return min(max(ends), furthest * statistics.median(ends))


def cut_off(rows: Mapping[str, Interval], form: Callable[[float], str]) -> str:
    """Name, in words, what a forest does not show in full; empty where it shows all."""
    most = reach(rows)
    outside = [f"{n} {between(i, form)}" for n, i in rows.items() if max(-i.low, i.high) > most]
    return f" The axis ends before: {', '.join(outside)}." if outside else ""


def pairs(rows: Rows, x_title: str, title: str) -> Chart:
    """A point for each row at (`x`, `y`), and the line of equality."""
    values = [v for row in rows for v in (row["x"], row["y"])]
    low, high = min(values), max(values)
    room = (high - low) / 12 or abs(high) / 10 or 1.0
    scale = alt.Scale(domain=[low - room, high + room], nice=False, zero=False)
    x = alt.X("x:Q", title=x_title, scale=scale, axis=alt.Axis(tickCount=5))
    y = alt.Y("y:Q", title=None, scale=scale)
    ends = [{"x": low - room, "y": low - room}, {"x": high + room, "y": high + room}]
    layers = [
        alt.Chart(alt.Data(values=ends)).mark_line(strokeDash=[4, 3], color=SOFT),
        alt.Chart(alt.Data(values=rows)).mark_circle(size=40, opacity=0.8, color=SERIES[1]),
    ]
    return report_chart(alt.layer(*(layer.encode(x=x, y=y) for layer in layers)), title, 360)


def ladder(points: Mapping[float, Interval], live: Interval, x_title: str, title: str) -> Chart:
    """Estimates with intervals along a logarithmic axis, and the live model's as a dashed line and band."""
    rows = [
        {"x": x, "middle": i.estimate, "low": i.low, "high": i.high}
        for x, i in sorted(points.items())
    ]
    ends = [min(points) / 1.3, max(points) * 1.3]
    x = alt.X(
        "x:Q", title=x_title, scale=alt.Scale(type="log", domain=ends, nice=False),
        axis=alt.Axis(values=_round_numbers(*ends), labelExpr=NUMBER),
    )  # fmt: skip
    scale = alt.Scale(zero=False)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x)
    bar = base.mark_rule(strokeWidth=2, color=SERIES[1]).encode(
        y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q"
    )
    line = base.mark_line(
        point=alt.OverlayMarkDef(size=50, opacity=1, color=SERIES[1]), color=SERIES[1]
    ).encode(y=alt.Y("middle:Q", title=None, scale=scale))
    level = [
        {"x": end, "middle": live.estimate, "low": live.low, "high": live.high} for end in ends
    ]
    flat = alt.Chart(alt.Data(values=level)).encode(x=x)
    area = flat.mark_area(opacity=0.15, color=SERIES[0]).encode(
        y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q"
    )
    dashed = flat.mark_line(strokeDash=[7, 3], color=SERIES[0]).encode(y="middle:Q")
    return report_chart(area + dashed + bar + line, title)


def rule(value: float, axis: str) -> Chart:
    """A dashed line across the chart at a value of an axis."""
    mark = alt.Chart(alt.Data(values=[{"at": value}])).mark_rule(
        color=SOFT, strokeWidth=1.5, strokeDash=[6, 3]
    )
    return mark.encode(**{axis: "at:Q"})


def report_chart(chart: Chart, title: str, height: int = HEIGHT) -> Chart:
    """The chart in the common style and size; the title says what the vertical axis is."""
    return (
        chart.properties(
            width=WIDTH, height=height, title=textwrap.wrap(title, TITLE) or "",
            autosize=alt.AutoSizeParams(type="fit", contains="padding"),
        )
        .configure(font=FONT, background="white", aria=False, padding=4)
        .configure_axis(**AXES)
        .configure_legend(
            labelFontSize=13, labelColor=INK, orient="top", symbolType="stroke", symbolSize=400,
            symbolStrokeWidth=2, symbolOpacity=1, columns=2, labelLimit=170, title=None,
        )
        .configure_title(fontSize=14, fontWeight="normal", anchor="start", color=INK, limit=WIDTH)
        .configure_view(stroke=LINE)
    )  # fmt: skip


def _x(field: str, title: str, nice: bool = True) -> alt.X:
    axis = alt.Axis(tickCount=6, labelOverlap=True, labelFlush=True)
    return alt.X(field, title=title, axis=axis, scale=alt.Scale(nice=nice, zero=False))


def _series(rows: Rows, channel: Any) -> Any:
    """The channel that tells the curves apart, colour or line style, in the order of the rows."""
    names = list(dict.fromkeys(row["curve"] for row in rows))
    first = (
        0 if LIVE in names else 1
    )  # the live weights have the first style wherever they are shown
    styles: Any = (SERIES if channel is alt.Color else DASHES)[first:]
    scale = alt.Scale(domain=names, range=list(styles[: len(names)]))
    return channel("curve:N", title=None, scale=scale, sort=None)


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within limits; powers of ten alone over more than two decades."""
    steps = (1, 2, 5) if high / low <= 100 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [v for p in powers for s in steps if low <= (v := s * 10.0**p) <= high]
