"""Charts: one altair definition each, written as PNG, SVG and a self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import altair as alt

from polyak._checks import require
from polyak._files import making_folder, writing
from polyak.rules import Exponential, Rule
from polyak.theory import Advice, Explanation, explain
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
    from polyak.offline import Description, Synthesis
    from polyak.offline._sweep import Point, Sweep
    from polyak.theory._synthesis import Fit

__all__ = [
    "advice_chart",
    "chart_of",
    "description_chart",
    "fit_chart",
    "rule_chart",
    "save",
    "sweep_chart",
    "synthesis_chart",
]

_BLUE, _RED, _GREY = "#2a6fbb", "#b3401a", "#8a8a8a"
_OTHERS = ("#3a8f5c", "#7a4fa3", "#b8860b", "#4a9a9a", "#9a4a6a")
_COLOURS = (_BLUE, *_OTHERS)
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


def chart_of(result: object) -> alt.TopLevelMixin:
    """The chart of a result of `theory` or `offline`, which are not imported for that."""
    drawn: dict[str, Callable[[Any], alt.TopLevelMixin]] = {
        "Explanation": rule_chart,
        "Advice": advice_chart,
        "Sweep": sweep_chart,
        "Fit": fit_chart,
        "Synthesis": synthesis_chart,
        "Description": description_chart,
    }
    return drawn[type(result).__name__](result)


def rule_chart(
    rule: Rule | str | Explanation | Sequence[Rule | str | Explanation],
    steps: int | None = None,
    *,
    every: int = 1,
) -> alt.TopLevelMixin:
    """Four panels on what a rule, or each of several, averages after `steps` steps.

    The profile by age, the step response by the age of the jump, the frequency response with its
    -3 dB point, the equivalent learning-rate schedule by step. Several rules are lines of several
    colours. An `Explanation` may stand for a rule, with its steps and cadence. Errors: those of
    `theory.explain`; `ValueError` for no rule, and for more than six.
    """
    rules = [rule] if isinstance(rule, Rule | str | Explanation) else list(rule)
    require(1 <= len(rules) <= len(_COLOURS), "rules", len(rules), f"1 to {len(_COLOURS)} of them")
    abouts = [
        each if isinstance(each, Explanation) else explain(each, steps, every=every)
        for each in rules
    ]
    drawn = {_label(about, abouts): _Drawn.of(about) for about in abouts}
    coefficient = alt.Axis(labelExpr=_NUMBER, title="coefficient of the step's live weights")
    shown, rate = "share of a jump that the average shows", "multiplier of the learning rate"
    panels = (
        _panel({k: d.profile for k, d in drawn.items()}, "Profile", "age (steps before the last)", coefficient),
        _panel({k: d.step for k, d in drawn.items()}, "Step response", "age of the jump (steps)", alt.Axis(title=shown)),
        _frequency_panel({k: d.gain for k, d in drawn.items()}),
        _panel({k: d.rate for k, d in drawn.items()}, "Equivalent learning-rate schedule", "step", alt.Axis(title=rate)),
    )  # fmt: skip
    told = abouts[0].title() if len(abouts) == 1 else f"What {len(abouts)} rules average"
    title = alt.TitleParams(told, anchor="middle", fontSize=16)
    chart: alt.ConcatChart = (
        alt.concat(*panels, columns=2, spacing=30, title=title)
        .configure_axis(labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
        .configure_view(stroke=None)
        .configure_legend(labelFontSize=12, labelLimit=400, orient="top", direction="vertical")
    )
    return chart


class _Drawn(NamedTuple):
    """The curves of one rule."""

    profile: Curve
    step: Curve
    gain: GainCurve
    rate: Curve

    @classmethod
    def of(cls, about: Explanation) -> _Drawn:
        every, unit = about.every, about.unit
        c, _ = profile_at(about.rule, Horizon(about.steps, unit), every)
        return cls(
            profile_curve(c, every=every, unit=unit),
            step_curve(c, unit=unit),
            gain_curve(c, unit=unit),
            learning_rate_curve(c, unit=unit),
        )


def _label(about: Explanation, among: Sequence[Explanation]) -> str:
    """The rule, and its steps where they are not the same for all."""
    alike = len({(each.steps, each.every) for each in among}) == 1
    return str(about.rule) if alike else about.title()


def advice_chart(advice: Advice) -> alt.TopLevelMixin:
    """The gain of EMAs over their half-life in % of the run, with a line for each noise of the model.

    One panel is at the live weights' best learning rate, the other at each average's own best.
    """
    emas = [gain for gain in advice.gains if isinstance(gain.rule, Exponential)]
    shares = [100 * gain.half_life / advice.steps for gain in emas]
    ends = min(shares) / 1.2, max(shares) * 1.2
    x = alt.X("x:Q", scale=_log(ends), axis=_few_decades(ends, "half-life (% of the run)"))
    # A gain below -50 % would press the others together.
    low = max(min(min(gain.same, gain.own) for gain in emas), -0.5)
    scale = alt.Scale(nice=False, zero=False, domainMin=low - 0.05, domainMax=1.0, clamp=True)
    y = alt.Y("y:Q", scale=scale, axis=alt.Axis(title="gain (share of the loss)", format="%"))
    panels = []
    for at, title in (("same", "At the same learning rate"), ("own", "At its own learning rate")):
        curves: dict[str, Curve] = {}
        for batch in advice.batches:
            points = [
                (s, getattr(g, at)) for s, g in zip(shares, emas, strict=True) if g.batch == batch
            ]
            curves[f"batch {batch:g}"] = Curve(*map(list, zip(*points, strict=True)))
        zero = _chart([{"y": 0}]).mark_rule(strokeDash=[6, 4], color=_GREY).encode(y="y:Q")
        panels.append(alt.LayerChart(layer=[_lines(curves, title, x, y), zero]))
    told = f"EMA over {advice.steps} steps, {advice.schedule}: the noisy quadratic model"
    title_ = alt.TitleParams(told, anchor="middle", fontSize=16)
    chart = alt.hconcat(*panels, spacing=30, title=title_)
    drawn: alt.HConcatChart = chart.configure_view(stroke=None)
    return drawn


def fit_chart(fit: Fit) -> alt.TopLevelMixin:
    """The coefficient of each column, in the order in which the columns were given."""
    rows = [{"x": i, "y": c, "of": "column"} for i, c in enumerate(fit.coefficients.tolist())]
    return _coefficients(rows, "column", str(fit))


def synthesis_chart(made: Synthesis) -> alt.TopLevelMixin:
    """The coefficient of each stored tensor by its time, in a colour for each stored average."""
    rows = [
        {"x": t.time, "y": t.coefficient, "of": f"{t.average} {t.slot}".strip()} for t in made.terms
    ]
    return _coefficients(rows, "time at which it was stored", str(made).partition(", from")[0])


def _coefficients(rows: list[dict[str, Any]], x: str, title: str) -> alt.TopLevelMixin:
    """Coefficients as lines from 0 to a point."""
    kinds = list(dict.fromkeys(row["of"] for row in rows))
    scale = alt.Scale(domain=kinds, range=[_COLOURS[i % len(_COLOURS)] for i in range(len(kinds))])
    legend = alt.Legend(title="stored") if len(kinds) > 1 else None
    base = _chart([row | {"zero": 0.0} for row in rows]).encode(
        x=alt.X("x:Q", title=x, scale=alt.Scale(zero=False)),
        y=alt.Y("y:Q", title="coefficient"),
        color=alt.Color("of:N", scale=scale, legend=legend),
        tooltip=["of:N", "x:Q", "y:Q"],
    )
    layers = [base.mark_rule().encode(y2="zero:Q"), base.mark_point(filled=True, opacity=1)]
    chart: alt.LayerChart = (
        alt.LayerChart(layer=layers)
        .properties(title=alt.TitleParams(title, fontSize=16), width=_WIDE, height=_HIGH)
        .configure_view(stroke=None)
    )
    return chart


def description_chart(found: Description) -> alt.TopLevelMixin:
    """What the averages of a file average, at its clock (`rule_chart`), as far as their rules are known."""
    rules = [
        a.rule for a in found.averages.values() if a.rule is not None and a.half_life is not None
    ]
    if not rules or not found.count:
        raise LookupError(f"{found.path} tells no rule and clock of an average to draw")
    return rule_chart(list(dict.fromkeys(rules))[: len(_COLOURS)], found.count)


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
    scale = alt.Scale(domain=kinds, range=_COLOURS[: len(kinds)])
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


def _panel(curves: Mapping[str, Curve], title: str, x_title: str, y_axis: alt.Axis) -> alt.Chart:
    """A line over steps for each rule."""
    axis = alt.Axis(title=x_title, labelExpr="format(datum.value, '~s')", tickCount=7)
    x = alt.X("x:Q", scale=alt.Scale(nice=False), axis=axis)
    return _lines(curves, title, x, alt.Y("y:Q", axis=y_axis))


def _frequency_panel(gains: Mapping[str, GainCurve]) -> alt.LayerChart:
    """The gains on two logarithmic axes, with a line at every power of ten; a band for an envelope."""
    curves = {name: gain.curve for name, gain in gains.items()}
    frequencies = min(c.x[0] for c in curves.values()), max(c.x[-1] for c in curves.values())
    limits = min(gain.bottom for gain in gains.values()), max(gain.top for gain in gains.values())
    x = alt.X("x:Q", scale=_log(frequencies), axis=_decades(frequencies, "frequency (rad/step)"))
    y = alt.Y("y:Q", scale=_log(limits), axis=_decades(limits, "gain"))
    layers = [_lines(curves, "Frequency response", x, y)]
    for colour, gain in zip(_COLOURS, gains.values(), strict=False):
        if gain.lower is not None:
            layers.append(_band(gain.lower, gain.curve, x, y, colour))
        elif gain.cutoff is not None and len(gains) == 1:
            layers += _half_power_mark(gain.cutoff, x, y)
    return alt.LayerChart(layer=layers)


def _band(lower: Curve, upper: Curve, x: alt.X, y: alt.Y, colour: str) -> alt.Chart:
    rows = [
        {"x": place, "y": low, "high": high}
        for place, low, high in zip(lower.x, lower.y, upper.y, strict=True)
    ]
    band: alt.Chart = (
        _chart(rows).mark_area(color=colour, opacity=0.3).encode(x=x, y=y, y2="high:Q")
    )
    return band


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


def _lines(curves: Mapping[str, Curve], title: str, x: alt.X, y: alt.Y) -> alt.Chart:
    rows = [
        {"x": place, "y": value, **({"rule": name} if len(curves) > 1 else {})}
        for name, curve in curves.items()
        for place, value in zip(*curve, strict=True)
    ]
    chart: alt.Chart = _chart(rows).mark_line(color=_BLUE).encode(x=x, y=y)
    if len(curves) > 1:
        scale = alt.Scale(domain=list(curves), range=_COLOURS[: len(curves)])
        chart = chart.encode(
            color=alt.Color("rule:N", scale=scale, legend=alt.Legend(title=None)),
            strokeDash=alt.StrokeDash("rule:N", sort=list(curves), legend=None),
        )
    sized: alt.Chart = chart.properties(title=title, width=_WIDTH, height=_HEIGHT)
    return sized


def _chart(rows: list[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=rows))
