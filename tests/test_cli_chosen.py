"""The options that choose checkpoints of a run, and a part of each: the same in every command that averages.

A run has one tensor, whose value is the step; its even mean over chosen steps says which were chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import polyak
from cli_runs import run
from polyak import checkpoints, offline
from quick import first_quick

STEPS = (100, 200, 300, 400, 900, 1000)
LOSSES = (0.9, 0.1, 0.8, 0.2, 0.7, 0.6)
JUDGE = """
def value(weights):
    (tensor,) = weights.values()
    return tensor.abs().tolist()

def spread(weights):
    (tensor,) = weights.values()
    return -tensor.abs().tolist()[0]
"""


def plain(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((2,), value)}}


def a_run(folder: Path, content: Callable[[float], Any] = plain) -> Path:
    (folder / "run").mkdir()
    for step, loss in zip(STEPS, LOSSES, strict=True):
        torch.save(content(float(step)), folder / "run" / f"step={step}-valid_loss={loss}.pt")
    (folder / "judge.py").write_text(JUDGE)
    return folder / "run"


CHOSEN: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "last": (("--last", "3"), (400, 900, 1000)),
    "best": (("--best", "2", "--by", "valid.loss"), (200, 400)),
    "steps": (("--steps", "100:400:100"), (100, 200, 300, 400)),
    "the best of some steps": (("--steps", "300:", "--best", "2", "--by", "valid_loss"), (400, 1000)),
    "window": (("--window-tokens", "2M", "--tokens-per-step", "10K"), (900, 1000)),
}  # fmt: skip


def averaged(files: Path, *options: str) -> float:
    out = files.parent / "average.safetensors"
    done = run("average", files, *options, "--out", out, "--force")
    assert done.exit_code == 0, done.output
    (tensor,) = load_file(out).values()
    return float(tensor[0])


def synthesized(files: Path, *options: str) -> dict[str, float]:
    """The coefficient of each file."""
    limits = ("--rule", "uniform()", "--max-error", "9", "--dry-run", "--json")
    done = run("synthesize", files, *options, *limits)
    assert done.exit_code == 0, done.output
    terms = json.loads(done.stdout)["terms"]
    return {Path(term["path"]).name: term["coefficient"] for term in terms}


def swept(files: Path, *options: str) -> dict[str, Any]:
    fixed = ("--evaluate", "judge:value", "--windows", "2", "--out", str(files.parent / "sweep"))
    done = run("sweep", files, *options, *fixed, "--force", "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("options", "steps"), first_quick(CHOSEN.values(), 2), ids=CHOSEN)
def test_every_command_takes_the_same_checkpoints(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    steps: tuple[int, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    files = a_run(tmp_path)
    assert averaged(files, *options) == pytest.approx(sum(steps) / len(steps))
    of_steps = {f"step={step}-": None for step in steps}
    for name in synthesized(files, *options):
        assert name[: name.index("-") + 1] in of_steps
    found = swept(files, *options)
    assert [b["quality"] for b in found["baselines"]] == [steps[-1], steps[0]]
    (window,) = found["points"]
    assert window["quality"] == pytest.approx(sum(steps[-2:]) / 2)


def test_a_choice_is_what_its_files_are_one_by_one(tmp_path: Path) -> None:
    files = a_run(tmp_path)
    listed = dict(zip(STEPS, sorted(files.iterdir(), key=_step), strict=True))
    limits = {"max_error": 9.0, "max_amplification": 9.0}
    choice = offline.choose(files, last=3)
    chosen = polyak.synthesize(choice, "exponential(half_life=300)", **limits)  # type: ignore[arg-type]
    wanted = polyak.synthesize(
        None,
        "exponential(half_life=300)",
        checkpoints={s: listed[s] for s in (400, 900, 1000)},
        **limits,  # type: ignore[arg-type]
    )
    assert chosen.terms == wanted.terms
    assert torch.equal(chosen.average()["w"], wanted.average()["w"])


def _step(path: Path) -> int:
    return int(path.name[5 : path.name.index("-")])


def flat(value: float, front: str = "") -> dict[str, Tensor]:
    return {f"{front}w": torch.full((2,), value)}


PARTS: dict[str, tuple[Callable[[float], Any], tuple[str, ...]]] = {
    "key": (lambda v: {"g": flat(v), "d": flat(-9)}, ("--key", "g")),
    "prefix": (lambda v: {"model": flat(v, "student.") | flat(-9, "teacher.")}, ("--prefix", "student.")),
    "as": (lambda v: flat(v), ("--as", "average")),
    "names": (
        lambda v: {"decay": 0.9, "num_updates": 3, "shadow_params": [torch.full((2,), v)]},
        ("--names", "names.txt"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "options"), first_quick(PARTS.values(), 2), ids=PARTS)
def test_every_command_reads_the_same_part(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: Callable[[float], Any],
    options: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    files = a_run(tmp_path, content)
    (tmp_path / "names.txt").write_text("w\n")
    chosen = ("--last", "2", *options)
    assert averaged(files, *chosen) == 950
    (window,) = swept(files, *chosen)["points"]
    assert window["quality"] == 950
    made = ("--rule", "uniform()", "--max-error", "9", "--out", "made.safetensors")
    done = run("synthesize", files, *chosen, *made)
    assert done.exit_code == 0, done.output
    (name,) = load_file("made.safetensors")
    assert name == "w" and 900 <= float(load_file("made.safetensors")["w"][0]) <= 1000
    for command in (("inspect",), ("export", "--as", "average"), ("diff",)):
        about = () if command[0] == "inspect" else (str(tmp_path / "out.safetensors"),)
        if command[0] == "diff":
            about = (str(files / "step=900-valid_loss=0.7.pt"),)
        result = run(
            command[0], files / "step=1000-valid_loss=0.6.pt", *about, *options, *command[1:]
        )
        assert result.exit_code in (0, 1) and "Traceback" not in result.output, result.output


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no folder": (("--last", "2"), "to use --last, give the folder of a run"),
    "too many": (("run", "--last", "9"), "last is 9, wanted at most 6"),
    "tokens alone": (("run", "--window-tokens", "2M"), "belong together: give both"),
    "a choice of snapshots": (
        ("snapshots", "--last", "2", "--key", "a"),
        "snapshots has snapshots of polyak.Recorder, and these options are for plain checkpoints: leave "
        "--last, --key out",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("command", ["synthesize", "sweep"])
def test_what_cannot_be_chosen_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path)
    averager = polyak.Averager(nn.Linear(1, 1), "exponential(0.9)")
    averager.update()
    polyak.Recorder(averager, tmp_path / "snapshots", every=1).update()
    judge = ("--evaluate", "judge:value") if command == "sweep" else ()
    done = run(command, *options, *judge, "--rule", "uniform()", "--out", "made.safetensors")
    assert done.exit_code == 2 and message in done.output
    assert not Path("made.safetensors").exists()


def test_better_is_of_the_function_where_the_metric_tells_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A higher score is better, and a lower loss."""
    monkeypatch.chdir(tmp_path)
    files = a_run(tmp_path)
    found = swept(files, "--best", "2", "--by", "valid_loss", "--better", "higher")
    assert [b["quality"] for b in found["baselines"]] == [400, 400]  # steps 200 and 400
    options = ("--best", "2", "--by", "valid_loss", "--better", "higher")
    assert averaged(files, *options, "--greedy", "judge:spread") == 200
    assert averaged(files, *options) == 200  # without a function it is the metric's


def test_values_that_are_not_finite_are_refused_by_synthesize_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = a_run(tmp_path, lambda v: {"w": torch.tensor([v, float("nan") if v == 900 else 0.0])})
    made = ("--rule", "uniform()", "--max-error", "9", "--out", "made.safetensors")
    done = run("synthesize", files, *made)
    assert done.exit_code == 2 and "w: values that are infinite or NaN, 1 in" in done.stderr
    assert "step=900" in done.stderr and not Path("made.safetensors").exists()
    done = run("synthesize", files, *made, "--allow-nonfinite")
    assert done.exit_code == 0 and "note: w has values that are infinite or NaN" in done.stderr
    assert checkpoints.read("made.safetensors").live is not None
