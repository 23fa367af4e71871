"""The chart of the report: the time of one update by library and model."""

from __future__ import annotations

from typing import Any

import altair as alt

from engine_cases import Cost, PeerTable

_OURS, _PEER = "#2a6fbb", "#777777"
_WIDTH = 250


def chart(peers: list[PeerTable]) -> alt.TopLevelMixin:
    """Update time over the raw lerp, by library and model; circles are float32, diamonds bfloat16."""
    panels = [_panel(table, first=i == 0) for i, table in enumerate(peers)]
    title = alt.TitleParams(
        "Time of one update, in raw foreach lerps of the same float32 weights",
        subtitle="logarithmic; the dashed line is the raw lerp; CPU, medians of interleaved runs",
        anchor="start",
        fontSize=15,
        subtitlePadding=6,
        offset=12,
    )
    whole: alt.HConcatChart = (
        alt.hconcat(*panels, spacing=18, title=title)
        .configure_axis(
            labelFontSize=11, titleFontSize=11, titleFontWeight="normal", labelLimit=220
        )
        .configure_view(stroke=None)
    )
    return whole


def _panel(table: PeerTable, *, first: bool) -> Any:
    y = alt.Y(
        "library:N",
        sort=list(table.costs),
        axis=alt.Axis(title=None, labels=first, ticks=False, domain=False, grid=True),
    )
    x = alt.X(
        "ratio:Q",
        scale=alt.Scale(type="log", domain=[0.8, 60], nice=False),
        axis=alt.Axis(title="x raw foreach", values=[1, 2, 5, 10, 20, 50], format="~g", grid=False),
    )
    base = alt.Chart(alt.InlineData(values=_points(table))).encode(y=y)
    marks = (
        base.transform_filter("isValid(datum.ratio)")
        .mark_point(size=80, filled=True)
        .encode(
            x=x,
            color=alt.condition("datum.library == 'polyak'", alt.value(_OURS), alt.value(_PEER)),
            shape=_by_weights(alt.Shape, ["circle", "diamond"]),
            opacity=_by_weights(alt.Opacity, [1, 0.55]),
        )
    )
    raises = (
        base.transform_filter("datum.text == 'raises'")
        .mark_text(align="right", dx=-2, dy=-6, fontSize=10, color="#666666")
        .encode(x=alt.value(_WIDTH), text=alt.Text("note:N"))
    )
    line = alt.Chart(alt.InlineData(values=[{"ratio": 1}])).mark_rule(strokeDash=[4, 3]).encode(x=x)
    title = f"{table.workload.name} ({table.parameters / 1e6:.3g} M)"
    return alt.layer(line, marks, raises).properties(width=_WIDTH, height=240, title=title)


def _by_weights(channel: Any, values: list[Any]) -> Any:
    """A channel of the chart that shows the dtype of the weights."""
    scale = alt.Scale(domain=["float32", "bfloat16"], range=values)
    return channel("weights:N", scale=scale, legend=alt.Legend(title="weights"))


def _points(table: PeerTable) -> list[dict[str, Any]]:
    """A mark for every cost, and a note for every library without one."""
    return [
        {
            "library": name,
            "weights": weights,
            "ratio": cost.timing.ratio if isinstance(cost, Cost) else None,
            "text": cost if isinstance(cost, str) else "",
            "note": f"{weights}: {cost}" if isinstance(cost, str) else "",
        }
        for name, costs in table.costs.items()
        for weights, cost in zip(("float32", "bfloat16"), costs, strict=True)
    ]
