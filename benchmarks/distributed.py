"""What averaging costs on several ranks, under FSDP2 and under DDP, and which packages run there at all.

Run: python benchmarks/distributed.py [--ranks 2 4] [--rounds 21] [--quick]

Ranks are real processes over gloo on the CPU, one thread each. Every contender first has processes of
its own, which find out whether it runs, what its first updates take, what memory it takes, whether
its average is right; then all that run are timed in turns, each right after the floor. It prints
its tables and writes `benchmarks/results/distributed.md`; `--quick` measures less and writes nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

import distributed_launch as launch
from distributed_contenders import FLOOR, contenders
from distributed_models import DDP, FSDP2, LARGE, SMALL
from distributed_ranks import Alone, Found, Race
from distributed_report import Group, Key, Timing, markdown, require_right, sections, timing

RESULT = Path(__file__).parent / "results" / "distributed.md"
GROWTH = 1000
RACES = ((SMALL, False), (SMALL, True), (LARGE, False))


def measure(ranks: list[int], rounds: int, growth: int, progress: Progress) -> list[Group]:
    """Every setting on every number of ranks; memory's growth, which no number changes, on the first."""
    groups = []
    for setting in (FSDP2, DDP):
        for world in ranks:
            updates = growth if world == ranks[0] else 0
            alone = measure_alone(setting, world, updates, progress)
            runs = tuple(n for n, found in alone.items() if n != FLOOR and not found[0].refused)
            groups.append(
                Group(setting, world, alone, race(setting, world, runs, rounds, progress))
            )
    return groups


def measure_alone(
    setting: str, world: int, growth: int, progress: Progress
) -> dict[str, list[Found]]:
    """Contender -> what each rank finds of it alone."""
    found = {}
    task = progress.add_task(f"{setting}, {world} ranks, alone", total=len(contenders(setting)))
    for name in contenders(setting):
        found[name] = [Found(**each) for each in launch.run(Alone(setting, name, growth), world)]
        progress.advance(task)
    return found


def race(
    setting: str, world: int, names: tuple[str, ...], rounds: int, progress: Progress
) -> dict[Key, dict[str, Timing]]:
    """Size and kind of decay -> contender -> its times against the floor."""
    found = {}
    task = progress.add_task(f"{setting}, {world} ranks, in turns", total=len(RACES))
    for size, changing in RACES:
        by_rank = launch.run(Race(setting, size, names, changing, rounds), world)
        found[size.name, changing] = {
            name: timing([each[name] for each in by_rank]) for name in names
        }
        progress.advance(task)
    return found


def main() -> None:
    """Measures, checks that averages are right, prints, and writes the result unless in a hurry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="less of everything; writes nothing")
    options = parser.parse_args()
    rounds, growth = (5, 100) if options.quick else (options.rounds, GROWTH)
    console = Console()
    launch.prepare()
    with Progress(console=console) as progress:
        groups = measure(options.ranks, rounds, growth, progress)
    require_right(groups)
    for section in sections(groups, growth):
        section.print(console)
    if not options.quick:
        listed = " ".join(map(str, options.ranks))
        command = f"python benchmarks/distributed.py --ranks {listed} --rounds {rounds}"
        RESULT.write_text(markdown(groups, growth, command))
        console.print(f"written: {RESULT}")


if __name__ == "__main__":
    main()
