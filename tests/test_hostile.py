"""Thousands of damaged and hostile files of every layout: refused by name, or read as they say.

The files are read in processes of their own, with little memory: none may crash, hang, allocate,
warn, run code, or raise anything but one `ValueError` or `OSError`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hostile_files import (
    MARKER,
    Case,
    corrupted,
    lying_dictionaries,
    lying_natives,
    made,
    valid,
)
from reading_hostile import digest, read_all

READER = Path(__file__).with_name("reading_hostile.py")
BATCH = 500
MEMORY = 200_000_000


def results(cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    """What comes of each case, in order; a process that dies fails at the file that killed it."""
    found: list[dict[str, Any]] = []
    for start in range(0, len(cases), BATCH):
        found += _batch(cases[start : start + BATCH], folder)
    assert not (folder / MARKER).exists(), "code from a file was run"
    return found


def _batch(cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    lines = (json.dumps({"path": str(case.path), "load": case.load}) for case in cases)
    (folder / "cases").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, str(READER), str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=600,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    at = cases[len(found)].path if len(found) < len(cases) else "the end"
    assert done.returncode == 0, f"it died with {done.returncode} at {at}: {done.stderr[-2000:]}"
    assert len(found) == len(cases)
    return found


def faults(found: Sequence[dict[str, Any]]) -> list[str]:
    """What went wrong: an error of another kind, or much memory."""
    wrong = [
        f"{each['path']}: {result['fault']}"
        for each in found
        for result in each["results"]
        if "fault" in result
    ]
    heavy = [f"{each['path']}: {each['memory']} bytes" for each in found if each["memory"] > MEMORY]
    return (wrong + heavy)[:20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[Case]:
    return list(valid(folder / "valid"))


@pytest.mark.slow
def test_valid_files_are_read_and_loaded(folder: Path, whole: list[Case]) -> None:
    """Or the tests below would show nothing."""
    found = results(whole, folder)
    assert not faults(found)
    refused = {
        case.made_of: result["refused"]
        for case, each in zip(whole, found, strict=True)
        for result in each["results"]
        if "refused" in result
    }
    assert not refused
    assert len({case.made_of for case in whole}) == len(whole) >= 20


@pytest.mark.slow
def test_damaged_files_are_refused_or_read_as_they_say(folder: Path, whole: list[Case]) -> None:
    place = folder / "damaged"
    place.mkdir()
    chosen = random.Random(0)
    cases = [case for each in whole for case in corrupted(each, place, chosen, 9)]
    assert len(cases) > 1200
    found = results(cases, folder)
    assert not faults(found)
    held = {case.made_of: set(read_all(case.path)) for case in whole}
    for case, each in zip(cases, found, strict=True):
        got = set(each["results"][0].get("read", ()))
        allowed = said(case) if case.unsummed and got else set()
        assert got <= allowed | held[case.made_of], f"{case.path} is read as it does not say"
    counts = [sum(kind in each["results"][0] for each in found) for kind in ("read", "refused")]
    assert counts[0] > 50, "nothing that is damaged is read: the comparison shows nothing"
    assert counts[1] > 800


def said(case: Case) -> set[str]:
    """The tensors that files without checksums hold, as their own libraries read them, if they do."""
    files = [case.path] if case.path.is_file() else sorted(case.path.glob("*.safetensors"))
    held: set[str] = set()
    for file in files:
        try:
            read = load_file(file) if file.suffix == ".safetensors" else _loaded(file)
        except Exception:  # the library is more strict, or this file of several was not needed
            continue
        held |= {digest(tensor) for tensor in read.values() if isinstance(tensor, torch.Tensor)}
    return held


def _loaded(file: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


@pytest.mark.slow
def test_files_that_lie_are_refused_or_read(folder: Path, whole: list[Case]) -> None:
    assert whole
    place = folder / "lies"
    place.mkdir()
    chosen = random.Random(1)
    cases = [*lying_natives(place, chosen, 200), *lying_dictionaries(place, chosen, 60)]
    assert len(cases) > 1000
    found = results(cases, folder)
    assert not faults(found)
    assert sum("refused" in each["results"][0] for each in found) > 300


@pytest.mark.slow
def test_hostile_files_are_refused(folder: Path, whole: list[Case]) -> None:
    assert whole
    place = folder / "made"
    place.mkdir()
    cases = list(made(place))
    assert len(cases) > 1000
    found = results(cases, folder)
    assert not faults(found)
    assert sum("refused" in each["results"][0] for each in found) > 900


def test_a_few_hostile_files(tmp_path: Path) -> None:
    """The quick part of the tests above."""
    cases = list(valid(tmp_path / "valid"))
    (tmp_path / "made").mkdir()
    chosen = random.Random(2)
    for case in cases[::3]:
        cases += islice(corrupted(case, tmp_path / "made", chosen, 1), 7)
    cases += islice(made(tmp_path / "made"), 0, 600, 20)
    assert not faults(results(cases, tmp_path))


@pytest.mark.slow
@settings(max_examples=2000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzzed_files(folder: Path, whole: list[Case], data: st.DataObject) -> None:
    """Several changes at once, found by hypothesis, read in this process."""
    files = [case for case in whole if case.path.is_file()]
    case = data.draw(st.sampled_from(files))
    content = bytearray(case.path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        with_what = data.draw(st.binary(max_size=12))
        content[start : start + data.draw(st.integers(0, 12))] = with_what
        content = content or bytearray(b"x")
    place = folder / f"fuzzed{case.path.suffix}"
    place.unlink(missing_ok=True)  # what is mapped must not be cut short
    place.write_bytes(content)
    try:
        read_all(place)
    except (ValueError, OSError) as error:
        assert str(place) in str(error)
