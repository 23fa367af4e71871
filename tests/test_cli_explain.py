"""The command line: what it prints and writes, and one clear line for every error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import polyak
from polyak.cli import _study, app
from polyak.theory import explain


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_explain_prints_a_table_and_writes_the_chart(tmp_path: Path) -> None:
    done = run("explain", "exponential(0.9)", "--steps", "300", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    for name, value, unit, share in explain("exponential(0.9)", 300).rows():
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert value in line and unit in line and share in line
        assert share == (f"{float(value) / 3:.3g} %" if unit == "steps" else "")
    assert "diffusers.training_utils.EMAModel(model.parameters(), decay=0.9" in done.stdout
    assert "# construct it where the rule makes its first update" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"rule.png", "rule.svg", "rule.html"}


def test_explain_says_where_no_library_has_it(tmp_path: Path) -> None:
    done = run("explain", "window(3)", "--steps", "10", "--every", "2", "--out", str(tmp_path))
    assert "window(3) after 10 steps, updated every 2 steps" in done.stdout
    assert "No other library known has window(3)." in done.stdout


def test_explain_compares_rules(tmp_path: Path) -> None:
    rules = ["exponential(0.9)", "window(20)"]
    done = run("explain", *rules, "--steps", "300", "--out", str(tmp_path))
    first, second = (explain(rule, 300).rows() for rule in rules)
    for one, other in zip(first, second, strict=True):
        line = next(line for line in done.stdout.splitlines() if line.startswith(one.name))
        assert line.index(one.value) < line.rindex(other.value)
    assert "AveragedModel" not in done.stdout
    assert all(rule in (tmp_path / "rule.svg").read_text() for rule in rules)
    both = json.loads(run("explain", *rules, "--json").stdout)
    assert [each["rule"] for each in both] == rules


def test_explain_writes_no_file_unless_a_folder_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("explain", "exponential(0.9)").exit_code == 0
    assert not list(tmp_path.iterdir())


def test_explain_prints_json(tmp_path: Path) -> None:
    done = run("explain", "uniform()", "--steps", "99", "--json", "--out", str(tmp_path))
    found = json.loads(done.stdout)
    calls = found.pop("equivalents")
    assert calls["torch.optim.swa_utils.AveragedModel"].endswith("AveragedModel(model)")
    assert found == explain("uniform()", 99).as_dict()


ERRORS = [
    (["exponential(2)"], "polyak: Exponential.decay is 2, wanted a decay in [0, 1]"),
    (["exponential("], "polyak: spec 'exponential(' does not read as name(arguments)"),
    (["ema(0.9)"], "polyak: 'ema' in spec 'ema(0.9)' is unknown; rules: exponential,"),
    (["uniform()", "--steps", "0"], "polyak: steps is 0, wanted an integer >= 1"),
    (["uniform()", "--steps", "5", "--every", "0"], "polyak: every is 0, wanted an integer >= 1"),
    (["uniform()", "--every", "0"], "polyak: every is 0, wanted an integer >= 1"),
    (["uniform()", "--steps", "1" + 30 * "0"], f"polyak: steps is {10**30}, wanted at most 100,0"),
    (["uniform()", "--steps", "1" + 17 * "0"], f"polyak: steps is {10**17}, wanted at most 100,0"),
    (["uniform()", "--every", "1" + 17 * "0"], f"polyak: every is {10**17}, wanted at most 100,0"),
    (["exponential(0.9, 9)"], "polyak: Exponential.debias is 9, wanted True or False"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    done = run("explain", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


NO_CHART = [
    ("/dev/null/x", "polyak: /dev/null/x: Not a directory\n"),
    ("file", "polyak: file is a file, wanted a folder; choose another place\n"),
    ("file/x", "polyak: file/x: Not a directory\n"),
    ("/proc/x", "polyak: /proc/x: No such file or directory\n"),
    ("folder", "polyak: folder/rule.png is a folder"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What it prints, option by option, where the chart is written."""
    commands = {
        option: ["explain", "uniform()", "--steps", "99", *option.split()]
        for option in ("", "--json")
    }
    folder = tmp_path_factory.mktemp("chart")
    return {
        option: run(*command, "--out", str(folder)).stdout for option, command in commands.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("out", "message"), NO_CHART, ids=[out for out, _ in NO_CHART])
@pytest.mark.parametrize("option", ["", "--json"])
def test_the_table_is_printed_where_the_chart_cannot_be_written(
    out: str,
    message: str,
    option: str,
    told: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("precious")
    Path("folder/rule.png").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    done = run("explain", "uniform()", "--steps", "99", "--out", out, *option.split())
    assert done.exit_code == 2 and done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout and done.stdout == told[option].partition("chart: ")[0]
    assert sorted(tmp_path.rglob("*")) == before


SEE = "; see polyak explain --help\n"
USAGE_ERRORS = [
    (["explain"], "polyak: Missing argument ", SEE),
    (
        ["diff", "a", "b", "3"],
        "polyak: Got unexpected extra argument",
        "; see polyak diff --help\n",
    ),
    (["explain", "window(3)", "3\n4"], "polyak: spec '3\\n4' does not read as", "\n"),
    (["explain", "uniform()", "--stepp", "3"], "polyak: No such option: --stepp", SEE),
    (["explain", "uniform()", "--steps", "x"], "polyak: Invalid value for '--steps': ", SEE),
    (["explain", "uniform()", "--steps"], "polyak: Option '--steps' requires an argument", "\n"),
    (["explian"], "polyak: No such command 'explian'", "; see polyak --help\n"),
    (["study", "book"], "polyak: No such command 'book'", "; see polyak study --help\n"),
    (["--stepp"], "polyak: No such option: --stepp", "; see polyak --help\n"),
]


@pytest.mark.parametrize(
    ("arguments", "start", "end"), USAGE_ERRORS, ids=[" ".join(a) for a, _, _ in USAGE_ERRORS]
)
def test_errors_of_usage_are_one_line(arguments: list[str], start: str, end: str) -> None:
    done = CliRunner().invoke(app, arguments, prog_name="polyak")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(start) and done.stderr.endswith(end)
    assert done.stderr.count("\n") == 1


def test_errors_of_usage_are_one_line_outside_of_the_tests_runner() -> None:
    command = [sys.executable, "-m", "polyak", "explain"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("polyak: Missing argument") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["study"]], ids=str)
def test_without_a_command_it_prints_the_help(arguments: list[str]) -> None:
    assert "Usage: polyak" in CliRunner().invoke(app, arguments, prog_name="polyak").output


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("polyak.charts", "altair"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(polyak, "charts", raising=False)
    assert run("explain", "uniform()", "--steps", "99").exit_code == 0
    done = run("explain", "uniform()", "--steps", "99", "--out", "chart")
    assert done.exit_code == 2 and "half-life" in done.stdout
    assert done.stderr.count("\n") == 1 and 'with its extra "study"' in done.stderr


def test_study_article_passes_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(
        _study, "run", lambda name, **options: calls.append({"name": name, **options})
    )
    done = run("study", "article", "--seeds", "3", "--out", str(tmp_path), "--jobs", "2")
    assert done.exit_code == 0, done.output
    assert calls == [{"name": "article", "seeds": 3, "out": tmp_path, "jobs": 2}]


def test_version() -> None:
    done = run("--version")
    assert (done.exit_code, done.stdout) == (0, "polyak 0.1.0\n")


def test_without_typer_it_names_the_extra() -> None:
    code = "import sys; sys.modules['typer'] = None; import polyak.cli"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 1
    assert done.stderr == 'the command line needs typer: install polyak with its extra "cli"\n'
