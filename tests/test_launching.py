"""Limits of launched ranks: work is counted, and waiting without work, not the time of a busy machine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import launching
from launching import Watch

pytestmark = pytest.mark.slow

WORKS = "while True: pass"
WAITS = "import time; time.sleep(3600)"
WORKS_A_LITTLE = (
    "import time\nwhile True:\n    time.sleep(0.05); sum(range(100_000))"  # some 5 % of a processor
)


@contextmanager
def running(*codes: str) -> Iterator[list[int]]:
    processes = [subprocess.Popen([sys.executable, "-S", "-c", code]) for code in codes]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def verdict(watch: Watch, pids: list[int], looks: int) -> str:
    """Why the watch gave up, within so many looks; nothing if it did not."""
    for _ in range(looks):
        if over := watch.over(pids):
            return over
        time.sleep(0.05)
    return ""


def test_ranks_that_all_wait_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_IDLE", 2.0)
    with running(WAITS, WAITS) as pids:
        assert "they wait for each other" in verdict(Watch(60), pids, 2000)


def test_ranks_are_not_given_up_while_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_IDLE", 2.0)
    with running(WAITS, WORKS_A_LITTLE) as pids:
        assert verdict(Watch(600), pids, 100) == ""


def test_ranks_that_work_too_much_are_given_up() -> None:
    with running(WORKS, WORKS) as pids:
        assert "seconds of the processor, wanted at most 1" in verdict(Watch(1), pids, 2000)


def test_the_work_of_ended_ranks_counts() -> None:
    watch = Watch(1)
    for _ in range(2000):
        with running(WORKS) as pids:
            for _ in range(4):
                time.sleep(0.05)
                over = watch.over(pids)
        if over:
            return
    raise AssertionError("it never gave up")
