"""Sharded models: each rank averages its own parts, and the average is that of one process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharding_ranks import LAWS

RANKS = Path(__file__).with_name("sharding_ranks.py")


def said_by(world: int, folder: Path, seconds: float) -> list[str]:
    """What so many real processes print, once all of them are done; the first that fails ends all."""
    logs = [folder / f"rank{rank}" for rank in range(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(RANKS), str(folder), str(rank), str(world)]
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
    kinds = ["fsdp", "tensor_parallel", "grid"][: 2 if world == 2 else 3]
    wanted = [f"{kind}: {law.__name__}" for kind in kinds for law in LAWS]
    for said in said_by(world, tmp_path, seconds=240):
        assert said.splitlines() == wanted
