"""`backend="ray"` on a real Ray of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyak.study import Study, read, run
from polyak.study._recipes import opened_recipe

RECIPE = """
import os
import signal
from pathlib import Path

import torch
from beside import WIDTH
from polyak.study import Data, Study

HERE = Path(__file__).parent


def data(split):
    seed = split // 4
    if seed == 5 and (HERE / "failing").exists():
        raise ZeroDivisionError("seed 5 fails")
    once = seed == 3 and not (HERE / "killed").exists()
    if (HERE / "deadly").exists() and (seed == 2 or once):
        (HERE / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    x = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(split))
    return Data((x, x), (x, x), (x, x))


def loss(model, x, y):
    return torch.nn.functional.mse_loss(model(x), y)


study = Study(
    name="mine", model=lambda: torch.nn.Linear(WIDTH, WIDTH), data=data, loss=loss, seeds=6,
    arms={"ema": "exponential(0.5)"}, steps=4, batch_size=8, evaluations=2, learning_rates=(0.1,),
)
"""

SCRIPT = """
import json
import sys
from pathlib import Path

import ray

from polyak.study import run
from polyak.study._recipes import opened_recipe

folder = Path(sys.argv[1])


def stop(done, wanted, ran):
    if done == 2:
        raise KeyboardInterrupt


def tried(**options):
    try:
        result = run(study, folder / "out", jobs=2, backend="ray", **options)
    except KeyboardInterrupt:
        return "interrupted"
    failed = {failure["seed"]: failure["failed"] for failure in result.failures}
    return [record["seed"] for record in result.records], failed


with opened_recipe(str(folder / "mine.py")) as study:
    try:
        ray.init(num_cpus=2, log_to_driver=False)
    except Exception as error:  # Ray has no class for it
        if "timed out" not in str(error).lower():
            raise
        sys.exit(f"Ray did not start in its time: {error}")
    phases = [tried(progress=stop)]
    for name in ("failing", "deadly"):
        (folder / name).touch()
    phases.append(tried())
    for name in ("failing", "deadly"):
        (folder / name).unlink()
    phases.append(tried())
(folder / "phases.json").write_text(json.dumps(phases))
"""


def measured(records: Any) -> list[dict[str, Any]]:
    """Records without their times, by seed."""
    ordered = sorted(records, key=lambda record: record["seed"])
    return [{k: v for k, v in record.items() if k != "seconds"} for record in ordered]


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Study]:
    """A recipe in a file, which imports its neighbour."""
    (tmp_path / "mine.py").write_text(RECIPE)
    (tmp_path / "beside.py").write_text("WIDTH = 2\n")
    with opened_recipe(str(tmp_path / "mine.py")) as study:
        yield study


def test_an_unknown_backend_is_refused(mine: Study, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backend is 'dask', wanted loky or ray"):
        run(mine, tmp_path / "out", backend="dask")


def test_without_ray_the_extra_is_named(
    mine: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'needs ray, which is not installed: .* extra "ray"'):
        run(mine, tmp_path / "out", backend="ray")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ray_resumes_reports_failures_and_retries_killed_workers(
    mine: Study, tmp_path: Path
) -> None:
    expected = measured(run(mine, tmp_path / "local", jobs=1).records)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAY_AUTH_MODE": "disabled",  # else Ray writes a token into the home folder
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # at Ray's own 15 they get nothing beside a busy process
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "Ray did not start in its time" in done.stderr:
        pytest.skip("on a starved machine Ray gives up its own start after some seconds")
    assert done.returncode == 0, done.stderr
    interrupted, harmed, mended = json.loads((tmp_path / "phases.json").read_text())
    assert interrupted == "interrupted"
    assert harmed[0] == [0, 1, 3, 4] and [*harmed[1]] == ["2", "5"]
    assert "its process was killed, twice" in harmed[1]["2"]
    assert harmed[1]["5"] == "ZeroDivisionError: seed 5 fails (mine.py, line 16)"
    assert mended == [[0, 1, 2, 3, 4, 5], {}]
    assert measured(read(mine, tmp_path / "out").records) == expected
