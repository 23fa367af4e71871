"""Charts: one altair definition each, written as PNG, SVG and a self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt

from polyak._files import making_folder, writing
from polyak.rules import Rule
from polyak.theory import Explanation, explain
from polyak.theory._curves import (
    Curve,
    GainCurve,
    gain_curve,
    learning_rate_curve,
    profile_curve,
    step_curve,
)
from polyak.theory._long import Horizon, profile_at

if TYPE_CHECKING:
    from polyak.offline._sweep import Point, Sweep

__all__ = ["rule_chart", "save", "sweep_chart"]

_BLUE, _RED, _GREY = "#2a6fbb", "#b3401a", "#8a8a8a"
_OTHERS = ("#3a8f5c", "#7a4fa3", "#b8860b", "#4a9a9a", "#9a4a6a")
_WIDTH, _HEIGHT = 420, 240
_WIDE, _HIGH = 560, 320
# Plain numbers down to 0.001, powers of ten below.
_NUMBER = (
    "datum.value == 0 || abs(datum.value) >= 0.001"
    " ? format(datum.value, '~g') : format(datum.value, '~e')"
)


def save(chart: alt.TopLevelMixin, folder: Path, name: str) -> None:
    """Write `folder/name.png` (at twice the resolution), `.svg` and `.html` (which opens offline)."""
    options: dict[str, dict[str, Any]] = {
        "png": {"scale_factor": 2},
        "svg": {},
        "html": {"inline": True},
    }
    with making_folder(folder):
        for kind, settings in options.items():
            with writing(folder / f"{name}.{kind}") as file:
                file.write(_rendered(chart, kind, **settings))


def _rendered(chart: alt.TopLevelMixin, kind: Any, **settings: Any) -> bytes:
    """The content of a chart's file; altair would leave an empty one where the writing fails."""
    out: Any = BytesIO() if kind == "png" else StringIO()
    chart.save(out, format=kind, **settings)
    content = out.getvalue()
    return content if isinstance(content, bytes) else content.encode()


def rule_chart(
    rule: Rule | str | Explanation, steps: int | None = None, *, every: int = 1
) -> alt.TopLevelMixin:
    """Four panels on what a rule averages after `steps` steps, updated every `every` steps.

    The profile by age, the step response by the age of the jump, the frequency response with its
    -3 dB point, the equivalent learning-rate schedule by step. An `Explanation` may stand for the
    rule, with its steps and cadence. Errors: those of `theory.explain`.
    """
    about = rule if isinstance(rule, Explanation) else explain(rule, steps, every=every)
    every, unit = about.every, about.unit
    c, _ = profile_at(about.rule, Horizon(about.steps, unit), every)
    coefficient = alt.Axis(labelExpr=_NUMBER, title="coefficient of the step's live weights")
    shown, rate = "share of a jump that the average shows", "multiplier of the learning rate"
    panels = (
        _panel(profile_curve(c, every=every, unit=unit), "Profile", "age (steps before the last)", coefficient),
        _panel(step_curve(c, unit=unit), "Step response", "age of the jump (steps)", alt.Axis(title=shown)),
        _frequency_panel(gain_curve(c, unit=unit)),
        _panel(learning_rate_curve(c, unit=unit), "Equivalent learning-rate schedule", "step", alt.Axis(title=rate)),
    )  # fmt: skip
    title = alt.TitleParams(about.title(), anchor="middle", fontSize=16)
    chart: alt.ConcatChart = (
        alt.concat(*panels, columns=2, spacing=30, title=title)
        .configure_axis(labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
        .configure_view(stroke=None)
    )
    return chart


def sweep_chart(sweep: Sweep) -> alt.TopLevelMixin:
    """The quality of a sweep's averages over their half-life, with a line for each kind of rule.

    The best average is marked and named; dashed lines are the live weights; refused averages are marks
    on the axis. The logarithmic axis
    has no place for a half-life of 0 (the last update carries the half), so the subtitle counts those.
    """
    placed = [point for point in sweep.points if point.half_life > 0]
    lives = [point.half_life for point in placed] or [1.0]
    ends = min(lives) / 1.2, max(lives) * 1.2
    x = alt.X(
        "x:Q", scale=_log(ends), axis=_few_decades(ends, "half-life (in the run's unit of time)")
    )
    y_axis = alt.Axis(title=f"quality ({sweep.better} is better)")
    qualities = [p.quality for p in placed if p.quality is not None]
    y = alt.Y(
        "y:Q", scale=_around([*qualities, *(b.quality for b in sweep.baselines)]), axis=y_axis
    )
    title = alt.TitleParams("Which average is best", subtitle=_subtitle(sweep), fontSize=16)
    best = _best(sweep, sweep.best, x, y, ends) if sweep.best in placed and sweep.best else []
    live = _baselines(sweep, x, y, ends)
    chart: alt.LayerChart = (
        alt.LayerChart(layer=[*_judged(placed, x, y), *_refused(placed, x), *live, *best])
        .properties(title=title, width=_WIDE, height=_HIGH)
        .configure_axis(labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
        .configure_view(stroke=None)
        .configure_legend(titleFontWeight="normal", labelFontSize=11)
    )
    return chart


def _judged(points: Sequence[Point], x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """A line and its points for each kind of rule, and a legend if there are several."""
    rows = [
        {"x": p.half_life, "y": p.quality, "kind": _kind(p), "rule": p.rule}
        for p in points
        if p.quality is not None
    ]
    kinds = list(dict.fromkeys(str(row["kind"]) for row in rows))
    scale = alt.Scale(domain=kinds, range=[_BLUE, *_OTHERS][: len(kinds)])
    legend = alt.Legend(title="rule") if len(kinds) > 1 else None
    base = _chart(rows).encode(
        x=x, y=y, color=alt.Color("kind:N", scale=scale, legend=legend), tooltip=["rule:N", "y:Q"]
    )
    return [base.mark_line(), base.mark_point(filled=True, size=40, opacity=1)]


def _refused(points: Sequence[Point], x: alt.X) -> list[alt.Chart]:
    """A cross on the axis for each refused average."""
    rows = [{"x": p.half_life, "rule": p.rule} for p in points if p.quality is None]
    mark: dict[str, Any] = {"shape": "cross", "angle": 45, "size": 60, "color": _GREY}
    base = _chart(rows).mark_point(filled=True, opacity=1, clip=False, **mark)
    return [base.encode(x=x, y=alt.value(_HIGH), tooltip=["rule:N"])] if rows else []


def _baselines(sweep: Sweep, x: alt.X, y: alt.Y, ends: tuple[float, float]) -> list[alt.Chart]:
    """A dashed line with its name for the last live weights, and for the best ones if they are others."""
    names = {"last": "last live weights", "best": "best single checkpoint"}
    rows = [
        {"x": ends[0], "y": b.quality, "label": f"{names[b.name]} ({b.at:g}): {b.quality:.5g}"}
        for b in {b.quality: b for b in reversed(sweep.baselines)}.values()
    ]
    if not rows:
        return []
    text: dict[str, Any] = {"align": "left", "dx": 4, "dy": -6, "color": _GREY}
    base = _chart(rows)
    return [
        base.mark_rule(strokeDash=[6, 4], color=_GREY).encode(y=y, tooltip=["label:N"]),
        base.mark_text(**text).encode(x=x, y=y, text="label:N"),
    ]


def _best(
    sweep: Sweep, point: Point, x: alt.X, y: alt.Y, ends: tuple[float, float]
) -> list[alt.Chart]:
    """A ring around the best point, and its name: on the side that lines leave free, towards the middle."""
    share = math.log(point.half_life / ends[0]) / math.log(ends[1] / ends[0])
    label = f"{_kind(point)}, half-life {point.half_life:.4g}: {point.quality:.5g}"
    base = _chart([{"x": point.half_life, "y": point.quality, "label": label}]).encode(x=x, y=y)
    place: dict[str, Any] = {"fontWeight": "bold", "dy": 18 if sweep.better == "lower" else -18}
    place["align"] = "left" if share < 0.35 else "right" if share > 0.65 else "center"
    text = base.encode(text="label:N")
    return [
        base.mark_point(size=150, strokeWidth=2, color=_RED, opacity=1),
        text.mark_text(color="white", stroke="white", strokeWidth=4, **place),
        text.mark_text(color=_RED, **place),
    ]


def _subtitle(sweep: Sweep) -> list[str]:
    """What the marks on the axis mean, and how many averages the chart leaves out."""
    refused = sum(point.quality is None for point in sweep.points)
    without = sum(point.half_life <= 0 for point in sweep.points)
    lines = (
        [f"Grey crosses: {refused} averages that cannot be made exactly enough."] if refused else []
    )
    return lines + ([f"Left out: {without} averages without a half-life."] if without else [])


def _around(values: Sequence[float]) -> alt.Scale:
    """The range of the values with some room around it; a tenth of the value if it is alone."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    room = (high - low) / 6 or abs(low) / 10 or 1.0
    return alt.Scale(nice=False, zero=False, domainMin=low - room, domainMax=high + room)


def _few_decades(limits: tuple[float, float], title: str) -> alt.Axis:
    """Lines at 1, 2 and 5 of each power of ten; over many decades only at powers of ten."""
    low, high = (math.floor(math.log10(limit)) for limit in limits)
    steps = (1, 2, 5) if high - low <= 4 else (1,)
    lines = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    within = [line for line in lines if limits[0] <= line <= limits[1]]
    return alt.Axis(title=title, labelExpr=_NUMBER, values=within)


def _kind(point: Point) -> str:
    return point.rule.partition("(")[0]


def _panel(curve: Curve, title: str, x_title: str, y_axis: alt.Axis) -> alt.Chart:
    """A line over steps."""
    axis = alt.Axis(title=x_title, labelExpr="format(datum.value, '~s')", tickCount=7)
    x = alt.X("x:Q", scale=alt.Scale(nice=False), axis=axis)
    return _line(curve, title, x, alt.Y("y:Q", axis=y_axis))


def _frequency_panel(gain: GainCurve) -> alt.LayerChart:
    """The gain on two logarithmic axes, with a line at every power of ten."""
    frequencies, gains = (gain.curve.x[0], gain.curve.x[-1]), (gain.bottom, gain.top)
    x = alt.X("x:Q", scale=_log(frequencies), axis=_decades(frequencies, "frequency (rad/step)"))
    y = alt.Y("y:Q", scale=_log(gains), axis=_decades(gains, "gain"))
    marks = [] if gain.cutoff is None else _half_power_mark(gain.cutoff, x, y)
    return alt.LayerChart(layer=[_line(gain.curve, "Frequency response", x, y), *marks])


def _half_power_mark(cutoff: float, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """The -3 dB point and its label, on the side without the curve, with a white halo."""
    label = f"-3 dB at {cutoff:.3g} rad/step"
    point = _chart([{"x": cutoff, "y": 0.5**0.5, "label": label}]).encode(x=x, y=y)
    text = point.encode(text="label:N")
    right: dict[str, Any] = {"align": "left", "dx": 9, "dy": -7, "fontWeight": "bold"}
    left: dict[str, Any] = {"align": "right", "dx": -5, "dy": 14, "fontWeight": "bold"}
    place = right if cutoff < 0.1 else left
    return [
        text.mark_text(color="white", stroke="white", strokeWidth=4, **place),
        point.mark_point(filled=True, size=70, color=_RED, opacity=1),
        text.mark_text(color=_RED, **place),
    ]


def _log(limits: tuple[float, float]) -> alt.Scale:
    return alt.Scale(type="log", nice=False, domainMin=limits[0], domainMax=limits[1])


def _decades(limits: tuple[float, float], title: str) -> alt.Axis:
    low, high = (math.log10(limit) for limit in limits)
    powers = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    return alt.Axis(title=title, labelExpr=_NUMBER, values=powers)


def _line(curve: Curve, title: str, x: alt.X, y: alt.Y) -> alt.Chart:
    rows = [{"x": place, "y": value} for place, value in zip(*curve, strict=True)]
    chart: alt.Chart = (
        _chart(rows)
        .mark_line(color=_BLUE)
        .encode(x=x, y=y)
        .properties(title=title, width=_WIDTH, height=_HEIGHT)
    )
    return chart


def _chart(rows: list[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=rows))
