"""Ranks as processes of their own: started, watched, ended; none is left."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from distributed_ranks import Alone, Race, rank_main

LIMIT = 900
"""Seconds after which a job's ranks are ended."""


def prepare() -> None:
    """One thread a rank; a server has imported all that ranks need, and forks them."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # the server looks nowhere else
    multiprocessing.set_forkserver_preload(["distributed_ranks", "distributed_report"])


def run(job: Alone | Race, world: int) -> list[Any]:
    """What each of so many ranks finds; raises `RuntimeError` with what they said if any fails."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks: list[BaseProcess] = [
            context.Process(target=rank_main, args=(job, folder, rank, world, LIMIT))
            for rank in range(world)
        ]
        try:
            for rank in ranks:
                rank.start()
            codes = _watch(ranks)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        if codes != [0] * world:
            said = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"{job}: ranks ended with {codes}, None for too late\n{said}")
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def _watch(ranks: list[BaseProcess]) -> list[int | None]:
    """The exit codes, once all have ended, one has failed, or it is too late."""
    deadline = time.monotonic() + LIMIT
    while any(rank.exitcode is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.exitcode for rank in ranks):
            break
        time.sleep(0.05)
    return [rank.exitcode for rank in ranks]
