"""Sharded models: each rank averages its own parts, and the average is that of one process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import docs_ranks
import pipeline_ranks
import replicas_ranks
import sharding_ranks


def said_by(script: Path | str, world: int, folder: Path, seconds: float) -> list[str]:
    """What so many real processes of a script print, once all of them are done; the first that fails ends all."""
    logs = [folder / f"rank{rank}" for rank in range(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(script), str(folder), str(rank), str(world)]
        with log.open("w") as said, Path(f"{log}.errors").open("w") as errors:
            processes.append(subprocess.Popen(command, env=environment, stdout=said, stderr=errors))
    deadline = time.monotonic() + seconds
    try:
        while any(each.poll() is None for each in processes) and time.monotonic() < deadline:
            if any(each.poll() for each in processes):
                break
            time.sleep(0.1)
        codes = [each.poll() for each in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ends = [f"{log.name}: {log.read_text()}{Path(f'{log}.errors').read_text()}" for log in logs]
    assert codes == [0] * world, "\n".join(end[-3000:] for end in ends)
    return [log.read_text() for log in logs]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_models(tmp_path: Path, world: int) -> None:
    wanted = [law.__name__ for law in sharding_ranks.laws_on(world)]
    for said in said_by(sharding_ranks.__file__, world, tmp_path, seconds=900):
        assert said.splitlines() == wanted


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_averages_divided_over_replicas(tmp_path: Path, world: int) -> None:
    wanted = [law.__name__ for law in replicas_ranks.LAWS]
    for said in said_by(replicas_ranks.__file__, world, tmp_path, seconds=900):
        assert said.splitlines() == wanted


@pytest.mark.slow
def test_a_model_split_into_stages(tmp_path: Path) -> None:
    wanted = [law.__name__ for law in pipeline_ranks.LAWS]
    for said in said_by(pipeline_ranks.__file__, 2, tmp_path, seconds=600):
        assert said.splitlines() == wanted


@pytest.mark.slow
def test_the_examples_of_the_docs(tmp_path: Path) -> None:
    wanted = [law.__name__ for law in docs_ranks.LAWS]
    for said in said_by(docs_ranks.__file__, 2, tmp_path, seconds=600):
        assert said.splitlines() == wanted
