"""Charts: one altair definition, written as PNG, SVG and a self-contained HTML page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import altair as alt

from polyak.rules import Rule
from polyak.theory import explain, profile
from polyak.theory.curves import (
    Curve,
    GainCurve,
    gain_curve,
    learning_rate_curve,
    profile_curve,
    step_curve,
)

_BLUE, _RED = "#2a6fbb", "#b3401a"
_WIDTH, _HEIGHT = 420, 240
# Plain numbers down to 0.001, powers of ten below.
_NUMBER = (
    "datum.value == 0 || abs(datum.value) >= 0.001"
    " ? format(datum.value, '~g') : format(datum.value, '~e')"
)


def save(chart: alt.TopLevelMixin, folder: Path, name: str) -> None:
    """Writes `folder/name.png` (at twice the resolution), `.svg` and `.html` (opens offline)."""
    folder.mkdir(parents=True, exist_ok=True)
    chart.save(folder / f"{name}.png", scale_factor=2)
    chart.save(folder / f"{name}.svg")
    chart.save(folder / f"{name}.html", inline=True)


def rule_chart(rule: Rule | str, steps: int | None = None, *, every: int = 1) -> alt.TopLevelMixin:
    """Four panels on what a rule averages after `steps` steps, updated every `every` steps.

    The profile by age, the step response by the age of the jump, the frequency response with its
    -3 dB point, the equivalent learning-rate schedule by step. Errors: those of `theory.explain`.
    """
    about = explain(rule, steps, every=every)
    c = profile(about.rule, about.steps, every=every)
    coefficient = alt.Axis(labelExpr=_NUMBER, title="coefficient of the step's live weights")
    shown, rate = "share of a jump that the average shows", "multiplier of the learning rate"
    panels = (
        _panel(profile_curve(c, every=every), "Profile", "age (steps before the last)", coefficient),
        _panel(step_curve(c), "Step response", "age of the jump (steps)", alt.Axis(title=shown)),
        _frequency_panel(gain_curve(c)),
        _panel(learning_rate_curve(c), "Equivalent learning-rate schedule", "step", alt.Axis(title=rate)),
    )  # fmt: skip
    title = alt.TitleParams(about.title(), anchor="middle", fontSize=16)
    chart: alt.ConcatChart = (
        alt.concat(*panels, columns=2, spacing=30, title=title)
        .configure_axis(labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
        .configure_view(stroke=None)
    )
    return chart


def _panel(curve: Curve, title: str, x_title: str, y_axis: alt.Axis) -> alt.Chart:
    """A line over steps."""
    axis = alt.Axis(title=x_title, labelExpr="format(datum.value, '~s')", tickCount=7)
    x = alt.X("x:Q", scale=alt.Scale(nice=False), axis=axis)
    return _line(curve, title, x, alt.Y("y:Q", axis=y_axis))


def _frequency_panel(gain: GainCurve) -> alt.LayerChart:
    """The gain on two logarithmic axes, with a line at every power of ten."""
    frequencies, gains = (gain.curve.x[0], math.pi), (gain.bottom, gain.top)
    x = alt.X("x:Q", scale=_log(frequencies), axis=_decades(frequencies, "frequency (rad/step)"))
    y = alt.Y("y:Q", scale=_log(gains), axis=_decades(gains, "gain"))
    marks = [] if gain.cutoff is None else _half_power_mark(gain.cutoff, x, y)
    return alt.LayerChart(layer=[_line(gain.curve, "Frequency response", x, y), *marks])


def _half_power_mark(cutoff: float, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """The -3 dB point and its label, on the side where the curve is not, with a white halo."""
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
    rows = [{"x": each, "y": value} for each, value in zip(*curve, strict=True)]
    chart: alt.Chart = (
        _chart(rows)
        .mark_line(color=_BLUE)
        .encode(x=x, y=y)
        .properties(title=title, width=_WIDTH, height=_HEIGHT)
    )
    return chart


def _chart(rows: list[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=rows))
