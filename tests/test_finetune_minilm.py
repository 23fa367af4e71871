"""The example that fine-tunes a real transformer: run in a cut form, whole and as an adapter."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from shutil import rmtree

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_minilm.py"
JUDGED = re.compile(r"step (\d+): (\w+): loss ([\d.]+), accuracy ([\d.]+)%")
LOADED = re.compile(r"checkpoint-(\d+).averages.ema: loss ([\d.]+), accuracy ([\d.]+)%")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--steps", "2", "--every", "2"], ["--steps", "4", "--every", "2", "--lora"]]
)
def test_the_average_that_was_best_loads_with_its_metric(
    options: list[str], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        str(EXAMPLE),
        "--out",
        str(tmp_path / "run"),
        "--held-out",
        "16",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rmtree(tmp_path / "run")
    judged = {
        (step, name): tuple(map(float, found)) for step, name, *found in JUDGED.findall(done.stdout)
    }
    steps = range(2, int(options[1]) + 1, 2)
    names = "eval", "eval_ema", "eval_half"
    assert judged.keys() == {(str(step), name) for step in steps for name in names}
    ((best, *found),) = LOADED.findall(done.stdout)
    ema = {step: losses for (step, name), losses in judged.items() if name == "eval_ema"}
    assert min(ema, key=ema.__getitem__) == best
    assert tuple(map(float, found)) == pytest.approx(ema[best], abs=2e-4)
