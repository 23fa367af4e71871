"""The report: tables for the terminal and for Markdown, and one chart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine_cases import Applied, Cost, Growth, PeerTable, Several, Share
from engine_chart import chart
from engine_models import TINY
from sections import Section, machine

MEBIBYTE = 1 << 20
BEGIN = "<!-- engine: the lines down to the end mark are written by benchmarks/engine.py -->"
END = "<!-- engine: end -->"
EQUAL = 1.03
"""Times whose ratio is at most this count as equal: runs differ by as much."""


@dataclass(frozen=True)
class Results:
    """Everything that one run measured."""

    peers: list[PeerTable]
    several: list[Several]
    applied: list[Applied]
    share: Share
    growth: list[Growth]


def sections(results: Results) -> list[Section]:
    """The sections of the report, in order."""
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
    """One table of ratios for all libraries and models."""
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
        *(_row(f"time per {g.unit}, most expensive size over cheapest", g.spread, 1.2) for g in results.growth),
    ]  # fmt: skip
    note = f"Times within {EQUAL - 1:.0%} of each other count as equal."
    return Section("Targets", ("what", "wanted", "measured", "met"), rows, note)


def _missed(results: Results) -> Section:
    """For the page: the targets that were missed. The report has all."""
    all_of_them = _targets(results)
    missed = [row[:-1] for row in all_of_them.rows if row[-1] != "yes"]
    met = len(all_of_them.rows) - len(missed)
    note = f"{met} of {len(all_of_them.rows)} targets were met. {all_of_them.note}"
    return Section("Targets that were missed", all_of_them.header[:-1], missed, note)


def _peer_targets(results: Results) -> list[tuple[str, ...]]:
    rows = []
    for table in results.peers:
        name = table.workload.name
        ours, wide = (_cost(cost) for cost in table.costs["polyak"])
        limit = 1.15 if name == TINY.name else 1.1
        rows.append(_row(f"{name}, raw foreach = 1", ours.timing.ratio, limit))
        for column, (cost, dtype) in enumerate(((ours, "float32"), (wide, "bfloat16"))):
            over = cost.timing.ratio / _fastest_peer(table, column)
            # In float32 all are bound by memory on large tensors, and equal within the noise.
            limit = EQUAL if column == 0 else 1.0
            rows.append(_row(f"{name}, {dtype}, polyak over the fastest peer", over, limit))
        title = f"{name}, bfloat16 weights, float32 average, extra MiB"
        rows.append(_row(title, wide.extra / MEBIBYTE, 1))
    return rows


def _fastest_peer(table: PeerTable, column: int) -> float:
    """The smallest ratio among the other libraries: 0 is the float32 column, 1 is bfloat16."""
    found = [costs[column] for name, costs in table.costs.items() if name != "polyak"]
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
            _row(f"applied(), {each.workload}, slower direction, copy = 1",
                 max(each.enter, each.leave), 6.0 if each.workload == TINY.name else 2.2),
            _row(f"applied(), {each.workload}, extra MiB", each.extra / MEBIBYTE, 2),
        )
    ]  # fmt: skip


def _row(what: str, got: float, limit: float, form: str = "{:.2f}") -> tuple[str, ...]:
    return (what, f"<= {form.format(limit)}", form.format(got), _met(got <= limit))


def _met(yes: bool) -> str:
    return "yes" if yes else "no"


def _cost(cost: Cost | str) -> Cost:
    if isinstance(cost, str):
        raise ValueError(f"polyak's update was not measured: {cost}")
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
        "The limits are 1.5 times the time of one copy, or of one change in place, of a single tensor "
        "as large as all weights: these move twice the bytes of the weights, and a lerp three times."
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
    header = ("model", "k", "ms", "over k raw lerps", "ratio of bytes", "bfloat16 weights")
    note = "Float32. The last column has bfloat16 weights and float32 averages, over k raw float32 lerps."
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
    note = "The last column comes from ratios to one yardstick that ran in turns with each size."
    return Section(f"Cost per {growth.unit} as work grows", header, rows, note)


def _between_marks(page: str, tables: list[Section]) -> str:
    """The page, with these tables between its two marks."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    between = "\n".join(table.markdown() for table in tables)
    return f"{head}{BEGIN}\n\n{between}\n{END}{tail}"


def write(results: Results, folder: Path, page: Path) -> None:
    """Writes `engine.md`, the chart as `engine.png` and `engine.svg`, and the tables of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "engine.md").write_text(markdown(results))
    page.write_text(_between_marks(page.read_text(), [overview(results), _missed(results)]))
    picture = chart(results.peers)
    picture.save(folder / "engine.png", scale_factor=2)
    picture.save(folder / "engine.svg")
