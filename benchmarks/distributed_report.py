"""The report of averages on several ranks: targets, times, memory, refusals."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from distributed_contenders import FLOOR, FLOOR_OF_ROWS, HAND, POLYAK, POLYAK_SHARDED
from distributed_models import DDP, FSDP2, LARGE, SIZES, SMALL, shapes
from distributed_ranks import Found, Time
from sections import Section

MEBIBYTE = 1 << 20
ROUNDING = 1e-6
"""What float32 may differ by, relative to the largest weight."""
PACKAGES = ("ema-pytorch", "torch-ema", "diffusers")
Key = tuple[str, bool]
"""A size's name, and whether the decay changes."""


@dataclass(frozen=True)
class Timing:
    """Seconds of an update and of the floor's, and their ratios of processor time and by the clock.

    All are medians over rounds, of the slowest rank of each.
    """

    seconds: float
    floor: float
    ratio: float
    clock_ratio: float


@dataclass(frozen=True)
class Group:
    """A setting on so many ranks: what each found of a contender alone, and the times in turns."""

    setting: str
    world: int
    alone: dict[str, list[Found]]
    times: dict[Key, dict[str, Timing]]

    @property
    def title(self) -> str:
        """As in a heading."""
        return f"{self.setting}, {self.world} ranks"


def timing(by_rank: Sequence[list[list[Time]]]) -> Timing:
    """The times of a contender: rank -> round -> the floor and itself -> by the clock, of processor."""
    rounds = [
        [[max(rank[which][kind] for rank in ranks) for kind in (0, 1)] for which in (0, 1)]
        for ranks in zip(*by_rank, strict=True)
    ]
    return Timing(
        seconds=statistics.median(own[1] for _, own in rounds),
        floor=statistics.median(floor[1] for floor, _ in rounds),
        ratio=statistics.median(own[1] / floor[1] for floor, own in rounds),
        clock_ratio=statistics.median(own[0] / floor[0] for floor, own in rounds),
    )


def require_right(groups: list[Group]) -> None:
    """Raises `RuntimeError` unless this library ran everywhere, and gave the floor's average."""
    for group in groups:
        for name in (POLYAK, POLYAK_SHARDED):
            for rank, found in enumerate(group.alone.get(name, ())):
                said = found.refused or found.refused_later
                differences = (*found.differences, found.difference_later)
                if said or not max(differences) <= ROUNDING:
                    raise RuntimeError(
                        f"{group.title}, {name}, rank {rank}: {said or 'another average'}; it "
                        f"differs by {differences} from the floor, wanted at most {ROUNDING}"
                    )


def sections(groups: list[Group], growth: int) -> list[Section]:
    """The report, in the order of reading."""
    return [
        _targets(groups),
        *(section for group in groups for section in (_times(group), _memory(group, growth))),
        _refusals(groups),
    ]


def markdown(groups: list[Group], growth: int, command: str) -> str:
    """The whole report as a Markdown file."""
    parts = "\n".join(section.markdown() for section in sections(groups, growth))
    return f"# Averages on several ranks\n\n`{command}`: {_machine()}\n\n{_model()}\n\n{parts}"


def _machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{platform.machine()}, {os.cpu_count()} processors, gloo, one thread a rank "
        f"(OMP_NUM_THREADS=1), torch {torch.__version__}, {packages}, "
        f"Python {platform.python_version()}."
    )


def _model() -> str:
    sizes = [
        f"{size.name}: width {size.width}, {sum(s.numel() for s in shapes(size)) / 1e6:.1f} M numbers"
        for size in SIZES
    ]
    found = shapes(SMALL)
    return (
        f"The model is a transformer of {len(found)} float32 parameters ({'; '.join(sizes)}) and "
        f"{len(set(found))} shapes; some have rows that divide by neither 2 nor 4, one has 3."
    )


def _targets(groups: list[Group]) -> Section:
    rows = [row for group in groups for row in _time_targets(group)]
    rows += [row for group in groups if group.setting == DDP for row in _memory_targets(group)]
    note = "Peers are packages; loops by hand over DTensors are in the tables below."
    return Section("Targets", ("what", "wanted", "measured", "met"), rows, note)


def _time_targets(group: Group) -> list[tuple[str, ...]]:
    rows = []
    for (size, changing), times in group.times.items():
        title = f"{group.title}, {size} model, {_decay(changing)}"
        ours = times[POLYAK].ratio
        rows.append(_row(f"{title}: polyak over the floor", ours, "<=", 1.3))
        if group.setting == FSDP2:
            fastest = min(each.ratio for name, each in times.items() if _is_peer(name))
            rows.append(_row(f"{title}: fastest peer over polyak", fastest / ours, ">=", 10))
        else:
            parts = times[POLYAK_SHARDED].ratio / times[FLOOR_OF_ROWS].ratio
            rows.append(
                _row(f"{title}: {POLYAK_SHARDED}, over the floor of its rows", parts, "<=", 1.3)
            )
    return rows


def _memory_targets(group: Group) -> list[tuple[str, ...]]:
    """1/N, where rows are uneven a little more on the first ranks: that is their share of rows."""
    ours, full = (group.alone[name] for name in (POLYAK_SHARDED, FLOOR))
    return [
        _row(
            f"{group.title}, large model: {what} of polyak, shard, times ranks, of a full copy",
            max(getattr(each, field) for each in ours) * group.world / getattr(full[0], field),
            "<=",
            bound,
        )
        for what, field, bound in (("bytes held", "held", 1.01), ("resident", "resident", 1.05))
    ]


def _row(what: str, measured: float, sign: str, wanted: float) -> tuple[str, ...]:
    met = measured <= wanted if sign == "<=" else measured >= wanted
    return what, f"{sign} {wanted:g}", f"{measured:.3g}", "yes" if met else "no"


def _is_peer(name: str) -> bool:
    return not name.startswith((FLOOR, POLYAK, HAND))


def _decay(changing: bool) -> str:
    return "decay that changes" if changing else "fixed decay"


def _times(group: Group) -> Section:
    header = ["average", "first two updates, ms"]
    for size, changing in group.times:
        header += [f"{size}, {_decay(changing)}: us a parameter", "x floor"]
    header.append(f"{SMALL.name}, fixed decay: x floor by the clock")
    rows = [_time_row(group, name) for name in _that_run(group)]
    note = (
        "Microseconds of processor time of the slowest rank for each of the model's parameters, an "
        "update of all of them; medians over rounds of times, and of ratios to the floor right before. "
        "The clock also counts how long ranks wait for processors, which are fewer than four."
    )
    return Section(f"{group.title}: time of an update", tuple(header), rows, note)


def _time_row(group: Group, name: str) -> tuple[str, ...]:
    parameters = len(shapes(SMALL))
    cells = [name, f"{_most(group, name, 'first') * 1e3:.3g}"]
    for times in group.times.values():
        if name == FLOOR:
            spent = statistics.median(each.floor for each in times.values())
            cells += [f"{spent / parameters * 1e6:.3g}", "1"]
        else:
            spent = times[name].seconds
            cells += [f"{spent / parameters * 1e6:.3g}", f"{times[name].ratio:.2f}"]
    fixed = group.times[SMALL.name, False]
    return (*cells, "1" if name == FLOOR else f"{fixed[name].clock_ratio:.2f}")


def _memory(group: Group, growth: int) -> Section:
    grows = any(found[0].grown is not None for found in group.alone.values())
    header = ["average", "held, MiB", "resident, MiB", "more in an update, MiB"]
    header += [f"grown over {growth} updates, KiB"] * grows
    header += ["difference to the floor", "the same, updated after an evaluation"]
    rows = []
    for name in _that_run(group):
        cells = [f"{_most(group, name, f) / MEBIBYTE:.2f}" for f in ("held", "resident", "extra")]
        if grows:
            cells.append(f"{_most(group, name, 'grown') / 1024:.0f}")
        first = max(found.differences[0] for found in group.alone[name])
        later = f"{_most(group, name, 'difference_later'):.1g}"
        said = group.alone[name][0].refused_later
        rows.append((name, *cells, f"{first:.1g}", "raises" if said else later))
    note = (
        f"Of the rank with most. Memory of the {LARGE.name} model: bytes of the average's tensors, growth of "
        "the process, and its peak during an update beyond that; growth is the small model's, with a "
        "decay that changes. Differences after updates of changing weights, fixed decay, relative to "
        "the largest weight; those of an update right after a forward pass without a backward pass."
    )
    return Section(f"{group.title}: memory, and what is right", tuple(header), rows, note)


def _most(group: Group, name: str, field: str) -> float:
    return max(float(getattr(found, field)) for found in group.alone[name])


def _that_run(group: Group) -> list[str]:
    return [name for name, found in group.alone.items() if not found[0].refused]


def _refusals(groups: list[Group]) -> Section:
    worlds: dict[tuple[str, ...], list[str]] = {}
    for group in groups:
        for name, (found, *_) in group.alone.items():
            told = (("at once", found.refused), ("after an evaluation", found.refused_later))
            for when, said in told:
                if said:
                    key = (group.setting, name, when, said)
                    worlds.setdefault(key, []).append(str(group.world))
    rows = [(*key[:2], " and ".join(ranks), *key[2:]) for key, ranks in worlds.items()]
    note = "At once: what its constructor or its first two updates raised, or printed and raised."
    header = ("setting", "average", "ranks", "when", "said")
    return Section("What does not run", header, rows, note)
