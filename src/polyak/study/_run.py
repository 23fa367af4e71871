"""Run a study in several processes, record each run when it finishes, and resume.

A run that raises an error is written to failures.jsonl, and the rest goes on. A run whose process is
killed is tried once more, in a process of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from joblib import effective_n_jobs

from polyak._checks import is_integer, require
from polyak.study._conditions import Conditions
from polyak.study._errors import is_recipes, placed
from polyak.study._feasible import require_feasible
from polyak.study._loop import SOURCES, Run, train
from polyak.study._processes import Killed, computed, computing_on
from polyak.study._record_format import Record
from polyak.study._recorded import RESULTS, existing, first_conditions
from polyak.study._records import opened
from polyak.study._rehearsal import rehearse
from polyak.study._result import Result
from polyak.study._stackable import require_stackable
from polyak.study._stacked import train_stacked
from polyak.study._study import Study

Group = tuple[Run, ...]
Progress = Callable[[int, int, bool], None]
"""Called with (runs done, runs wanted, whether one was just run) at the start and after each run."""

FAILURES = "failures.jsonl"
MOST_RUNS = 1_000_000  # each is a line of some kilobytes


def run(
    study: Study,
    out: Path | str | None = None,
    *,
    seeds: int | None = None,
    jobs: int = -1,
    vary: Collection[str] = SOURCES,
    backend: str = "loky",
    progress: Progress = lambda *_: None,
) -> Result:
    """Run the missing runs of a study, and return all its records.

    Args:
        study: the study.
        out: the folder of results.jsonl and failures.jsonl; default "study-<name>".
        seeds: the seeds 0 to seeds - 1; default `study.seeds`.
        jobs: processes as joblib counts them, each on one thread; -1 is one per core, 1 is this one.
        vary: the sources of variance that differ between seeds: "init", "order", "dropout", "split".
        backend: "loky", this machine's processes, or "ray": the cluster of RAY_ADDRESS, whose machines
            have polyak installed, or else a Ray of this machine.
        progress: called with (runs done, runs wanted, whether one was just run), at the start too.

    Records on the disk are never lost: each is synced before the next counts as done. Ctrl-C, a full
    disk or a killed process ends the call; calling it again continues.

    Raises `ValueError` for a bad argument, a claim about an unknown arm, metric or schedule, a line of
    results.jsonl that is not a record of this study, and a study that cannot be stacked;
    `BlockingIOError` while another process writes there; `RuntimeError` if every run failed. If
    the model, data, loss, optimizer or metrics raise in the first four steps of seed 0, a `ValueError`
    names the function and the line; their exception is its cause.
    """
    seeds = study.seeds if seeds is None else seeds
    require(is_integer(seeds, 1), "seeds", seeds, "an integer >= 1")
    require(is_integer(jobs, 1) or jobs == -1, "jobs", jobs, "a number of processes, or -1")
    count = seeds * len(study.schedules) * len(study.learning_rates)
    require(count <= MOST_RUNS, "the number of runs", count, f"at most {MOST_RUNS}: fewer seeds")
    strange = set(vary) - set(SOURCES)
    require(not strange, "vary", sorted(vary), f"some of {', '.join(SOURCES)}")
    rehearse(study)
    require_feasible(study)
    folder = Path(f"study-{study.name}" if out is None else out)
    sources = tuple(source for source in SOURCES if source in vary)
    with computing_on(backend) as killed:
        return _run(study, folder, units(study, seeds), jobs, sources, killed, progress)


def units(study: Study, seeds: int) -> list[Run]:
    """All runs of a study, one seed after another."""
    return [
        Run(seed, schedule, rate)
        for seed in range(seeds)
        for schedule in study.schedules
        for rate in study.learning_rates
    ]


def read(study: Study, out: Path | str) -> Result:
    """Read the records of a study from a folder; nothing is run.

    Raises `FileNotFoundError` for a folder without results, and what `run` raises for bad lines.
    """
    folder = Path(out)
    how = first_conditions(folder)
    stacked, vary = int(how.get("stacked", 0)), tuple(how.get("vary", SOURCES))
    conditions = Conditions(replace(study, stacked=stacked), vary)
    with opened(existing(folder), conditions.format()) as results:
        return Result(study, list(results.by_run.values()), _failures(folder))


def _run(
    study: Study,
    folder: Path,
    wanted: list[Run],
    jobs: int,
    vary: tuple[str, ...],
    killed: Killed,
    progress: Progress,
) -> Result:
    if study.stacked:
        require_stackable(study)
    conditions = Conditions(study, vary)
    with opened(folder / RESULTS, conditions.format()) as results:
        with suppress(FileNotFoundError):
            (folder / FAILURES).unlink()  # they are run again
        done = sum(each in results.by_run for each in wanted)
        progress(done, len(wanted), False)
        groups = missing_groups(study, wanted, results.by_run)
        for each, outcome in outcomes(study, groups, vary, jobs, killed):
            if each in results.by_run:
                continue
            if "failed" in outcome:
                _add_failure(folder, study, each, outcome["failed"])
            else:
                results.add(conditions.marked(each, outcome))
            done += 1
            progress(done, len(wanted), True)
        records = [results.by_run[each] for each in wanted if each in results.by_run]
    failures = _failures(folder)
    if not records:
        raise RuntimeError(f"every run failed; the first: {failures[0]['failed']}")
    return Result(study, records, failures)


def missing_groups(study: Study, wanted: Sequence[Run], done: Container[Run]) -> list[Group]:
    """The groups of runs that are trained at once and are not done yet.

    Runs of a group share one generator of dropout masks. So neither the number of processes nor an
    interruption changes a group; one that is not whole is run again.
    """
    size = max(study.stacked, 1)
    groups = [tuple(wanted[first : first + size]) for first in range(0, len(wanted), size)]
    return [group for group in groups if not all(run in done for run in group)]


def outcomes(
    study: Study, groups: Sequence[Group], vary: tuple[str, ...], jobs: int, killed: Killed
) -> Iterator[tuple[Run, Record]]:
    """(run, its measurements or {"failed": why}) in the order in which they finish."""
    workers = min(effective_n_jobs(jobs), max(len(groups), 1))
    waiting = [*groups]
    while waiting:
        try:
            calls = [(attempt, study, group, vary) for group in waiting]
            for group, records in computed(calls, workers):
                waiting.remove(group)
                yield from zip(group, records, strict=True)
        except killed:
            # Those that were running are the first of the waiting ones. Nobody knows which killed it.
            suspects = waiting[: 2 * workers]
            del waiting[: 2 * workers]
            for group in suspects:
                yield from zip(group, _alone(study, group, vary, killed), strict=True)


def _alone(study: Study, group: Group, vary: tuple[str, ...], killed: Killed) -> list[Record]:
    """The outcomes of a group in a process in which nothing else runs."""
    try:
        ((_, found),) = computed([(attempt, study, group, vary)], workers=2)
    except killed:
        why = "its process was killed, twice: is there too little memory?"
        return [{"failed": why} for _ in group]
    records: list[Record] = found
    return records


def attempt(study: Study, group: Group, vary: tuple[str, ...]) -> tuple[Group, list[Record]]:
    """A group and the measurements of its runs; a run that raises has its error in one line."""
    if len(group) > 1:
        with suppress(Exception):  # one run of many has failed: which, the runs one by one tell
            return group, train_stacked(study, group, vary)
    return group, [_attempt_one(study, each, vary) for each in group]


def _attempt_one(study: Study, run: Run, vary: tuple[str, ...]) -> Record:
    try:
        return train(study, run, vary)
    except BaseException as error:
        if not is_recipes(error):
            raise
        return {"failed": placed(error)}


def _add_failure(folder: Path, study: Study, run: Run, failed: str) -> None:
    line = json.dumps({"study": study.name, **run._asdict(), "failed": failed})
    path = folder / FAILURES
    try:
        with path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _failures(folder: Path) -> list[Record]:
    with suppress(FileNotFoundError):
        lines = (folder / FAILURES).read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a full disk tears one
    return []
