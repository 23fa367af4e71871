"""The report: sections that print as tables and are written as Markdown, and one chart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt

from engine_cases import Applied, Cost, Growth, PeerTable, Several, Share
from sections import Section, machine

MEBIBYTE = 1 << 20
BEGIN = "<!-- engine: the lines down to the end mark are written by benchmarks/engine.py -->"
END = "<!-- engine: end -->"
EQUAL = 1.03
"""Times closer than this are the same: runs differ by as much."""


@dataclass(frozen=True)
class Results:
    """All that one run measured."""

    peers: list[PeerTable]
    several: list[Several]
    applied: list[Applied]
    share: Share
    growth: list[Growth]


def sections(results: Results) -> list[Section]:
    """The report, in the order of reading."""
    return [
        _targets(results),
        *(_peers(table) for table in results.peers),
        _several(results.several),
        _applied(results.applied),
        _share(results.share),
        *(_growth(growth) for growth in results.growth),
    ]


def markdown(results: Results) -> str:
    """The whole report as a Markdown file."""
    parts = "\n".join(section.markdown() for section in sections(results))
    return f"# Speed of the engine\n\n`python benchmarks/engine.py`: {machine()}\n\n{parts}"


def overview(results: Results) -> Section:
    """All libraries and models in one table of ratios."""
    names = [table.workload.name for table in results.peers]
    header = ("library", *(f"{name}, {dtype}" for name in names for dtype in ("fp32", "bf16")))
    rows = [
        (library, *(_ratio(cost) for table in results.peers for cost in table.costs[library]))
        for library in results.peers[0].costs
    ]
    return Section("One update, raw foreach lerp of float32 = 1", header, rows, machine())


def _ratio(cost: Cost | str) -> str:
    return cost if isinstance(cost, str) else f"{cost.timing.ratio:.2f}"


def _targets(results: Results) -> Section:
    rows = [
        *_peer_targets(results),
        *_several_targets(results.several),
        *_applied_targets(results.applied),
        _row("averaging's share of a training step, every=16", results.share.share, 0.01, "{:.2%}"),
        *(_row(f"time per {g.unit}, dearest over cheapest size", g.spread, 1.2) for g in results.growth),
    ]  # fmt: skip
    note = f"Times within {EQUAL - 1:.0%} of each other count as equal."
    return Section("Targets", ("what", "wanted", "measured", "met"), rows, note)


def _peer_targets(results: Results) -> list[tuple[str, ...]]:
    rows = []
    for table in results.peers:
        name = table.workload.name
        ours, wide = (_cost(cost) for cost in table.costs["polyak"])
        fastest = _fastest_peer(table)
        if name == "1000 tiny tensors":
            rows.append(_row(f"{name}, raw foreach = 1", ours.timing.ratio, 1.15))
            gain = fastest / ours.timing.ratio
            rows.append(
                (f"{name}, fastest peer over polyak", ">= 4", f"{gain:.1f}", _met(gain >= 4))
            )
            continue
        rows.append(_row(f"{name}, raw foreach = 1", ours.timing.ratio, 1.1))
        rows.append(
            _row(f"{name}, polyak over the fastest peer", ours.timing.ratio / fastest, EQUAL)
        )
        if name == "GPT-2 small":
            title = f"{name}, bfloat16 weights, float32 average"
            rows.append(_row(f"{title}, raw foreach = 1", wide.timing.ratio, 2.5))
            rows.append(_row(f"{title}, extra MiB", wide.extra / MEBIBYTE, 2))
    return rows


def _fastest_peer(table: PeerTable) -> float:
    """The smallest ratio among the peers' float32 updates."""
    found = [costs[0] for name, costs in table.costs.items() if name != "polyak"]
    return min(cost.timing.ratio for cost in found if isinstance(cost, Cost))


def _several_targets(found: list[Several]) -> list[tuple[str, ...]]:
    return [
        _row("GPT-2 small, 8 averages over 8 raw updates", each.timing.ratio, 0.85)
        for each in found
        if (each.workload, each.k) == ("GPT-2 small", 8)
    ]


def _applied_targets(found: list[Applied]) -> list[tuple[str, ...]]:
    return [
        row
        for each in found
        for row in (
            _row(f"applied(), {each.workload}, dearer way, copy = 1", max(each.enter, each.leave), 2.2),
            _row(f"applied(), {each.workload}, extra MiB", each.extra / MEBIBYTE, 2),
        )
    ]  # fmt: skip


def _row(what: str, got: float, limit: float, form: str = "{:.2f}") -> tuple[str, ...]:
    return (what, f"<= {form.format(limit)}", form.format(got), _met(got <= limit))


def _met(yes: bool) -> str:
    return "yes" if yes else "no"


def _cost(cost: Cost | str) -> Cost:
    if isinstance(cost, str):
        raise ValueError(f"polyak's update has no cost: {cost}")
    return cost


def _peers(table: PeerTable) -> Section:
    first = next(iter(table.limits.values()))
    rows: list[tuple[str, ...]] = [
        ("raw foreach lerp", _milliseconds(first.yardstick), "1.00", "0", "0", *[""] * 4)
    ]
    rows += [
        (f"limit by {name}", _milliseconds(1.5 * limit.seconds), f"{1.5 * limit.ratio:.2f}", *[""] * 6)
        for name, limit in table.limits.items()
    ]  # fmt: skip
    rows += [
        (name, *_cells(float32), *_cells(bfloat16))
        for name, (float32, bfloat16) in table.costs.items()
    ]
    header: tuple[str, ...] = ("library", "fp32, ms", "x raw", "extra MiB", "RSS MiB")
    header += ("bf16, ms", "x raw fp32", "extra MiB", "RSS MiB")
    note = (
        "The limits are 1.5 times one copy, or one change in place, of one tensor as large as all: "
        "a lerp moves three times the weights' bytes, those two."
    )
    title = f"{table.workload.name}: {table.parameters / 1e6:.3g} M parameters"
    return Section(title, header, rows, note)


def _cells(cost: Cost | str) -> tuple[str, ...]:
    if isinstance(cost, str):
        return (cost, "", "", "")
    return (
        _milliseconds(cost.timing.seconds),
        f"{cost.timing.ratio:.2f}",
        _mebibytes(cost.extra),
        _mebibytes(cost.resident),
    )


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.3g}"


def _mebibytes(count: int) -> str:
    return "0" if count == 0 else f"{count / MEBIBYTE:.1f}" if count >= 0.05 * MEBIBYTE else "< 0.1"


def _several(found: list[Several]) -> Section:
    rows: list[tuple[str, ...]] = [
        (each.workload, str(each.k), _milliseconds(each.timing.seconds),
         f"{each.timing.ratio:.2f}", f"{each.bytes_ratio:.2f}", f"{each.narrow.ratio:.2f}")
        for each in found
    ]  # fmt: skip
    header = ("model", "k", "ms", "over k raw lerps", "bytes say", "bfloat16 weights")
    note = (
        "Float32; in the last column bfloat16 weights, float32 averages, over k raw float32 lerps."
    )
    return Section("Several averages in one pass", header, rows, note)


def _applied(found: list[Applied]) -> Section:
    rows: list[tuple[str, ...]] = [
        (each.workload, _milliseconds(each.copy_seconds), f"{each.enter:.2f}",
         f"{each.leave:.2f}", _mebibytes(each.extra))
        for each in found
    ]  # fmt: skip
    header = ("model", "raw copy, ms", "enter, x copy", "leave, x copy", "extra MiB")
    return Section("`applied()`", header, rows, "An exchange moves twice the bytes of a copy.")


def _share(share: Share) -> Section:
    row = (
        _milliseconds(share.step_seconds),
        f"{share.share:.2%}",
        *(f"{x:.4f}" for x in share.half_lives),
    )
    header = ("step, ms", "share of `update()`", "half-life, every=1", "half-life, every=16")
    note = "GPT-2 small, one sequence of 64 tokens: forward, backward, AdamW. Half-lives in steps."
    return Section("Share of a training step, every=16", header, [row], note)


def _growth(growth: Growth) -> Section:
    least = min(growth.relative.values())
    rows: list[tuple[str, ...]] = [
        (f"{size:,}", f"{taken * 1e9:.3g}", f"{growth.relative[size] / least:.2f}")
        for size, taken in growth.seconds.items()
    ]
    header = (f"{growth.unit}s", f"ns per {growth.unit}", "over the cheapest")
    note = "The last column is by ratios to one yardstick, run in turns with each size."
    return Section(f"Cost per {growth.unit} as work grows", header, rows, note)


def _between_marks(page: str, tables: list[Section]) -> str:
    """The page with the tables between its two marks."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    between = "\n".join(table.markdown() for table in tables)
    return f"{head}{BEGIN}\n\n{between}\n{END}{tail}"


_OURS, _PEER = "#2a6fbb", "#777777"
_WIDTH = 250


def chart(results: Results) -> alt.TopLevelMixin:
    """Update time over raw foreach, by library and model; circles for float32, diamonds for bfloat16."""
    panels = [_panel(table, first=i == 0) for i, table in enumerate(results.peers)]
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
    """Precision as a channel."""
    scale = alt.Scale(domain=["float32", "bfloat16"], range=values)
    return channel("weights:N", scale=scale, legend=alt.Legend(title="weights"))


def _points(table: PeerTable) -> list[dict[str, Any]]:
    """A mark for every cost, and a note for every library that refuses."""
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


def write(results: Results, folder: Path, page: Path) -> None:
    """`engine.md`, the chart as `engine.png` and `engine.svg`, and the tables within the page's marks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "engine.md").write_text(markdown(results))
    page.write_text(_between_marks(page.read_text(), [overview(results), _targets(results)]))
    picture = chart(results)
    picture.save(folder / "engine.png", scale_factor=2)
    picture.save(folder / "engine.svg")
