"""What an average costs on 8 to 16 384 ranks: `python benchmarks/plan.py` fills docs/plan.md.

Nothing is measured. Bytes are exact: `tests/test_plan.py` compares them with what torch and polyak
allocate. Seconds are bytes over published bandwidths, so they are lower bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

from polyak.rules import Power, Rule, Tail, Uniform
from polyak.theory._synthesis import Column, fit

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
BEGIN, END = "<!-- begin: written by benchmarks/plan.py -->", "<!-- end -->"
FLOAT32, BFLOAT16 = 4, 2
# Bytes a parameter: of a training with Adam (weight, gradient, two moments), of what an update moves
# (the live weight is read, the slot read and written), of a snapshot of two averages.
STATE, MOVED, SNAPSHOT = 4 * FLOAT32, 3 * FLOAT32, 2 * BFLOAT16
MEMORY, BANDWIDTH, ARITHMETIC, TOKENS = 80e9, 3.35e12, 400e12, 8192  # of a rank: docs/plan.md
RANK_WRITES, ALL_WRITE = 1e9, 200e9
UPDATES, SNAPSHOTS = 20_000, 40
PAIRS = ((0.05, 0.10), (0.01, 0.05))  # relative stds of the two averages that are recorded
WANTED: dict[str, Rule | str] = {
    "EMA, half-life 1 % of the run": f"exponential(half_life={UPDATES // 100})",
    "EMA, half-life 2 %": f"exponential(half_life={UPDATES // 50})",
    "power, relative std 0.15": Power.from_relative_std(0.15),
    "mean of the last 20 %": Tail(Uniform(), 0.8 * UPDATES),
}


class Parameters(NamedTuple):
    """Parameters of one shape; `kind` tells how tensor and expert parallelism cut them."""

    shape: tuple[int, ...]
    times: int = 1
    kind: str = "whole"  # or "column", "row", "expert" (384 stacked ones, a token passes 8)


class Model(NamedTuple):
    """The parameters of a model, from its published config.json; buffers are left out."""

    name: str
    parameters: Sequence[Parameters]

    @property
    def numel(self) -> int:
        return sum(p.times * prod(p.shape) for p in self.parameters)

    @property
    def active(self) -> float:
        """The elements that a token passes."""
        idle = (p.times * prod(p.shape) for p in self.parameters if p.kind == "expert")
        return self.numel - sum(idle) * (1 - 8 / 384)


def parameters(**kinds: Iterable[tuple[tuple[int, ...], int]]) -> list[Parameters]:
    return [Parameters(*each, kind) for kind, shapes in kinds.items() for each in shapes]


def llama(d: int, n: int, keys: int, hidden: int, heads: int) -> list[Parameters]:
    """Words (`heads` times), queries, keys and values, gate and up; outputs, down; norms."""
    inner = [((d, d), n), ((keys, d), 2 * n), ((hidden, d), 2 * n)]
    row = [((d, d), n), ((d, hidden), n)]
    return parameters(column=[((128256, d), heads), *inner], row=row, whole=[((d,), 2 * n + 1)])


def kimi(d: int, n: int, query: int, key: int, dense: int, hidden: int) -> list[Parameters]:
    """Latent attention; a dense layer, then experts, each layer with a router and a shared one."""
    words, attention = ((163840, d), 2), [((64 * 192, query), n), ((64 * 256, key), n)]
    norms = [((query,), n), ((key,), n), ((d,), 2 * n + 1)]
    return parameters(
        column=[words, *attention, ((dense, d), 2), ((hidden, d), 2 * (n - 1))],
        row=[((d, 64 * 128), n), ((d, dense), 1), ((d, hidden), n - 1)],
        whole=[((query, d), n), ((key + 64, d), n), ((384, d), n - 1), *norms],
        expert=[((384, 2 * hidden, d), n - 1), ((384, d, hidden), n - 1)],
    )


LLAMA_1B = Model("Llama-3.2-1B", llama(2048, 16, 512, 8192, 1))
LLAMA_70B = Model("Llama-3-70B", llama(8192, 80, 1024, 28672, 2))
KIMI_K2 = Model("Kimi-K2", kimi(7168, 61, 1536, 512, 18432, 2048))
MODELS = (LLAMA_1B, LLAMA_70B, KIMI_K2)


class Spread(NamedTuple):
    """How parameters are spread: each cut is (dim, parts, stride), rank r has part r // stride % parts."""

    name: str
    ranks: int
    cuts: Callable[[Parameters], tuple[tuple[int, int, int], ...]]
    copies: int = 1  # how often each element exists


def fully_sharded(ranks: int) -> Spread:
    """FSDP2, and `Averager(..., shard=)` under DDP: the rows of every parameter over all ranks."""
    return Spread("rows over all", ranks, lambda _: ((0, ranks, 1),))


def hybrid(ranks: int, shard: int) -> Spread:
    """HSDP: rows over `shard` ranks, the same on each group of so many ranks."""
    return Spread(f"rows over {shard}", ranks, lambda _: ((0, shard, 1),), ranks // shard)


def tensor_parallel(ranks: int, tensor: int) -> Spread:
    """Columns or rows over `tensor` ranks, then rows over the others (FSDP2)."""
    first = {"column": ((0, tensor, 1),), "row": ((1, tensor, 1),)}
    last = (0, ranks // tensor, tensor)
    return Spread(f"tensor parallel {tensor}", ranks, lambda p: (*first.get(p.kind, ()), last))


def expert_parallel(ranks: int, experts: int) -> Spread:
    """Experts over `experts` ranks, then the rows of each over the others, as torchtitan does."""
    first = {"expert": ((0, experts, 1), (1, ranks // experts, experts))}
    others = ((0, ranks, 1),)
    return Spread(f"experts over {experts}", ranks, lambda p: first.get(p.kind, others))


def rows(length: int, parts: int, index: int) -> int:
    """How many of `length` rows a part has, as torch.chunk cuts: 10 in 4 parts are 3, 3, 3, 1."""
    most = -(-length // parts)
    return max(0, min(most, length - index * most))


def elements(model: Model, spread: Spread, rank: int) -> int:
    """How many elements of a model a rank holds; no rank holds more than rank 0."""
    total = 0
    for parameters in model.parameters:
        shape = list(parameters.shape)
        for dim, parts, stride in spread.cuts(parameters):
            shape[dim] = rows(shape[dim], parts, rank // stride % parts)
        total += parameters.times * prod(shape)
    return total


def made(rule: Rule | str, pair: tuple[float, float]) -> str:
    """The relative error and the amplification of an average made at the end of a run."""
    times = [1, *(UPDATES * i // SNAPSHOTS for i in range(1, SNAPSHOTS + 1))]
    columns = [Column(Power.from_relative_std(s), "average", t) for s in pair for t in times]
    fitted = fit(columns, rule, [1.0] * UPDATES, norm="increments")
    return f"{percent(fitted.relative_error)}, {fitted.amplification:.2f}"


def on_rank(model: Model, spread: Spread) -> tuple[str, ...]:
    most = elements(model, spread, 0)
    uneven = most * spread.ranks / (model.numel * spread.copies)
    step = 6 * model.active * TOKENS / ARITHMETIC
    share = most * MOVED / BANDWIDTH / step
    sizes = size(most * STATE), size(most * FLOAT32), percent(most * (STATE + FLOAT32) / MEMORY)
    return model.name, f"{spread.ranks:,}", spread.name, *sizes, f"{uneven:.2f}", percent(share)


def on_disk(model: Model) -> tuple[str, ...]:
    whole = model.numel * 4 * FLOAT32  # weights, Adam's two moments, an average
    fullest = elements(model, fully_sharded(64), 0) * 4 * FLOAT32
    seconds = f"{max(fullest / RANK_WRITES, whole / ALL_WRITE):.3g} s"
    snapshots = size((SNAPSHOTS + 1) * model.numel * SNAPSHOT)
    return model.name, size(whole / 4), size(whole), seconds, snapshots


def tables() -> str:
    few = [(LLAMA_1B, fully_sharded(n)) for n in (8, 16384)]
    few += [(LLAMA_70B, fully_sharded(n)) for n in (64, 512, 16384)]
    few += [(LLAMA_70B, hybrid(16384, 512)), (LLAMA_70B, tensor_parallel(16384, 8))]
    few += [(KIMI_K2, expert_parallel(n, 64)) for n in (512, 4096, 16384)]
    rank = [on_rank(*case) for case in [*few, (KIMI_K2, fully_sharded(16384))]]
    cells = [(name, *(made(rule, pair) for pair in PAIRS)) for name, rule in WANTED.items()]
    return "\n".join((
        table("model, ranks, spread, training, one average, both of 80 GB, fullest / mean, update / step", rank),
        table("model, each average, checkpoint with one, written by 64 ranks, 40 snapshots in bfloat16", map(on_disk, MODELS)),
        table("average made, from 0.05 and 0.1, from 0.01 and 0.05", cells),
    ))  # fmt: skip


def table(header: str, lines: Iterable[tuple[str, ...]]) -> str:
    cells = [header.split(", "), ["---"] * (header.count(", ") + 1), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def size(count: float) -> str:
    unit, name = next(u for u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if count >= 0.9995 * u[0])
    return f"{count / unit:.3g} {name}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share >= 1e-4 else "< 0.01 %"


def filled(page: str) -> str:
    """The page with its tables anew."""
    return f"{page.split(BEGIN)[0]}{BEGIN}\n\n{tables()}\n{END}{page.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
