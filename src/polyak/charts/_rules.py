"""Charts of what rules average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import altair as alt

from polyak._checks import require
from polyak.charts import _drawing as draw
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
    from polyak.offline import Description

# "2k" for 2000; the prefix of 0.5 would be milli.
_STEPS = "format(datum.value, abs(datum.value) < 1000 ? '~g' : '~s')"


def rule_chart(
    rule: Rule | str | Explanation | Sequence[Rule | str | Explanation],
    steps: int | None = None,
    *,
    every: int = 1,
) -> alt.TopLevelMixin:
    """Draw four panels on what a rule, or each of several, averages after `steps` steps.

    The profile by age, the step response by the age of the jump, the frequency response with its
    -3 dB point, the equivalent learning-rate schedule by step. Several rules are lines of several
    colours. An `Explanation` in place of a rule brings its steps and cadence. Errors: those of
    `theory.explain`; `ValueError` for no rule, and for more than six.
    """
    rules = [rule] if isinstance(rule, Rule | str | Explanation) else list(rule)
    require(
        1 <= len(rules) <= len(draw.COLOURS),
        "rules",
        len(rules),
        f"1 to {len(draw.COLOURS)} of them",
    )
    abouts = [
        each if isinstance(each, Explanation) else explain(each, steps, every=every)
        for each in rules
    ]
    drawn = {_label(about, abouts): _Drawn.of(about) for about in abouts}
    coefficient = alt.Axis(labelExpr=draw.NUMBER, title="coefficient of the step's live weights")
    shown, rate = "share of a jump that the average shows", "multiplier of the learning rate"
    panels = (
        _panel({k: d.profile for k, d in drawn.items()}, "Profile", "age (steps before the last)", coefficient),
        _panel({k: d.step for k, d in drawn.items()}, "Step response", "age of the jump (steps)", alt.Axis(title=shown)),
        _frequency_panel({k: d.gain for k, d in drawn.items()}),
        _panel({k: d.rate for k, d in drawn.items()}, "Equivalent learning-rate schedule", "step", alt.Axis(title=rate)),
    )  # fmt: skip
    heading = abouts[0].title() if len(abouts) == 1 else f"What {len(abouts)} rules average"
    return draw.styled(alt.concat(*panels, columns=2, spacing=30), heading)


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


def description_chart(found: Description) -> alt.TopLevelMixin:
    """Draw the `rule_chart` of a file's averages at the file's clock; averages of unknown rules are left out."""
    rules = [
        a.rule for a in found.averages.values() if a.rule is not None and a.half_life is not None
    ]
    if not rules or not found.count:
        raise LookupError(
            f"{found.path} has no average whose rule and clock are known, so there is nothing to draw"
        )
    return rule_chart(list(dict.fromkeys(rules))[: len(draw.COLOURS)], found.count)


def _panel(curves: Mapping[str, Curve], title: str, x_title: str, y_axis: alt.Axis) -> alt.Chart:
    """A line over steps for each rule."""
    axis = alt.Axis(title=x_title, labelExpr=_STEPS, tickCount=7)
    x = alt.X("x:Q", scale=alt.Scale(nice=False), axis=axis)
    return draw.lines(curves, title, x, alt.Y("y:Q", axis=y_axis))


def _frequency_panel(gains: Mapping[str, GainCurve]) -> alt.LayerChart:
    """The gains on two logarithmic axes, with a line at every power of ten; a band for an envelope."""
    curves = {name: gain.curve for name, gain in gains.items()}
    frequencies = min(c.x[0] for c in curves.values()), max(c.x[-1] for c in curves.values())
    limits = min(gain.bottom for gain in gains.values()), max(gain.top for gain in gains.values())
    x = alt.X(
        "x:Q",
        scale=draw.log_scale(frequencies),
        axis=draw.decades(frequencies, "frequency (rad/step)"),
    )
    y = alt.Y("y:Q", scale=draw.log_scale(limits), axis=draw.decades(limits, "gain"))
    layers = [draw.lines(curves, "Frequency response", x, y)]
    for colour, gain in zip(draw.COLOURS, gains.values(), strict=False):
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
        draw.points(rows).mark_area(color=colour, opacity=0.3).encode(x=x, y=y, y2="high:Q")
    )
    return band


def _half_power_mark(cutoff: float, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """The -3 dB point and its label, on the side without the curve, with a white halo."""
    label = f"-3 dB at {cutoff:.3g} rad/step"
    point = draw.points([{"x": cutoff, "y": 0.5**0.5, "label": label}]).encode(x=x, y=y)
    right, left = {"align": "left", "dx": 9, "dy": -7}, {"align": "right", "dx": -5, "dy": 14}
    dot = point.mark_point(filled=True, size=70, color=draw.RED, opacity=1)
    return draw.labelled(point, dot, **(right if cutoff < 0.1 else left))
