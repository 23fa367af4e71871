"""`polyak sweep` and its chart: what is judged, what is refused, whose errors are whose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli_runs import finished, place, run
from polyak import Averager, Recorder, offline
from polyak.charts import save, sweep_chart
from polyak.cli._users_function import users_function
from polyak.offline import Point, Sweep

__all__ = ["finished", "place"]  # fixtures


SWEEP = ("sweep", "snapshots", "--evaluate", "judge:loss", "--out", "sweep")


@pytest.mark.slow
def test_it_is_the_librarys_sweep() -> None:
    grids = ("--half-lives", "50:800:3", "--relative-stds", "0.1:0.2:2", "--rule", "uniform()")
    done = run(*SWEEP, *grids, "--json")
    assert done.exit_code == 0, done.output
    rules = ["uniform()", *(f"exponential(half_life={each})" for each in (50.0, 200.0, 800.0))]
    rules += [f"power(relative_std={each})" for each in (0.1, 0.2)]
    with users_function("judge:loss") as loss:
        wanted = offline.sweep("snapshots", rules, loss).as_dict()
    assert json.loads(done.stdout) == wanted == json.loads(Path("sweep/sweep.json").read_text())
    assert {path.name for path in Path("sweep").iterdir()} == {
        "sweep.json", "sweep.png", "sweep.svg", "sweep.html",
    }  # fmt: skip
    assert done.stderr == "chart: sweep/sweep.html (also .png, .svg), sweep/sweep.json\n"


def test_for_people() -> None:
    options = ("--half-lives", "2:500:4", "--better", "higher", "--at", "1500")
    done = run(*SWEEP, *options)
    rows = done.stdout.splitlines()
    assert rows[0].split() == [
        "rule",
        "half-life",
        "mean",
        "age",
        "error",
        "amplification",
        "quality",
    ]
    assert rows[1].startswith("live, last (1500)")
    assert rows[2].endswith("refused") and "2" in rows[2]
    found = json.loads(Path("sweep/sweep.json").read_text())
    (best,) = [row for row in rows if row.endswith("best")]
    assert best.startswith(found["best"]["rule"])
    assert found["better"] == "higher"


def test_limits() -> None:
    strict = run(*SWEEP, "--rule", "exponential(half_life=300)", "--max-error", "1e-9")
    assert strict.exit_code == 2 and "none of 1 averages can be made" in strict.stderr
    few = run(*SWEEP, "--rule", "exponential(half_life=300)", "--max-amplification", "1.01")
    assert few.exit_code == 2 and "(limit 1.01)" in few.stderr


def test_checkpoints_alone() -> None:
    files = ("--checkpoint", "500=step-1.pt", "--checkpoint", "1000=step-2.pt")
    command = ("sweep", "--evaluate", "judge:loss", "--out", "s", "--rule", "uniform()")
    assert run(*command, *files, "--max-error", "1").exit_code == 0


OF_THE_COUNTER = """
def f(weights):
    return weights["1.num_batches_tracked"]
"""
OF_EXAMPLES = """
import torch

noise = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
sizes = noise.roll(1).abs()


def f(weights):
    return noise + 0.001 * sizes * weights["3.bias"].double()
"""


class TestTheLiveWeightsBeside:
    """Every average is seen beside the last live weights and the best ones."""

    RUN = ("sweep", ".", "--evaluate", "judge:loss", "--out", "s")
    FILES = ("step-1.pt", "step-2.pt", "step-3.pt")

    def test_a_run_of_plain_checkpoints(self) -> None:
        done = run(*self.RUN, "--windows", "2,3", "--json")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        with users_function("judge:loss") as loss:
            alone = [loss(dict(offline.average([file]))) for file in self.FILES]
            means = [loss(dict(offline.average(self.FILES[-k:]))) for k in (2, 3)]
        last, best = found["baselines"]
        assert (last["name"], last["at"], last["quality"]) == ("last", 3, alone[-1])
        assert (best["name"], best["quality"]) == ("best", min(alone))
        assert best["path"].endswith(self.FILES[alone.index(min(alone))])
        assert [p["quality"] for p in found["points"]] == means
        assert [p["rule"] for p in found["points"]] == [
            "last(2 checkpoints)",
            "last(3 checkpoints)",
        ]
        assert [p["mean_age"] for p in found["points"]] == [0.5, 1.0]

    def test_in_the_table_and_the_chart(self) -> None:
        done = run(*self.RUN, "--windows", "2,3")
        rows = done.stdout.splitlines()
        assert rows[1].startswith("live, last (3)") and rows[2].startswith("live, best (")
        labels = Path("s/sweep.svg").read_text()
        assert "last live weights (3)" in labels or "best single checkpoint" in labels

    def test_snapshots_have_the_live_weights(self) -> None:
        """Those of the last update, with its buffers; and the means of the last ones."""
        done = run(
            *SWEEP, "--rule", "uniform()", "--windows", "2", "--evaluate", "mine:f", "--json"
        )
        assert done.exit_code == 2
        Path("mine.py").write_text(
            "def f(weights):\n    return float(weights['0.weight'].sum() + weights['1.num_batches_tracked'])\n"
        )
        done = run(
            *SWEEP, "--rule", "uniform()", "--windows", "2", "--evaluate", "mine:f", "--json"
        )
        found = json.loads(done.stdout)
        live = offline.average(["step-3.pt"])
        wanted = float(live["0.weight"].sum()) + 2000
        (last,) = found["baselines"]
        assert (last["name"], last["at"], last["quality"]) == ("last", 2000, pytest.approx(wanted))
        assert "last(2 checkpoints)" in [point["rule"] for point in found["points"]]

    def test_snapshots_without_them(self) -> None:
        weights = {"0.weight": torch.zeros(6, 4)}
        averager = Averager(weights, "power(relative_std=0.1)")
        recorder = Recorder(averager, "bare", every=10, live=False)
        for _ in range(200):
            averager.update()
            recorder.update()
        done = run("sweep", "bare", *SWEEP[2:], "--rule", "power(relative_std=0.1)")
        assert "no live weights were stored to compare with" in done.stderr, done.output
        assert json.loads(Path("sweep/sweep.json").read_text())["baselines"] == []

    def test_snapshots_with_checkpoints(self) -> None:
        files = [("--checkpoint", f"{100 * i}=step-{i}.pt") for i in (1, 2, 3)]
        done = run(
            *SWEEP, "--rule", "uniform()", *(part for each in files for part in each), "--json"
        )
        last, _ = json.loads(done.stdout)["baselines"]
        assert last["at"] == 300

    def test_what_the_checkpoints_hold_beside_is_told(self) -> None:
        """As `average` tells it: by the same words."""
        for file in self.FILES:
            other = {"model": torch.load(file), "generator": {"0.weight": torch.ones(2)}}
            torch.save(other, file)
        done = run(*self.RUN, "--windows", "2")
        beside = "note: not used: generator (1 tensor)"
        assert beside in done.stderr.splitlines()
        assert json.loads(Path("s/sweep.json").read_text())["left"] == {"generator": 1}
        made = run("average", *self.FILES, "--out", "mean.safetensors")
        assert beside in made.stderr.splitlines()

    def test_an_average_that_is_no_better_is_called_so(self) -> None:
        Path("mine.py").write_text(OF_THE_COUNTER)
        worse = run(*self.RUN, "--windows", "2", "--evaluate", "mine:f")
        assert "no average is better than the live weights of step-3.pt (last)" in worse.stderr
        better = run(
            *self.RUN, "--windows", "2", "--out", "t", "--half-lives", "5:5:1", "--max-error", "9"
        )
        assert better.exit_code == 0

    def test_an_interval_where_examples_are_judged(self) -> None:
        """The paired bootstrap sees differences of 0.001 below noise of 1."""
        Path("mine.py").write_text(OF_EXAMPLES)
        done = run(*self.RUN, "--windows", "2,3", "--evaluate", "mine:f", "--json")
        found = json.loads(done.stdout)
        last = found["baselines"][0]["quality"]
        for point in found["points"]:
            low, high = point["interval"]
            assert low < point["quality"] - last < high
            assert (low > 0 or high < 0) and high - low < 0.001
        files = ("--checkpoint", "1=step-1.pt", "--checkpoint", "2=step-2.pt")
        plain = run("sweep", "--evaluate", "judge:loss", "--out", "u", "--rule", "uniform()", *files, "--max-error", "1", "--json")  # fmt: skip
        assert json.loads(plain.stdout)["points"][0]["interval"] is None


def test_the_interval_covers_the_difference() -> None:
    """In 95 of 100 draws, and it is paired: noise that both share does not count."""
    from polyak.offline._quality import Judged, interval

    draws, covered = np.random.default_rng(1), 0
    for _ in range(200):
        shared, own = draws.normal(size=200), draws.normal(0.3, 0.1, size=200)
        found = interval(Judged(0.0, shared + own), Judged(0.0, shared))
        assert found is not None and found[1] - found[0] < 0.04
        covered += found[0] <= 0.3 <= found[1]
    assert 180 <= covered <= 199
    assert interval(Judged(0.0), Judged(0.0, shared)) is None
    with pytest.raises(ValueError, match="200 and 3 numbers"):
        interval(Judged(0.0, shared), Judged(0.0, np.zeros(3)))


def test_one_average_among_refused_ones_is_not_the_best() -> None:
    done = run(*SWEEP, "--rule", "exponential(half_life=2)", "--rule", "exponential(half_life=300)")
    assert "refused" in done.stdout
    assert not any(row.endswith("best") for row in done.stdout.splitlines())
    assert "all averages but one were refused, so none is the best" in done.stderr
    assert json.loads(Path("sweep/sweep.json").read_text())["best"] is None
    assert Path("sweep/sweep.png").exists()


def test_results_are_not_overwritten_before_anything_is_judged() -> None:
    Path("sweep").mkdir()
    Path("sweep/sweep.json").write_text("precious")
    refused = run(*SWEEP, "--rule", "uniform()", "--evaluate", "judge:broken")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("polyak: sweep/sweep.json ")
    assert run(*SWEEP, "--rule", "uniform()", "--force").exit_code == 0


ERRORS = [
    (("--evaluate", "judge:lost", "--rule", "uniform()"), "module judge has no function lost"),
    (
        ("--evaluate", "judge:JUDGE.x", "--rule", "uniform()"),
        "'judge:JUDGE.x' is not MODULE:FUNCTION",
    ),
    (("--evaluate", ":loss", "--rule", "uniform()"), "':loss' is not MODULE:FUNCTION"),
    (("--evaluate", "judges:loss", "--rule", "uniform()"), "there is no module judges in "),
    (("--evaluate", "judge.of:loss", "--rule", "uniform()"), "there is no module judge.of in "),
    (("--evaluate", "judge:best", "--rule", "uniform()"), "module judge has no function best"),
    (
        ("--evaluate", "judge:silent", "--rule", "uniform()"),
        "evaluate returned None for the live weights of snapshots/snapshot-",
    ),
    ((), "no average to try: give --rule, --half-lives, --relative-stds or --windows"),
    (("--half-lives", "5"), "--half-lives is '5', wanted LOW:HIGH:COUNT"),
    (("--relative-stds", "0.1:0.9:3"), "Power.relative_std is 0.9, wanted 0 < s <= 0.300283"),
    (("--windows", "2,x"), "--windows is '2,x', wanted integers above 0, such as 2,5,10"),
    (("--windows", "200"), "windows is 200, wanted at most 41: the run has no more checkpoints"),
    (("--rule", "ema()"), "'ema' in spec 'ema()' is unknown"),
    (("--rule", "uniform()", "--checkpoint", "x"), "--checkpoint is 'x', wanted TIME=FILE"),
    (("--rule", "uniform()", "--out", "judge.py"), "judge.py is a file, wanted a folder"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=[" ".join(o) for o, _ in ERRORS])
def test_errors_are_one_line(options: tuple[str, ...], message: str) -> None:
    done = run(*SWEEP, *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"polyak: {message}") and done.stderr.count("\n") == 1


@pytest.mark.slow
class TestTheUsersOwnErrors:
    """His function's and his module's: the traceback from his code on, and exit code 1."""

    def failed(self, code: str, name: str) -> str:
        Path("mine.py").write_text(code)
        command = [
            sys.executable,
            "-m",
            "polyak",
            *SWEEP,
            "--evaluate",
            name,
            "--rule",
            "uniform()",
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr

    def test_in_the_function(self) -> None:
        said = self.failed("def f(weights):\n    return weights['no']\n", "mine:f")
        lines = said.splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert 'mine.py", line 2, in f' in lines[1]
        assert lines[-2:] == ["KeyError: 'no'", "polyak: mine:f failed: KeyError"]

    def test_in_the_module(self) -> None:
        assert "mine:f failed: SyntaxError" in self.failed("def f(:\n", "mine:f")
        said = self.failed("import a_module_that_is_not\n", "mine:f")
        assert "mine.py" in said and "importlib" not in said
        assert said.endswith("polyak: mine:f failed: ModuleNotFoundError\n")


def point(half_life: float, quality: float | None, rule: str = "exponential(0.9)") -> Point:
    return Point(rule, half_life, half_life, 0.01, 1.0, quality, "" if quality else "too short")


def marks(sweep: Sweep) -> list[dict[str, Any]]:
    """The layers of the chart, each with its rows."""
    chart = sweep_chart(sweep).to_dict()
    shared = chart.get("datasets", {})
    layers = []
    for layer in chart["layer"]:
        held = layer["data"]
        rows = held["values"] if "values" in held else shared[held["name"]]
        layers.append({**layer, "rows": rows, "kind": layer["mark"]["type"]})
    return layers


class TestChart:
    def test_points_best_and_refused(self) -> None:
        points = (point(10, None), point(100, 2.0), point(200, 1.0), point(500, 3.0, "power(3)"))
        layers = marks(Sweep(points, "lower"))
        assert [layer["kind"] for layer in layers] == [
            "line",
            "point",
            "point",
            "point",
            "text",
            "text",
        ]
        line, judged, refused, best, halo, text = layers
        assert [row["x"] for row in line["rows"]] == [100, 200, 500] and judged["rows"] == line[
            "rows"
        ]
        assert line["encoding"]["color"]["scale"]["domain"] == ["exponential", "power"]
        assert [row["x"] for row in refused["rows"]] == [10]
        assert [(row["x"], row["y"]) for row in best["rows"]] == [(200, 1.0)]
        assert halo["rows"] == text["rows"]
        assert text["rows"][0]["label"] == "exponential, half-life 200: 1"
        assert line["encoding"]["x"]["scale"]["type"] == "log"

    def test_all_points_lie_within(self) -> None:
        points = (point(3, None), point(100, -1.0), point(5000, 9.0))
        line = marks(Sweep(points, "higher"))[0]["encoding"]
        x, y = line["x"]["scale"], line["y"]["scale"]
        assert x["domainMin"] < 3 and x["domainMax"] > 5000
        assert y["domainMin"] < -1 and y["domainMax"] > 9

    @pytest.mark.parametrize(
        "points", [(point(0, 1.0),), (point(7, 0.0),), (point(7, 5.0),)], ids=str
    )
    def test_a_lone_point(self, points: tuple[Point, ...], tmp_path: Path) -> None:
        save(sweep_chart(Sweep(points, "lower")), tmp_path, "sweep")
        assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")

    def test_what_has_no_half_life_is_said(self) -> None:
        chart = sweep_chart(
            Sweep((point(0, 1.0), point(10, 2.0), point(20, None)), "lower")
        ).to_dict()
        assert chart["title"]["subtitle"] == [
            "Grey crosses: 1 averages that cannot be made exactly enough.",
            "Left out: 1 averages without a half-life.",
        ]
