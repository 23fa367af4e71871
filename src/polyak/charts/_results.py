"""Charts of advice and of coefficients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt

from polyak.charts import _drawing as draw
from polyak.rules import Exponential
from polyak.theory import Advice
from polyak.theory._curves import Curve

if TYPE_CHECKING:
    from polyak.offline import Synthesis
    from polyak.theory._synthesis import Fit


def advice_chart(advice: Advice) -> alt.TopLevelMixin:
    """Draw the gain of EMAs over their half-life in % of the run, a line for each noise of the model.

    One panel is at the live weights' best learning rate, the other at each average's own best.
    """
    emas = [gain for gain in advice.gains if isinstance(gain.rule, Exponential)]
    shares = [100 * gain.half_life / advice.steps for gain in emas]
    ends = min(shares) / 1.2, max(shares) * 1.2
    x = alt.X(
        "x:Q", scale=draw.log_scale(ends), axis=draw.few_decades(ends, "half-life (% of the run)")
    )
    # The losses of averages that are far too long would press the gains together.
    found = [value for gain in emas for value in (gain.same, gain.own)]
    most = max(*found, 0.01)
    scale = alt.Scale(nice=False, domainMin=max(min(*found, 0.0), -most), domainMax=1.1 * most)
    y = alt.Y("y:Q", scale=scale, axis=alt.Axis(title="gain (share of the loss)", format="%"))
    panels = []
    for at, title in (("same", "At the same learning rate"), ("own", "At its own learning rate")):
        curves: dict[str, Curve] = {}
        for batch in advice.batches:
            points = [
                (s, getattr(g, at)) for s, g in zip(shares, emas, strict=True) if g.batch == batch
            ]
            curves[f"batch {batch:g}"] = Curve(*map(list, zip(*points, strict=True)))
        zero = draw.points([{"y": 0}]).mark_rule(strokeDash=[6, 4], color=draw.GREY).encode(y="y:Q")
        lines = draw.lines(curves, title, x, y).mark_line(color=draw.BLUE, clip=True)
        panels.append(alt.LayerChart(layer=[lines, zero]))
    heading = f"EMA over {advice.steps} steps, {advice.schedule}: the noisy quadratic model"
    return draw.styled(alt.hconcat(*panels, spacing=30), heading)


def fit_chart(fit: Fit) -> alt.TopLevelMixin:
    """Draw the coefficient of each column, in the order in which the columns were given."""
    rows = [{"x": i, "y": c, "of": "column"} for i, c in enumerate(fit.coefficients.tolist())]
    return _coefficients(rows, "column", str(fit))


def synthesis_chart(made: Synthesis) -> alt.TopLevelMixin:
    """Draw the coefficient of each stored tensor by its time, in a colour for each stored average."""
    rows = [
        {"x": t.time, "y": t.coefficient, "of": f"{t.average} {t.slot}".strip()} for t in made.terms
    ]
    return _coefficients(rows, "time at which it was stored", str(made).partition(", from")[0])


def _coefficients(rows: list[dict[str, Any]], x: str, title: str) -> alt.TopLevelMixin:
    """Coefficients as lines from 0 to a point."""
    kinds = list(dict.fromkeys(row["of"] for row in rows))
    base = draw.points([row | {"zero": 0.0} for row in rows]).encode(
        x=alt.X("x:Q", title=x, scale=alt.Scale(zero=False)),
        y=alt.Y("y:Q", title="coefficient"),
        color=draw.colour_of("of", kinds, "stored"),
        tooltip=["of:N", "x:Q", "y:Q"],
    )
    layers = [base.mark_rule().encode(y2="zero:Q"), base.mark_point(filled=True, opacity=1)]
    return draw.styled(alt.LayerChart(layer=layers, width=draw.WIDE, height=draw.HIGH), title)
