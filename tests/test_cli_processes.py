"""The command line as a process: Ctrl-C, a terminal, a pipe that closes, what `--help` loads."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import polyak
from launching import launched
from patience import HANG
from quick import first_quick

POLYAK = [sys.executable, "-m", "polyak"]


# The command line, which waits for a signal after it has written a tensor.
WAITS = """
import runpy, time
from polyak.checkpoints._safetensors import files

def write_and_wait(*given, write=files._write_tensor):
    write(*given)
    while True:
        time.sleep(0.01)

files._write_tensor = write_and_wait
runpy.run_module("polyak", run_name="__main__", alter_sys=True)
"""


def started(
    folder: Path, *arguments: str, stderr: int | None = None, command: list[str] = POLYAK
) -> subprocess.Popen[str]:
    process: subprocess.Popen[str] = subprocess.Popen(
        [*command, *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if stderr is None else stderr,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    return process


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A folder with a file of 33.6 MB."""
    save_file({f"w{i}": torch.ones(1 << 20) for i in range(8)}, tmp_path / "big.safetensors")
    return tmp_path


SIGNALS = {signal.SIGINT: (130, "polyak: interrupted\n"), signal.SIGTERM: (143, "")}


def interrupted(folder: Path, *arguments: str, by: signal.Signals = signal.SIGINT) -> None:
    """Starts a command, interrupts it while it writes, and looks at what it said and left."""
    process = started(folder, *arguments, command=[sys.executable, "-c", WAITS])
    while not list(folder.rglob(".*.part")):
        assert process.poll() is None, "it never wrote"
        time.sleep(0.002)
    process.send_signal(by)
    out, err = process.communicate(timeout=HANG)
    code, said = SIGNALS[by]
    assert (process.returncode, out, err) == (code, "", said)
    assert not list(folder.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("by", SIGNALS, ids=lambda each: each.name)
def test_interrupted_it_leaves_no_half_file(big: Path, by: signal.Signals) -> None:
    files = ["big.safetensors"] * 2
    interrupted(big, "average", *files, "--out", "mean.safetensors", by=by)
    assert not (big / "mean.safetensors").exists()
    interrupted(big, "average", *files, "--out", "new/folder", "--shard-size", "8MB", by=by)
    assert not (big / "new").exists()


@pytest.mark.slow
def test_interrupted_it_leaves_what_was_there(big: Path) -> None:
    (big / "mean.safetensors").write_text("precious")
    files = ["big.safetensors"] * 2
    interrupted(big, "average", *files, "--out", "mean.safetensors", "--force")
    assert (big / "mean.safetensors").read_text() == "precious"


def seen_on_a_terminal(folder: Path, *arguments: str) -> tuple[str, str]:
    """The standard output of a command, and what its standard error shows on a terminal."""
    ours, theirs = pty.openpty()
    process = started(folder, *arguments, stderr=theirs)
    os.close(theirs)
    seen = b""
    while part := _read(ours):
        seen += part
    out, _ = process.communicate(timeout=HANG)
    os.close(ours)
    return out, re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", seen).decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # all processes have closed it
        return b""


@pytest.mark.slow
def test_a_terminal_sees_progress_in_bytes_and_time_left(big: Path) -> None:
    files = ["big.safetensors"] * 4
    out, seen = seen_on_a_terminal(big, "average", *files, "--out", "mean.safetensors")
    assert out.endswith(" s\n") and "\x1b" not in out
    assert "writing mean.safetensors" in seen
    assert re.search(r"33\.6/33\.6 MB +\S+ [kMG]B/s 0:00:00", seen)
    out, seen = seen_on_a_terminal(big, "diff", "big.safetensors", "mean.safetensors")
    assert out == "equal: 8 tensors\n" and re.search(r"comparing .*33\.6/33\.6 MB", seen)


@pytest.mark.slow
def test_elsewhere_there_is_no_progress(big: Path) -> None:
    process = started(big, "average", "big.safetensors", "--out", "mean.safetensors", "--json")
    out, err = process.communicate(timeout=HANG)
    assert out.startswith("{") and out.endswith("}\n") and err == ""


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    tensors = {f"tensor-{i:06d}": torch.zeros(1) for i in range(5000)}
    save_file(tensors, tmp_path / "many.safetensors")
    with started(tmp_path, "inspect", "many.safetensors", "--tensors") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert "Traceback" not in (said := process.stderr.read())
        assert "polyak" not in said


@pytest.mark.parametrize(
    "command", first_quick([["average"], [], ["sweep"], ["study", "article"]]), ids=str
)
def test_help_loads_neither_torch_nor_charts(command: list[str]) -> None:
    code = (
        "import sys; from polyak.cli import app\n"
        f"try: app({[*command, '--help']!r})\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("Usage: ")
    assert not {"torch", "numpy", "altair", "rich"} & set(done.stderr.split())


def by_torchrun(folder: Path, log: str, *arguments: str) -> str:
    """What a command says that three processes share; none of them is left."""
    with launched(Path("-m"), "polyak", *arguments, log=folder / log, ranks=3) as launch:
        return launch.wait(HANG)


@pytest.mark.slow
def test_processes_of_torchrun_share_a_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of one process, and the words of one process."""
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        save_file({f"w{n}": torch.randn(50, n) for n in range(1, 8)}, f"{i}.safetensors")
    weights = {"w": torch.zeros(300)}
    averager = polyak.Averager(weights, "power(relative_std=0.05)")
    recorder = polyak.Recorder(averager, "run", every=5)
    for _ in range(60):
        weights["w"] += torch.randn(300)
        averager.update()
        recorder.update()
    files = [f"{i}.safetensors" for i in range(3)]
    commands = {
        "average": ["average", *files, "--out"],
        "synthesize": ["synthesize", "run", "--rule", "power(relative_std=0.1)", "--out"],
    }
    for name, command in commands.items():
        mine, theirs = f"{name}-one.safetensors", f"{name}-three.safetensors"
        alone = subprocess.run(
            [*POLYAK, *command, mine], check=True, capture_output=True, text=True
        )
        said = by_torchrun(tmp_path, name, *command, theirs, "--torchrun")
        assert Path(mine).read_bytes() == Path(theirs).read_bytes()
        assert said.count(theirs) == alone.stdout.count(mine) == 1
    no = [*commands["average"], "average-one.safetensors", "--torchrun"]
    with (
        launched(Path("-m"), "polyak", *no, log=tmp_path / "no") as launch,
        pytest.raises(AssertionError, match=r"average-one\.safetensors already exists"),
    ):
        launch.wait(HANG)
    no[-2] = "new.safetensors"
    done = subprocess.run([*POLYAK, *no], check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "torchrun has not started this process" in done.stderr
