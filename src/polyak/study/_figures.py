"""Figures: the article's two panels, and what a single run cannot show, as altair charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import numpy as np

from polyak.rules import LIVE
from polyak.study import _article as article
from polyak.study import _quantities as q
from polyak.study._record_format import Record
from polyak.study._statistics import bootstrap

Records = Sequence[Record]
Rows = list[dict[str, Any]]
Chart = Any  # what altair's fluent calls are to a type checker

TRAIN_NAME, LIVE_NAME, EMA_NAME = "train", "live", "EMA"
COLOURS = {TRAIN_NAME: "#8a8f98", LIVE_NAME: "#c8553d", EMA_NAME: "#1b6ca8"}
ARTICLE_COLOUR = "#2f2f2f"
FONT = "Helvetica, Arial, DejaVu Sans, sans-serif"
LOSS_CURVES = {
    "train_loss": TRAIN_NAME,
    "val_loss_original": LIVE_NAME,
    "val_loss_ema": EMA_NAME,
}
R2_CURVES = {"r2_original": LIVE_NAME, "r2_ema": EMA_NAME}


def charts(records: Records) -> dict[str, Chart]:
    """name -> chart, in the order of the report."""
    made = {
        "curves": curves(records),
        "one_seed": one_seed(records[0]),
        "final": final(records),
        "epochs": epochs(records),
        "arms": arms(records),
        "after_stop": after_stop(records),
    }
    return {name: _styled(chart) for name, chart in made.items()}


def curves(records: Records) -> Chart:
    """The article's figure over seeds: the median and the middle 80 % of seeds, by epoch."""
    losses = _band(_spread(records, LOSS_CURVES), "loss (MSE), log scale", _log_loss())
    scale = alt.Scale(domain=[0.96, 1.0])
    return alt.hconcat(losses, _band(_spread(records, R2_CURVES), "R² on validation", scale))


def one_seed(record: Record) -> Chart:
    """The article's figure of a single run."""
    losses = _lines(_single(record, LOSS_CURVES), "loss (MSE), log scale", _log_loss())
    scale = alt.Scale(domain=[0.96, 1.0])
    return alt.hconcat(losses, _lines(_single(record, R2_CURVES), "R² on validation", scale))


def final(records: Records) -> Chart:
    """The pair of each seed at the stop, and the distribution of the paired relative difference."""
    rows = [
        {
            "seed": r["seed"],
            "live": r["live"]["mse"],
            "EMA": r["average"]["mse"],
            "improvement": 100 * -math.expm1(-q.log_improvement(r, "mse")),
        }
        for r in records
    ]
    return alt.hconcat(_pairs(rows), _differences(rows))


def epochs(records: Records) -> Chart:
    """The epochs of the events of claims 2 to 4 over seeds, and in the article's run."""
    events: dict[str, tuple[float, Callable[[Record], float]]] = {
        "epoch of the live model's lowest loss": (
            article.BEST_LIVE[0],
            lambda r: r["best"]["live"]["epoch"],
        ),
        "epoch from which the EMA stays better until the stop (never: stop + 1)": (
            article.OVERTAKING_EPOCH,
            q.overtaking,
        ),
        "epoch of the early stop": (article.STOP_EPOCH, lambda r: r["stop_epoch"]),
    }
    longest = max(r["stop_epoch"] for r in records) + 5
    panels = []
    for title, (theirs, event) in events.items():
        rows = [{"epoch": event(r)} for r in records]
        panels.append(_histogram(rows, title, theirs, longest))
    return alt.vconcat(*panels)


def arms(records: Records) -> Chart:
    """The paired difference between the MSE of every arm and of the live model, with its interval."""
    rows = []
    for name in (n for n in records[0]["arms"] if n != LIVE):
        pairs = zip(q.per_seed(records, name, "mse"), q.per_seed(records, LIVE, "mse"), strict=True)
        mean = bootstrap([1000 * (arm - live) for arm, live in pairs])
        rows.append({"arm": name, "mean": mean.estimate, "low": mean.low, "high": mean.high})
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("arm:N", sort=None, title=None), tooltip=_tips("arm:N", "mean:Q", "low:Q", "high:Q")
    )
    title = "MSE − live model's, ×10³ (mean over seeds, 95 % interval); left of 0 is better"
    bars = base.mark_rule(strokeWidth=2, color=COLOURS[EMA_NAME]).encode(
        x=alt.X("low:Q", title=title, axis=alt.Axis(tickCount=8)), x2="high:Q"
    )
    points = base.mark_point(filled=True, size=70, color=COLOURS[EMA_NAME], opacity=1).encode(
        x="mean:Q"
    )
    return (_rule(0, "x") + bars + points).properties(width=820, height=340)


def after_stop(records: Records) -> Chart:
    """The validation losses around the stop, divided by the EMA's loss at the stop."""
    rows: Rows = []
    whole = [r for r in records if r["stop_epoch"] >= q.LAST]
    for name, label in (("val_loss_original", LIVE_NAME), ("val_loss_ema", EMA_NAME)):
        matrix = np.array([_around_stop(r, name) for r in whole])
        rows += _quantile_rows(matrix, label, first=1 - q.LAST)
    title, x_title = "loss / the EMA's loss at the stop", "epochs from the early stop"
    chart = _band(rows, title, alt.Scale(zero=False), x_title=x_title)
    return (chart + _rule(0, "x")).properties(width=820)


def _around_stop(record: Record, name: str) -> list[float]:
    """The losses of the last 20 epochs and of those after the stop, divided by the EMA's loss at it."""
    values = [*record["history"][name][-q.LAST :], *record["after_stop"][name]]
    return [value / record["average"]["mse"] for value in values]


def _spread(records: Records, names: dict[str, str]) -> Rows:
    """Quantiles over the seeds still running, for each epoch that at least half of the seeds reach."""
    longest = int(np.median([r["stop_epoch"] for r in records]))
    rows: Rows = []
    for name, label in names.items():
        for epoch in range(1, longest + 1):
            running = [r["history"][name][epoch - 1] for r in records if r["stop_epoch"] >= epoch]
            rows += _quantile_rows(np.array(running)[:, None], label, first=epoch)
    return rows


def _quantile_rows(matrix: np.ndarray[Any, Any], label: str, first: int) -> Rows:
    """The median and the middle 80 % over seeds of each column; a column is an epoch."""
    return [
        {
            "epoch": first + i,
            "curve": label,
            "median": float(np.median(column)),
            "low": float(np.quantile(column, 0.1)),
            "high": float(np.quantile(column, 0.9)),
            "seeds": len(column),
        }
        for i, column in enumerate(matrix.T)
    ]


def _single(record: Record, names: dict[str, str]) -> Rows:
    return [
        {"epoch": i + 1, "curve": label, "median": value}
        for name, label in names.items()
        for i, value in enumerate(record["history"][name])
    ]


def _band(rows: Rows, title: str, scale: alt.Scale, x_title: str = "epoch") -> Chart:
    """Bands of the middle 80 % of seeds under lines of the median."""
    x = alt.X("epoch:Q", title=x_title, axis=alt.Axis(format="d"))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=_colour(rows))
    band = base.mark_area(opacity=0.22, clip=True).encode(
        y=alt.Y("low:Q", title=title, scale=scale), y2="high:Q"
    )
    tips = _tips("curve:N", "epoch:Q", "median:Q", "low:Q", "high:Q", "seeds:Q")
    line = base.mark_line(strokeWidth=2, clip=True).encode(y="median:Q", tooltip=tips)
    return (band + line).properties(width=455, height=320)


def _lines(rows: Rows, title: str, scale: alt.Scale) -> Chart:
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_line(strokeWidth=1.6, clip=True)
        .encode(
            x=alt.X("epoch:Q", title="epoch", axis=alt.Axis(format="d")),
            y=alt.Y("median:Q", title=title, scale=scale),
            color=_colour(rows),
            tooltip=_tips("curve:N", "epoch:Q", "median:Q"),
        )
        .properties(width=455, height=320)
    )


def _pairs(rows: Rows) -> Chart:
    """Live against EMA: a point per seed, equality as a diagonal, the article's run as a cross."""
    edge = 1.08 * max(max(row["live"], row["EMA"]) for row in rows)
    scale = alt.Scale(domain=[0, edge], nice=False)
    points = (
        alt.Chart(alt.Data(values=rows))
        .mark_circle(size=45, opacity=0.75, color=COLOURS[EMA_NAME])
        .encode(
            x=alt.X("live:Q", title="MSE of the live model at the stop", scale=scale),
            y=alt.Y("EMA:Q", title="MSE of the EMA at the stop", scale=scale),
            tooltip=_tips("seed:Q", "live:Q", "EMA:Q"),
        )
    )
    ends = [{"live": 0, "EMA": 0}, {"live": edge, "EMA": edge}]
    diagonal = alt.Chart(alt.Data(values=ends)).mark_line(strokeDash=[4, 3], color="#888")
    live, average, _ = article.TABLE_FINAL["mse"]
    theirs = alt.Chart(alt.Data(values=[{"live": live, "EMA": average, "label": "the article"}]))
    mark = theirs.mark_point(shape="cross", filled=True, size=130, color=ARTICLE_COLOUR, opacity=1)
    name = theirs.mark_text(align="left", dx=9, color=ARTICLE_COLOUR).encode(text="label:N")
    return alt.layer(
        diagonal.encode(x="live:Q", y="EMA:Q"), points,
        *(layer.encode(x="live:Q", y="EMA:Q") for layer in (mark, name)),
    ).properties(width=360, height=360, title="below the diagonal the EMA is better")  # fmt: skip


def _differences(rows: Rows) -> Chart:
    theirs = 100 * article.TABLE_FINAL["mse"][2]
    gains = [row["improvement"] for row in rows]
    ticks = list(range(20 * math.floor(min(gains) / 20), 20 * math.ceil(max(gains) / 20) + 1, 20))
    x = alt.X(
        "improvement:Q",
        bin=alt.Bin(step=10),
        title="MSE of the EMA below the live model's (%)",
        axis=alt.Axis(values=ticks),
    )
    layers = _bars(rows, x) + _rule(0, "x") + _article_line(theirs)
    title = f"right of 0 the EMA is better; dashed: the article, {theirs:g} %"
    return layers.properties(width=520, height=360, title=title)


def _histogram(rows: Rows, title: str, theirs: float, longest: int) -> Chart:
    x = alt.X(
        "epoch:Q",
        bin=alt.Bin(step=5),
        title="epoch",
        scale=alt.Scale(domain=[0, longest], nice=False),
        axis=alt.Axis(values=list(range(0, longest, 20))),
    )
    layers = _bars(rows, x) + _article_line(theirs)
    return layers.properties(
        width=820, height=110, title=f"{title}; dashed: the article, {theirs:g}"
    )


def _bars(rows: Rows, x: alt.X) -> Chart:
    bars = alt.Chart(alt.Data(values=rows)).mark_bar(color=COLOURS[EMA_NAME], opacity=0.8)
    return bars.encode(x=x, y=alt.Y("count():Q", title="seeds", axis=alt.Axis(tickMinStep=1)))


def _article_line(value: float) -> Chart:
    """A vertical line at the value of the article's run."""
    data = alt.Chart(alt.Data(values=[{"at": value}]))
    return data.mark_rule(color=ARTICLE_COLOUR, strokeWidth=2, strokeDash=[6, 3]).encode(x="at:Q")


def _rule(value: float, axis: str) -> Chart:
    data = alt.Chart(alt.Data(values=[{"at": value}]))
    return data.mark_rule(color="#888").encode(**{axis: "at:Q"})


def _colour(rows: Rows) -> alt.Color:
    names = list(dict.fromkeys(row["curve"] for row in rows))
    scale = alt.Scale(domain=names, range=[COLOURS[name] for name in names])
    legend = alt.Legend(orient="top", symbolType="stroke", symbolOpacity=1)
    return alt.Color("curve:N", title=None, scale=scale, legend=legend)


def _log_loss() -> alt.Scale:
    return alt.Scale(type="log", domain=[0.001, 1.0])


def _tips(*fields: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(field, format=".4~g") if field.endswith("Q") else alt.Tooltip(field)
            for field in fields]  # fmt: skip


def _styled(chart: Any) -> Chart:
    """The common style of all charts."""
    return (
        chart.configure(font=FONT, background="white")
        .configure_axis(
            labelFontSize=11, titleFontSize=12, gridColor="#e6e6e6", titleFontWeight="normal"
        )
        .configure_legend(labelFontSize=12, symbolStrokeWidth=3)
        .configure_title(fontSize=12, fontWeight="normal", anchor="start", color="#444")
        .configure_view(stroke="#cccccc")
    )
