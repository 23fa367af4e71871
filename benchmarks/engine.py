"""The cost of averaging: against other packages, against a raw foreach lerp, and as work grows.

Run: python benchmarks/engine.py [--quick]

It prints tables and writes `benchmarks/results/engine.md`, `.png`, `.svg` and the tables of
`docs/performance.md`. `--quick` takes a minute or two, measures smaller work in fewer rounds, and
writes nothing. Times are medians of ratios to a yardstick that runs right before each timing. timm is
measured if it is installed: `pip install --no-deps timm==1.0.31` is enough, because its module of
averages needs no torchvision.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console

import engine_cases as cases
from engine_models import GPT2, RESNET, TINY, WORKLOADS, Workload
from engine_report import Results, sections, write
from sections import wide_console

FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    rounds: dict[str, int]
    averages: tuple[int, ...]
    parameters: tuple[int, ...]
    tensors: tuple[int, ...]
    blocks: int


FULL = Plan(
    rounds={TINY.name: 61, RESNET.name: 41, GPT2.name: 21},
    averages=(1, 4, 8),
    parameters=(10_000_000, 30_000_000, 100_000_000, 300_000_000, 1_000_000_000),
    tensors=(10, 100, 1000, 10_000),
    blocks=3,
)
QUICK = Plan(
    rounds={TINY.name: 11, RESNET.name: 7, GPT2.name: 3},
    averages=(1, 4),
    parameters=(10_000_000, 100_000_000),
    tensors=(100, 1000),
    blocks=1,
)


def measure(plan: Plan, console: Console) -> Results:
    """Measures everything in the plan."""

    def step(title: str, work: Callable[[], T]) -> T:
        console.print(f"[dim]{title} ...[/dim]")
        gc.collect()
        return work()

    def over_models(title: str, work: Callable[[Workload, int], T]) -> list[T]:
        named = [(workload, plan.rounds[workload.name]) for workload in WORKLOADS]
        return [step(f"{title}, {each.name}", partial(work, each, n)) for each, n in named]

    peers = over_models("peers", cases.peers)
    several = [
        found
        for k in plan.averages
        for found in over_models(f"{k} averages", partial(cases.several, k))
    ]
    applied = over_models("applied()", cases.applied)
    share = step("training", lambda: cases.training_share(plan.blocks))
    growth = [
        step("growth", lambda: cases.growth_in_parameters(plan.parameters, plan.rounds[GPT2.name])),
        step("growth", lambda: cases.growth_in_tensors(plan.tensors, plan.rounds[TINY.name])),
    ]
    found = [each for each in several if each is not None]
    return Results(peers, found, applied, share, growth)


def main() -> None:
    """Measures, prints, and writes the results (not with --quick)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="smaller work, fewer rounds; writes nothing"
    )
    quick = parser.parse_args().quick
    console = wide_console()
    results = measure(QUICK if quick else FULL, console)
    for section in sections(results):
        section.print(console)
    if not quick:
        write(results, FOLDER, PAGE)
        console.print(f"written: {FOLDER / 'engine.md'}, .png, .svg; {PAGE}")


if __name__ == "__main__":
    main()
