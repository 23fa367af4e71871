"""The tables of the plan, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from plan_bytes import (
    BFLOAT16,
    FLOAT32,
    Layout,
    elements,
    expert_parallel,
    fully_sharded,
    hybrid,
    received,
    tensor_parallel,
    unevenness,
)
from plan_machine import MEMORY, NETWORK, host_seconds, step_seconds, update_seconds, write_seconds
from plan_models import KIMI_K2, LLAMA_1B, LLAMA_70B, MODELS, Model
from polyak.rules import Power, Rule, Tail, Uniform
from polyak.theory._synthesis import Column, fit
from sections import Section

RANKS = (8, 64, 512, 4096, 16384)
WINDOW = 8
STATE = 4 * FLOAT32
"""Bytes a parameter of FSDP2 with Adam in float32: weight, gradient, two moments."""

UPDATES, SNAPSHOTS = 20_000, 40
PAIRS = ((0.05, 0.10), (0.01, 0.05))
"""Relative standard deviations of the two power averages that are stored."""
WANTED: tuple[tuple[str, Rule | str], ...] = (
    ("EMA, half-life 0.5 % of the run", f"exponential(half_life={UPDATES // 200})"),
    ("EMA, 1 %", f"exponential(half_life={UPDATES // 100})"),
    ("EMA, 2 %", f"exponential(half_life={UPDATES // 50})"),
    ("EMA, 5 %", f"exponential(half_life={UPDATES // 20})"),
    ("power, relative std 0.15", Power.from_relative_std(0.15)),
    ("mean of the last 20 %", Tail(Uniform(), 0.8 * UPDATES)),
)

Row = tuple[str, ...]


def layouts(model: Model) -> Iterator[Layout]:
    """How a model might be spread at each number of ranks, then what is worth a comparison."""
    yield from map(_layout(model), RANKS)
    if model is LLAMA_1B:
        yield hybrid(16384, 64)
    if model is LLAMA_70B:
        yield tensor_parallel(16384, 8)
        yield hybrid(16384, 512)
    if model is KIMI_K2:
        yield fully_sharded(512)
        yield fully_sharded(16384)


def _layout(model: Model) -> Callable[[int], Layout]:
    if model is KIMI_K2:
        return lambda ranks: expert_parallel(ranks, min(ranks, 64))
    return fully_sharded


def _cases() -> list[tuple[Row, Model, Layout]]:
    """Every model in every layout, and the cells that name them."""
    pairs = [(model, layout) for model in MODELS for layout in layouts(model)]
    return [((m.name, str(each.ranks), each.name), m, each) for m, each in pairs]


def models() -> Section:
    """What is planned for."""
    rows: list[Row] = [
        (m.name, f"{m.numel:,}", f"{m.active:,.0f}", str(m.tensors), _time(step_seconds(m)), m.source)
        for m in MODELS
    ]  # fmt: skip
    header = ("model", "parameters", "a token passes", "tensors", "a step", "source of the shapes")
    return Section(
        "Models", header, rows, "Shapes: `benchmarks/plan_models.py`; buffers are left out."
    )


def overview() -> Section:
    """Memory and time of a rank in one table."""
    rows = [(*names, *_overview(model, layout)) for names, model, layout in _cases()]
    header: Row = ("model", "ranks", "layout", "weights, gradients, Adam", "one average")
    header += (f"Window({WINDOW})", "with one average, of 80 GB", "fullest rank over mean")
    header += ("an update, of a step",)
    note = (
        "Float32 on the fullest rank, which is rank 0. Two averages are twice one, bfloat16 is half. "
        "No activations, no buffers of communication."
    )
    return Section("Memory and time of a rank", header, rows, note)


def _overview(model: Model, layout: Layout) -> Row:
    state, one, _, window, _, share, uneven, _ = _memory(model, layout)
    return state, one, window, share, uneven, _times(model, layout)[3]


def memory() -> Section:
    """Bytes on the fullest rank."""
    rows = [(*names, *_memory(model, layout)) for names, model, layout in _cases()]
    header: Row = ("model", "ranks", "layout", "weights, gradients, Adam", "one average", "two")
    header += (f"Window({WINDOW})", "one in bfloat16", "with one average, of 80 GB")
    header += ("fullest rank over mean", "one average, last rank")
    note = (
        "Float32 on the fullest rank, which is rank 0, where nothing else is said; "
        f"{STATE} bytes a parameter beside the averages. No activations, no buffers of communication."
    )
    return Section("Memory of a rank", header, rows, note)


def _memory(model: Model, layout: Layout) -> Row:
    most = elements(model, layout, 0)
    last = elements(model, layout, layout.ranks - 1)
    sizes = (STATE, FLOAT32, 2 * FLOAT32, WINDOW * FLOAT32, BFLOAT16)
    share = _percent(most * (STATE + FLOAT32) / MEMORY)
    uneven = f"{unevenness(model, layout):.2f}"
    return (*(_size(most * each) for each in sizes), share, uneven, _size(last * FLOAT32))


def time() -> Section:
    """Seconds of an update on the fullest rank."""
    rows = [(*names, *_times(model, layout)) for names, model, layout in _cases()]
    header: Row = ("model", "ranks", "layout", "one average", "two", "one in bfloat16")
    header += ("one, of a step", "one in the host's memory")
    note = (
        "Lower bounds: the live weights are read once, every slot is read and written. A window copies into "
        "one of its slots: two thirds of one average. The last column brings the weights to the host and "
        "averages them there, beside the training."
    )
    return Section("Time of an update", header, rows, note)


def _times(model: Model, layout: Layout) -> Row:
    one = update_seconds(model, layout, 1, FLOAT32)
    two = update_seconds(model, layout, 2, FLOAT32)
    narrow = update_seconds(model, layout, 1, BFLOAT16)
    share = _percent(one / step_seconds(model))
    return _time(one), _time(two), _time(narrow), share, _time(host_seconds(model, layout))


def checkpoints() -> Section:
    """Bytes of a checkpoint, and how long it takes to write."""
    header: Row = ("model", "weights", "Adam", "each average", "all, with one average")
    header += ("written by 8 ranks", "by 64", "by 512 or more")
    note = (
        "Float32. Shards are not padded in a file, and replicas are written once: sizes are the same for all "
        "layouts. Seconds: of the fullest rank at 1 GB/s or of all at 200 GB/s, whichever is longer."
    )
    return Section("Checkpoints", header, [_checkpoint(model) for model in MODELS], note)


def _checkpoint(model: Model) -> Row:
    weights = model.numel * FLOAT32
    seconds = [write_seconds(model, _layout(model)(ranks), 4 * FLOAT32) for ranks in RANKS[:3]]
    sizes = (weights, 2 * weights, weights, 4 * weights)
    return (model.name, *map(_size, sizes), *map(_time, seconds))


def snapshots() -> Section:
    """Bytes of the snapshots for synthesis."""
    header: Row = (
        "model",
        "one snapshot",
        "in bfloat16",
        f"{SNAPSHOTS} and the first",
        "in bfloat16",
    )
    header += ("one in bfloat16, written by 512 ranks or more",)
    share = (SNAPSHOTS + 1) * snapshot_bytes(1, BFLOAT16) / (4 * FLOAT32)
    note = f"Of two averages each. In bfloat16 all take as much as {share:.1f} checkpoints with one average."
    return Section("Snapshots", header, [_snapshots(model) for model in MODELS], note)


def _snapshots(model: Model) -> Row:
    one = [snapshot_bytes(model.numel, each) for each in (FLOAT32, BFLOAT16)]
    run = [(SNAPSHOTS + 1) * each for each in one]
    written = write_seconds(model, _layout(model)(512), snapshot_bytes(1, BFLOAT16))
    return (model.name, *map(_size, one + run), _time(written))


def snapshot_bytes(numel: int, itemsize: int) -> int:
    """Bytes of the tensors of one snapshot of two averages."""
    return 2 * numel * itemsize


@cache
def synthesis() -> Section:
    """How exactly averages are made of so many snapshots of which averages."""
    cases = [(pair, count) for pair in PAIRS for count in (SNAPSHOTS // 2, SNAPSHOTS)]
    rows = [(name, *(_made(rule, *case) for case in cases)) for name, rule in WANTED]
    stored = (f"{count} of {' and '.join(map(str, pair))}" for pair, count in cases)
    most = 0.04 / torch.finfo(torch.bfloat16).eps
    note = (
        "Relative error, then amplification, of what is made at the end of a run, by `polyak.theory`: of two "
        "power averages of the relative stds above, stored so often at equal distances, and at the first update. "
        f"`polyak.synthesize` refuses errors above 5 %, and of bfloat16 amplifications above {most:.1f}."
    )
    return Section("What snapshots give", ("average made", *stored), rows, note)


def _made(rule: Rule | str, pair: tuple[float, float], count: int) -> str:
    times = [1, *(UPDATES * index // count for index in range(1, count + 1))]
    rules = map(Power.from_relative_std, pair)
    columns = [Column(stored, "average", update) for stored in rules for update in times]
    found = fit(columns, rule, [1.0] * UPDATES, norm="increments")
    return f"{_percent(found.relative_error)}, {found.amplification:.2f}"


def gathering() -> Section:
    """What it takes to apply an average that is sharded beside replicated weights."""
    rows = [(str(ranks), *_gathered(LLAMA_1B, fully_sharded(ranks))) for ranks in RANKS[:3]]
    header: Row = ("ranks", "weights, gradients, Adam", "one average, a rank's part")
    header += ("weights kept aside while applied", "received to apply it", "by network")
    others = " and ".join(f"{m.name} ({_size(m.numel * STATE)})" for m in MODELS[1:])
    note = (
        f"{LLAMA_1B.name} in float32, bytes of the fullest rank. To leave, nothing is sent. Weights that are "
        f"replicated, with gradients and Adam, are whole on every rank: {others} do not fit."
    )
    return Section("Averages sharded under DDP (`shard=`)", header, rows, note)


def _gathered(model: Model, layout: Layout) -> Row:
    part, got = elements(model, layout, 0) * FLOAT32, received(model, layout, FLOAT32)
    sizes = (model.numel * STATE, part, model.numel * FLOAT32, got)
    return (*map(_size, sizes), _time(got / NETWORK))


def points() -> list[dict[str, Any]]:
    """Bytes of one float32 average on the fullest rank, as the chart wants them."""
    pairs = [(model, _layout(model)(ranks)) for model in MODELS for ranks in RANKS]
    pairs += [(KIMI_K2, fully_sharded(ranks)) for ranks in RANKS]
    return [
        {
            "model": model.name,
            "ranks": layout.ranks,
            "GB": elements(model, layout, 0) * FLOAT32 / 1e9,
            "mean": model.numel * FLOAT32 / layout.ranks / 1e9,
            "layout": "experts spread" if "experts" in layout.name else layout.name,
        }
        for model, layout in pairs
    ]


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{_three(count / size)} {unit}"
    return f"{count:g} B"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds / 1e-6)} us"


def _percent(share: float) -> str:
    return f"{_three(100 * share)} %" if share >= 1e-4 else "< 0.01 %"


def _three(number: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"
