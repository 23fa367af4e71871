"""Killing: a process that saves an average over and over is killed, and what it left is checked."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import torch

import polyak

_TENSORS, _SIZE = 8, 50_000
_SAVER = f"""
import sys, torch, polyak
path, first = sys.argv[1], int(sys.argv[2])
weights = {{f"w{{i}}": torch.zeros({_SIZE}) for i in range({_TENSORS})}}
averager = polyak.Averager(weights, {{"a": "exponential(0.9)", "b": "uniform()"}})
if first:
    polyak.load(path, averager)
print("ready", flush=True)
for step in range(first + 1, 10**6):
    for tensor in weights.values():
        tensor.fill_(float(step))
    averager.update()
    polyak.save(path, averager, overwrite=True)
    print(step, flush=True)
"""


def kill(path: Path, moments: random.Random, first: int = 0) -> int:
    """One process goes on from update `first`, and is killed at a random moment; the update it reached.

    Asserts that the file is whole, no older than the process said, and that its averages are right.
    """
    command = [sys.executable, "-c", _SAVER, str(path), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.0, 0.15))
        process.kill()
        lines = process.stdout.read().splitlines(keepends=True)
    said = [int(line) for line in lines if line[-1] == "\n"]
    if not path.exists():
        assert first == 0 and not said
        return 0
    weights = {f"w{i}": torch.zeros(_SIZE) for i in range(_TENSORS)}
    averager = polyak.Averager(weights, {"a": "exponential(0.9)", "b": "uniform()"})
    polyak.load(path, averager)
    assert averager.count in (max(said, default=first), max(said, default=first) + 1)
    mean = (averager.count + 1) / 2
    for tensor in averager.average("b").values():
        assert torch.allclose(tensor, torch.tensor(mean), rtol=1e-4)
    return averager.count
