"""Runner: run the missing seeds in several processes, and record each when it finishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from joblib import Parallel, delayed, effective_n_jobs

from polyak.study._arms import Arms, all_arms
from polyak.study._data import make_data
from polyak.study._record_format import Record, article_format
from polyak.study._records import opened
from polyak.study._settings import Settings
from polyak.study._trainer import conditions, run_seed

Progress = Callable[[int, int, bool], None]
"""Called with (seeds done, seeds wanted, whether one was just run) at the start and after each seed."""


def run_study(
    seeds: int,
    path: Path,
    settings: Settings,
    *,
    jobs: int | None = None,
    arms: Arms | None = None,
    progress: Progress = lambda *_: None,
) -> list[Record]:
    """The records of seeds 0 to seeds - 1 in order; runs those that `path` does not hold yet.

    `jobs` is the number of processes as joblib counts them (default -1: one per processor), each on
    one thread.
    """
    arms = arms or all_arms(settings)
    with opened(path, article_format(conditions(settings, arms))) as results:
        missing = [seed for seed in range(seeds) if seed not in results.by_run]
        progress(seeds - len(missing), seeds, False)
        workers = min(effective_n_jobs(-1 if jobs is None else jobs), max(len(missing), 1))
        for record in _records(missing, settings, arms, workers):
            results.add(record)
            progress(sum(seed in results.by_run for seed in range(seeds)), seeds, True)
        return [results.by_run[seed] for seed in range(seeds)]


def _records(missing: list[int], settings: Settings, arms: Arms, workers: int) -> Iterator[Record]:
    """The records in the order in which they finish."""
    data = make_data(settings)
    tasks = (delayed(run_seed)(seed, settings, data, arms) for seed in missing)
    parallel = Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch="2*n_jobs")
    return iter(parallel(tasks)) if missing else iter(())
