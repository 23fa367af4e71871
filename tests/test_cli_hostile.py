"""Damaged and hostile files through the command line: one error and exit code 2, or the file is read."""

from __future__ import annotations

import random
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest

from cli_runs import run
from hostile_files import MARKER, corrupted, lying_natives, made, valid

COMMANDS = (
    ("inspect", "--json"),
    ("export", "{out}.safetensors"),
    ("export", "{out}.safetensors", "--average", "live"),
    ("average", "--out", "{out}.safetensors"),
    ("diff",),
)


def problems(command: tuple[str, ...], path: Path, out: Path) -> list[str]:
    """What is wrong with how a command takes a file; nothing if it reads or refuses it cleanly."""
    name, *options = command
    files = [path, path] if name == "diff" else [path]
    done: Any = run(name, *files, *(option.format(out=out) for option in options))
    found = []
    if done.exit_code not in (0, 2):
        found.append(f"exit code {done.exit_code}: {done.exception!r}")
    if "Traceback" in done.output:
        found.append("a traceback")
    begins = [line.startswith("polyak: ") for line in done.stderr.splitlines()]
    if done.exit_code == 2 and not (begins and begins[0] and sum(begins) == 1):
        found.append(f"no single error: {done.stderr!r:.300}")
    left = [each.name for each in out.parent.glob(".*.part")]
    if left or (done.exit_code == 2 and out.with_suffix(".safetensors").exists()):
        found.append(f"something is left: {left}")
    out.with_suffix(".safetensors").unlink(missing_ok=True)
    return [f"{name} {path}: {each}" for each in found]


@pytest.mark.slow
def test_hostile_files_through_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = random.Random(1)
    for name in ("damaged", "lies", "made", "out"):
        (tmp_path / name).mkdir()
    cases = list(valid(tmp_path / "valid"))
    files = chain(
        (case.path for case in cases),
        *(
            (case.path for case in corrupted(each, tmp_path / "damaged", chosen, 2))
            for each in cases
        ),
        (case.path for case in lying_natives(tmp_path / "lies", chosen, 60)),
        (case.path for case in islice(made(tmp_path / "made"), 0, None, 2)),
    )
    out, found, count = tmp_path / "out" / "it", [], 0
    for i, path in enumerate(files):
        found += problems(COMMANDS[i % len(COMMANDS)], path, out)
        found += problems(COMMANDS[0], path, out)
        count += 1
    assert not found, found[:10]
    assert count > 300
    assert not (tmp_path / MARKER).exists(), "code from a file was run"
