"""The example of a sharded training: run by torchrun, killed, resumed, exported."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from launching import Launch, launched

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_fsdp2.py"
JUDGED = re.compile(r"step (\d+): validation loss: live ([\d.]+), ema ([\d.]+), tail ([\d.]+)")
EXPORTED = re.compile(r"exported: .*: validation loss: ema ([\d.]+)")


def command(out: Path) -> list[str]:
    return ["--out", str(out), "--steps", "40", "--every", "10"]


def judged(said: str) -> dict[int, list[float]]:
    """step -> the losses of the live weights, the EMA and the tail."""
    return {int(step): list(map(float, losses)) for step, *losses in JUDGED.findall(said)}


def kill_within(launch: Launch, step: int) -> None:
    """Ends the whole job by SIGKILL, as its next checkpoint begins."""
    launch.wait_for(f"step {step}:")
    launch.kill()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_killed_and_resumed_it_exports_the_same_file(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # A restart is allowed: a rank that is done may still abort as gloo's threads end.
    with launched(EXAMPLE, *command(whole), log=tmp_path / "1", restarts=1) as launch:
        said = launch.wait()
    assert not re.search(r"resumed at step [123]0 ", said)  # a restart was when all was done
    losses = judged(said)
    assert list(losses) == [10, 20, 30, 40]
    assert max(losses[40]) < min(losses[10]) < 5
    (exported,) = set(map(float, EXPORTED.findall(said)))
    assert exported == pytest.approx(losses[40][1], abs=3e-6)
    assert len({*losses[40]}) == 3

    with launched(EXAMPLE, *command(killed), log=tmp_path / "2") as launch:
        kill_within(launch, 20)
    assert not (killed / "model.safetensors").exists()
    with launched(EXAMPLE, *command(killed), log=tmp_path / "3", restarts=1) as launch:
        resumed = launch.wait()
    found = re.search(r"resumed at step (\d+) from", resumed)
    assert found and int(found[1]) in (10, 20), resumed
    assert judged(resumed) == {step: each for step, each in losses.items() if step > int(found[1])}
    assert digest(killed / "model.safetensors") == digest(whole / "model.safetensors")
    assert sorted(path.name for path in killed.iterdir()) == [
        "model.safetensors",
        "step-000030",
        "step-000040",
    ]
