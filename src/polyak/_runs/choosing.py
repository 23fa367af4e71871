"""Choose which checkpoints of a run to use, in the order of their steps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polyak._checks import is_integer, listed, require, require_positive
from polyak._runs import clocks
from polyak._runs.clocks import Ordered, Timed
from polyak._runs.finding import RunFolder, entry, found
from polyak._runs.metrics import Better, direction, metric

_SLACK = 1e-9


@dataclass(frozen=True)
class RunFile(os.PathLike[str]):
    """A checkpoint of a run; every call that takes a path takes it.

    Attributes:
        path: the file or folder that `polyak.checkpoints.read` reads.
        at: its step, or its epoch, time or number, by the choice's `unit`.
        quality: the metric by which it was chosen, or None.
    """

    path: Path
    at: float
    quality: float | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Choice:
    """Checkpoints that were chosen, the oldest first.

    Attributes:
        files: the checkpoints, in the order of their steps.
        unit: what their `at` counts: "step", "epoch", "time" (seconds) or "number".
        metric, better: by which the best were chosen, or None.
        aside: what was found and not taken: path -> why.
    """

    files: tuple[RunFile, ...]
    unit: str
    metric: str | None = None
    better: Better | None = None
    aside: Mapping[Path, str] = field(default_factory=dict)


def choose(
    run: Path | str | Sequence[Path | str],
    *,
    last: int | None = None,
    best: int | None = None,
    by: str | None = None,
    better: Better | None = None,
    steps: tuple[int | None, int | None, int | None] | None = None,
    window: float | None = None,
    file: str | None = None,
) -> Choice:
    """Choose checkpoints of a run, in the order of the steps in their names or files.

    `run` is the folder of a run, of any trainer: files such as `step-1000.pt`, `epoch=3-step=64.ckpt` or
    `12epoch.pth`, or folders such as `checkpoint-500`, `iter_0001000`, `global_step100` or
    `CKPT+2026-01-01+10-00-00+00`, in it or up to three levels down. Or it is a list of checkpoints. Neither
    the order of a list nor the times of files count.

    >>> import tempfile, torch
    >>> run = Path(tempfile.mkdtemp())
    >>> for step, loss in ((900, 0.5), (1000, 0.3), (1100, 0.4)):
    ...     torch.save({"w": torch.ones(2)}, run / f"step={step}-val_loss={loss}.pt")
    >>> [file.path.name for file in choose(run, last=2).files]
    ['step=1000-val_loss=0.3.pt', 'step=1100-val_loss=0.4.pt']
    >>> [(file.at, file.quality) for file in choose(run, best=2, by="val_loss").files]
    [(1000.0, 0.3), (1100.0, 0.4)]

    Args:
        last: how many checkpoints to take, those with the largest steps.
        best: how many checkpoints to take, those with the best metric `by`; of equal ones the later.
        by: a metric that the trainer wrote: in the files' names, in the files, in Lightning's
            `best_k_models`, in transformers' `trainer_state.json`, or beside in CSV, JSON lines, YAML or
            TensorBoard's files.
        better: "lower" or "higher"; by default what is usual for the metric's name.
        steps: (first, last, distance), each of them or None: the checkpoints from one step to
            another, and of them those whose distance from the first is a multiple.
        window: a number of steps: take the checkpoints that are closer than this to the last one.
        file: the name of the file of weights in each checkpoint's folder, if there are several.

    `steps` may be given together with one of the others, which then chooses among these steps. Without
    any, all checkpoints are taken. Copies (`last.ckpt`) and averages (`avg_10.pt`) are left out.

    Raises `ValueError` for a run without checkpoints, without a known order, or with too few; for
    several runs in one folder; for steps that are not there; for a metric that was not written.
    """
    given = [n for n, v in (("last", last), ("best", best), ("window", window)) if v is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given, wanted one of them")
    if (best is None) != (by is None):
        raise ValueError(f"best is {best!r} and by is {by!r}: give both (--best N --by METRIC)")
    place, listed = _place(run, file)
    order = _order(listed, place, by, given=not isinstance(run, (str, os.PathLike)))
    timed = order.timed if steps is None else _of_steps(order, steps)
    name, qualities = (None, {}) if by is None else _qualities(timed, by, place)
    direct = None if name is None else direction(name, better)
    among = [each.entry.named for each in timed if name is not None]
    unjudged = [path for path in among if path not in qualities]
    if best is not None and direct is not None:
        timed = _best(timed, qualities, _counted("best", best, len(qualities)), direct)
    elif last is not None:
        timed = timed[-_counted("last", last, len(timed)) :]
    elif window is not None:
        timed = _window(order, timed, window)
    files = tuple(
        RunFile(
            each.entry.named if file is None else each.entry.weights,
            each.clock[order.unit],
            qualities.get(each.entry.named),
        )
        for each in timed
    )
    aside = listed.aside | order.aside | dict.fromkeys(unjudged, f"it has no {name}")
    return Choice(files, order.unit, name, direct, aside)


def _place(run: Path | str | Sequence[Path | str], file: str | None) -> tuple[Path, RunFolder]:
    """The folder of a run, and the checkpoints there; or those of a list."""
    if isinstance(run, (str, os.PathLike)):
        return Path(run), found(Path(run), file)
    paths = [Path(path) for path in run]
    require(len(paths) > 0, "run", run, "a folder, or one checkpoint or more")
    entries = [entry(path, file) for path in paths]
    return paths[0].parent, RunFolder(paths[0].parent, entries, {})


def _order(listed: RunFolder, run: Path, by: str | None, given: bool) -> Ordered:
    timed = clocks.by_name(listed.entries) if by is None else None
    return clocks.ordered(
        timed or clocks.read(listed.entries), run, given=given, best=by is not None
    )


def _of_steps(order: Ordered, steps: tuple[int | None, int | None, int | None]) -> list[Timed]:
    """The checkpoints from one step to another at a distance; all of them must be there."""
    first, last, distance = steps
    counts = [each.clock[order.unit] for each in order.timed]
    low = counts[0] if first is None else first
    high = counts[-1] if last is None else last
    require(distance is None or distance > 0, "steps", steps, "a distance above 0")
    chosen = [
        each
        for each, count in zip(order.timed, counts, strict=True)
        if low <= count <= high and (distance is None or (count - low) % distance == 0)
    ]
    if distance is not None and first is not None and last is not None:
        missing = sorted(set(range(first, last + 1, distance)) - set(counts))
        if missing:
            shown = listed([str(step) for step in missing])
            has = ", ".join(f"{count:g}" for count in counts[:8])
            raise ValueError(f"steps {shown} are missing: the run has {order.unit} {has}, ...")
    require(bool(chosen), "steps", steps, f"{order.unit}s from {counts[0]:g} to {counts[-1]:g}")
    return chosen


def _qualities(timed: Sequence[Timed], by: str, run: Path) -> tuple[str, dict[Path, float]]:
    """The metric's full name, and the checkpoints' finite values of it."""
    name, values = metric(timed, by, run)
    pairs = zip(timed, values, strict=True)
    return name, {
        each.entry.named: value
        for each, value in pairs
        if value is not None and math.isfinite(value)
    }


def _best(
    timed: Sequence[Timed], qualities: Mapping[Path, float], count: int, better: Better
) -> list[Timed]:
    """The best ones, in their order."""
    sign = 1 if better == "higher" else -1
    judged = [i for i, each in enumerate(timed) if each.entry.named in qualities]
    judged.sort(key=lambda i: (sign * qualities[timed[i].entry.named], i), reverse=True)
    return [timed[i] for i in sorted(judged[:count])]


def _window(order: Ordered, timed: Sequence[Timed], window: float) -> list[Timed]:
    require_positive("window", window)
    if order.unit not in ("step", "number"):
        raise ValueError(
            f"a window of {window:g} steps needs checkpoints whose steps are known, and these are "
            f"ordered by {order.unit}: choose by their number instead (last=, --last)"
        )
    end = timed[-1].clock[order.unit]
    return [each for each in timed if end - each.clock[order.unit] < window * (1 - _SLACK)]


def _counted(option: str, count: int, there: int) -> int:
    require(is_integer(count, 1), option, count, "an integer >= 1")
    require(count <= there, option, count, f"at most {there}: the run has no more checkpoints")
    return count
