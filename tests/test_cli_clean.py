"""The command line leaves nothing but its results: on stdout, in the folder, in the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cli_runs import finished, place, run
from patience import HANG
from polyak.cli import app, main
from polyak.cli._process import prints_on_stderr
from process_state import COMMANDS

__all__ = ["finished", "place"]  # fixtures

POLYAK = [sys.executable, "-m", "polyak"]


def of_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command as a process of its own: only there C code and subprocesses print as they do."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [*POLYAK, *arguments], capture_output=True, text=True, timeout=HANG, env=buffered
    )


PRINTS = {
    "print": "print('NOISE')",
    "print without a flush": "sys.__stdout__.write('NOISE')",
    "the stream from before": "OLD.write('NOISE')",
    "os.write": "os.write(1, b'NOISE')",
    "an open descriptor": "open(1, 'w', closefd=False).write('NOISE')",
    "C's puts": "ctypes.CDLL(None).puts(b'NOISE')",
    "C's printf without a line end": "ctypes.CDLL(None).printf(b'NOISE')",
    "a subprocess": "subprocess.run(['echo', 'NOISE'])",
    "a shell": "os.system('echo NOISE')",
    "a logger": "logging.getLogger('of the judge').warning('NOISE')",
    "a thread": "t = threading.Thread(target=print, args=('NOISE',)); t.start(); t.join()",
    "a forked process": "p = FORK.Process(target=print, args=('NOISE',)); p.start(); p.join()",
    "a display": "sys.displayhook('NOISE')",
}
NOISY = """
import ctypes, logging, multiprocessing, os, subprocess, sys, threading

OLD = sys.stdout
FORK = multiprocessing.get_context("fork")
logging.basicConfig(stream=sys.stdout)


def noise():
    {statements}


def loss(weights):
    {call}
    return float(weights["0.weight"].norm())


{main}
"""


def noisy(*, at_import: bool) -> list[str]:
    """Writes a module that prints in every way, each with a mark of its own; the marks."""
    marks = [f"noise-{i:02d}" for i in range(len(PRINTS))]
    statements = [p.replace("NOISE", m) for p, m in zip(PRINTS.values(), marks, strict=True)]
    call, main = ("pass", "noise()") if at_import else ("noise()", "")
    text = NOISY.format(statements="\n    ".join(statements), call=call, main=main)
    Path("noisy.py").write_text(text)
    return marks


USERS_COMMANDS = {
    "sweep": ["sweep", "snapshots", "--evaluate", "noisy:loss", "--rule", "uniform()", "--out", "s"],
    "soup": ["average", "step-1.pt", "step-2.pt", "--greedy", "noisy:loss", "--out", "a.safetensors"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "at_import"),
    [
        pytest.param("sweep", False, id="called", marks=pytest.mark.slow),
        pytest.param("soup", True, id="imported", marks=pytest.mark.slow),
    ],
)
def test_what_the_users_function_prints_goes_to_stderr(command: str, at_import: bool) -> None:
    """With --json, stdout is one JSON document and nothing else."""
    marks = noisy(at_import=at_import)
    done = of_process(*USERS_COMMANDS[command], "--json")
    assert done.returncode == 0, done.stderr
    kinds = dict(zip(PRINTS, marks, strict=True))
    assert [kind for kind, mark in kinds.items() if mark in done.stdout] == []
    assert [kind for kind, mark in kinds.items() if mark not in done.stderr] == []
    json.loads(done.stdout)


def test_prints_go_to_stderr_only_within_the_block(capfd: pytest.CaptureFixture[str]) -> None:
    print("before", flush=False)
    with prints_on_stderr():
        print("within")
        os.write(1, b"deep within\n")
    print("after")
    os.write(1, b"deep after\n")
    out, err = capfd.readouterr()
    assert sorted(out.split("\n")) == ["", "after", "before", "deep after"]
    assert sorted(err.split("\n")) == ["", "deep within", "within"]


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["1", "2"])
def test_streams_may_be_closed(closed: str) -> None:
    command = [*POLYAK, "average", "step-1.pt", "--greedy", "judge:loss", *OUT, *SHARDS]
    script = f'exec "$@" {closed}>&-'
    done = subprocess.run(["sh", "-c", script, "sh", *command], capture_output=True, timeout=HANG)
    assert done.returncode in (0, 1) and Path("new/out").exists(), done.stderr


SWEEP = ("sweep", "snapshots", "--evaluate", "judge:loss", "--out", "new/out")
OUT = ("--out", "new/out")
SHARDS = ("--shard-size", "1kB")
FAILING: list[tuple[str, tuple[str, ...]]] = [
    ("sweep: no rule", SWEEP),
    ("sweep: a wrong rule", (*SWEEP, "--rule", "no()")),
    ("sweep: no average can be made", (*SWEEP, "--rule", "uniform()", "--max-error", "1e-12")),
    ("sweep: the function raises", (*SWEEP, "--rule", "uniform()", "--evaluate", "judge:broken")),
    ("sweep: the function exits", (*SWEEP, "--rule", "uniform()", "--evaluate", "judge:leaves")),
    ("sweep: no number", (*SWEEP, "--rule", "uniform()", "--evaluate", "judge:silent")),
    ("sweep: no function", (*SWEEP, "--rule", "uniform()", "--evaluate", "judge:lost")),
    ("sweep: no module", (*SWEEP, "--rule", "uniform()", "--evaluate", "lost:loss")),
    ("sweep: no snapshots", ("sweep", "no", *SWEEP[2:], "--rule", "uniform()")),
    ("average: no file", ("average", "step-1.pt", "no.pt", *OUT, *SHARDS)),
    ("average: a value too large", ("average", "large.pt", *OUT, *SHARDS, "--dtype", "fp16")),
    ("average: the function raises", ("average", "step-1.pt", *OUT, *SHARDS, "--greedy", "judge:broken")),
    ("synthesize: too short", ("synthesize", "snapshots", *OUT, *SHARDS, "--rule", "exponential(0.1)")),
    ("export: no average", ("export", "step-1.pt", "new/out", *SHARDS)),
    ("export: a value too large", ("export", "large.pt", "new/out", *SHARDS, "--average", "live", "--dtype", "fp16")),
    ("convert: no rule", ("convert", "ema.pt", "new.safetensors")),
    ("explain: no steps", ("explain", "uniform()", "--steps", "0", *OUT)),
    ("explain: no chart", ("explain", "uniform()", "--steps", "9", "--out", "large.pt/new/out")),
    ("study: no seed", ("study", "article", *OUT, "--seeds", "0")),
    ("study: no process", ("study", "article", *OUT, "--jobs", "0")),
]  # fmt: skip


@pytest.mark.parametrize("arguments", [a for _, a in FAILING], ids=[name for name, _ in FAILING])
def test_a_command_that_fails_leaves_no_file_and_no_folder(
    arguments: tuple[str, ...], place: Path
) -> None:
    import torch

    torch.save({"w": torch.full((9,), 1e30)}, "large.pt")
    before = sorted(place.rglob("*"))
    done = run(*arguments)
    assert done.exit_code in (1, 2), done.output
    assert [path for path in sorted(place.rglob("*")) if "__pycache__" not in str(path)] == before


def test_a_result_is_printed_and_kept_where_its_chart_cannot_be_written() -> None:
    """The work of hours may be in it."""
    Path("new/out/sweep.png").mkdir(parents=True)
    done = run(*SWEEP, "--rule", "uniform()", "--json")
    assert done.exit_code == 2 and done.stderr.startswith("polyak: new/out/sweep.png is a folder")
    assert json.loads(done.stdout) == json.loads(Path("new/out/sweep.json").read_text())


@pytest.mark.slow
def test_a_result_is_kept_where_it_cannot_be_printed_and_the_reverse() -> None:
    """Its reader has gone, as with `| head`; or the folder has a folder of that name."""
    read, write = os.pipe()
    os.close(read)
    command = [*POLYAK, *SWEEP, "--rule", "uniform()"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=HANG)
    os.close(write)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    kept = Path("new/out/sweep.json").read_text()
    Path("new/out/sweep.json").unlink()
    Path("new/out/sweep.json").mkdir()
    told = run(*SWEEP, "--rule", "uniform()", "--json", "--force")
    assert told.exit_code == 2 and json.loads(told.stdout) == json.loads(kept)


def test_every_command_is_run_for_its_state() -> None:
    commands: Any = get_command(app)
    names = [
        [name, *inner]
        for name, command in commands.commands.items()
        for inner in ([[each] for each in getattr(command, "commands", ())] or [[]])
    ]
    missing = [name for name in names if name not in [w[: len(name)] for w in COMMANDS.values()]]
    assert ["study", "compare"] in names and not missing, (
        "write a line into COMMANDS of tests/process_state.py"
    )


@pytest.mark.slow
def test_no_command_changes_the_state_of_the_process() -> None:
    script = Path(__file__).with_name("process_state.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stderr
    changes = json.loads(done.stderr.splitlines()[-1])
    assert set(changes) > set(COMMANDS)
    assert {name: change for name, change in changes.items() if change} == {}


def test_the_handler_of_sigterm_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    """It is set for the command alone, and only where the caller has none."""
    seen = []
    for handler in (signal.SIG_DFL, signal.SIG_IGN, lambda *_: None):
        old = signal.signal(signal.SIGTERM, handler)
        try:
            for arguments in (["--version"], ["explain", "no()"]):
                with pytest.raises(SystemExit):
                    main(arguments)
                seen.append(signal.getsignal(signal.SIGTERM) is handler)
        finally:
            signal.signal(signal.SIGTERM, old)
    assert seen == [True] * 6
    assert capsys.readouterr().out == 3 * "polyak 0.1.0\n"
