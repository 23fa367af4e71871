"""The chart of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import altair as alt

from polyak.charts import _drawing as draw

if TYPE_CHECKING:
    from polyak.offline._sweep import Point, Sweep


def sweep_chart(sweep: Sweep) -> alt.TopLevelMixin:
    """Draw the quality of a sweep's averages over their half-life, a line for each kind of rule.

    The best average is marked and named; dashed lines are the live weights; refused averages are
    marks on the axis. The logarithmic axis has no place for a half-life of 0 (the last update
    has the half): the subtitle counts those.
    """
    placed = [point for point in sweep.points if point.half_life > 0]
    lives = [point.half_life for point in placed] or [1.0]
    ends = min(lives) / 1.2, max(lives) * 1.2
    x = alt.X(
        "x:Q",
        scale=draw.log_scale(ends),
        axis=draw.few_decades(ends, "half-life (in the run's unit of time)"),
    )
    y_axis = alt.Axis(title=f"quality ({sweep.better} is better)")
    qualities = [p.quality for p in placed if p.quality is not None]
    y = alt.Y(
        "y:Q", scale=draw.around([*qualities, *(b.quality for b in sweep.baselines)]), axis=y_axis
    )
    best = _best(sweep, sweep.best, x, y, ends) if sweep.best in placed and sweep.best else []
    live = _baselines(sweep, x, y, ends)
    layers = [*_judged(placed, x, y), *_refused(placed, x), *live, *best]
    chart = alt.LayerChart(layer=layers, width=draw.WIDE, height=draw.HIGH)
    return draw.styled(chart, "Which average is best", subtitle=_subtitle(sweep))


def _judged(points: Sequence[Point], x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """A line and its points for each kind of rule, and a legend if there are several."""
    rows = [
        {"x": p.half_life, "y": p.quality, "kind": _kind(p), "rule": p.rule}
        for p in points
        if p.quality is not None
    ]
    kinds = list(dict.fromkeys(str(row["kind"]) for row in rows))
    base = draw.points(rows).encode(
        x=x, y=y, color=draw.colour_of("kind", kinds, "rule"), tooltip=["rule:N", "y:Q"]
    )
    return [base.mark_line(), base.mark_point(filled=True, size=40, opacity=1)]


def _refused(points: Sequence[Point], x: alt.X) -> list[alt.Chart]:
    """A cross on the axis for each refused average."""
    rows = [{"x": p.half_life, "rule": p.rule} for p in points if p.quality is None]
    mark: dict[str, Any] = {"shape": "cross", "angle": 45, "size": 60, "color": draw.GREY}
    base = draw.points(rows).mark_point(filled=True, opacity=1, clip=False, **mark)
    return [base.encode(x=x, y=alt.value("height"), tooltip=["rule:N"])] if rows else []


def _baselines(sweep: Sweep, x: alt.X, y: alt.Y, ends: tuple[float, float]) -> list[alt.Chart]:
    """A dashed line with its name for the last live weights, and for the best ones if they are others."""
    names = {"last": "last live weights", "best": "best single checkpoint"}
    rows = [
        {"x": ends[0], "y": b.quality, "label": f"{names[b.name]} ({b.at:g}): {b.quality:.5g}"}
        for b in {b.quality: b for b in reversed(sweep.baselines)}.values()
    ]
    if not rows:
        return []
    text: dict[str, Any] = {"align": "left", "dx": 4, "dy": -6, "color": draw.GREY}
    base = draw.points(rows)
    return [
        base.mark_rule(strokeDash=[6, 4], color=draw.GREY).encode(y=y, tooltip=["label:N"]),
        base.mark_text(**text).encode(x=x, y=y, text="label:N"),
    ]


def _best(
    sweep: Sweep, point: Point, x: alt.X, y: alt.Y, ends: tuple[float, float]
) -> list[alt.Chart]:
    """A ring around the best point, and its name: on the side that lines leave free, towards the middle."""
    share = math.log(point.half_life / ends[0]) / math.log(ends[1] / ends[0])
    label = f"{_kind(point)}, half-life {point.half_life:.4g}: {point.quality:.5g}"
    base = draw.points([{"x": point.half_life, "y": point.quality, "label": label}]).encode(
        x=x, y=y
    )
    align = "left" if share < 0.35 else "right" if share > 0.65 else "center"
    ring = base.mark_point(size=150, strokeWidth=2, color=draw.RED, opacity=1)
    return draw.labelled(base, ring, align=align, dy=18 if sweep.better == "lower" else -18)


def _subtitle(sweep: Sweep) -> list[str]:
    """Lines that say what the marks on the axis mean, and how many averages the chart leaves out."""
    refused = sum(point.quality is None for point in sweep.points)
    without = sum(point.half_life <= 0 for point in sweep.points)
    lines = (
        [f"Grey crosses: {refused} averages that cannot be made exactly enough."] if refused else []
    )
    return lines + ([f"Left out: {without} averages without a half-life."] if without else [])


def _kind(point: Point) -> str:
    return point.rule.partition("(")[0]
