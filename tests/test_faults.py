"""Ranks killed with SIGKILL, in training and in every phase of a save, and folders torn by hand."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import faults_ranks
import polyak
from faults_ranks import Training
from launching import launched
from polyak import checkpoints

STEPS = range(1, faults_ranks.STEPS + 1)

# Where ranks end, "event:rank:step", and the steps from which what is launched again may go on.
FAULTS = {
    "train:1:2": [1],
    "after_data:0:3": [2],
    "amid_data:1:4": [3],
    "before_data:1:5": [4],
    "before_metadata:0:6": [5],
    "before_rename:0:7": [6],
    "while_other_renames:1:8": [7, 8],
    "after_rename:0:9": [9],
    "before_data:0:11": [10],  # in the background, as the next one
    "amid_background:1:13": [11, 12],
}
EXCHANGE = {"amid_removal:0:3": [3]}


class Said:
    """What the ranks of one launch said: digests by step, and what happened, in order."""

    def __init__(self, said: str) -> None:
        lines = re.findall(r"^(saved|resumed) (\d+) (\w{16})", said, re.MULTILINE)
        self.saved = {int(step): digest for what, step, digest in lines if what == "saved"}
        self.resumed = [(int(step), digest) for what, step, digest in lines if what == "resumed"]
        self.unfinished = list(
            map(int, re.findall(r" beside (\d+) unfinished$", said, re.MULTILINE))
        )
        self.faults = re.findall(r"^fault (\S+)$", said, re.MULTILINE)
        self.done = said.count("\ndone\n")


def run(folder: Path, saving: str, faults: list[str]) -> Said:
    """A training whose ranks end so, relaunched by torchrun as often."""
    (folder / "marks").mkdir(parents=True)
    with launched(
        Path(faults_ranks.__file__),
        str(folder),
        saving,
        log=folder / "log",
        restarts=len(faults),
        environment={"POLYAK_FAULTS": " ".join(faults)},
    ) as launch:
        said = Said(launch.wait())
        assert launch.failures == len(faults)
    assert said.faults == faults
    assert (len(said.resumed), said.done) == (len(faults), 1)
    return said


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """The folder of a run that nothing disturbs, and its digests by step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    digests = run(folder, "steps", []).saved
    assert list(digests) == list(STEPS)
    assert len({*digests.values()}) == len(STEPS)
    return folder / "run", digests


def require_as_undisturbed(
    said: Said, faults: dict[str, list[int]], wanted: dict[int, str]
) -> None:
    """Whatever was taken over or saved is what the undisturbed run had at that step."""
    for fault, (step, digest) in zip(faults, said.resumed, strict=True):
        assert step in faults[fault], fault
        assert digest == wanted[step], fault
    assert said.saved | dict(said.resumed) == wanted
    assert max(said.unfinished) == 1


@pytest.mark.slow
def test_killed_anywhere_a_run_ends_as_if_undisturbed(
    tmp_path: Path, undisturbed: tuple[Path, dict[int, str]]
) -> None:
    said = run(tmp_path, "steps", list(FAULTS))
    require_as_undisturbed(said, FAULTS, undisturbed[1])
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(
        f"step-{step}" for step in STEPS
    )


@pytest.mark.slow
def test_killed_as_the_old_folder_goes_a_run_has_the_new_one(
    tmp_path: Path, undisturbed: tuple[Path, dict[int, str]]
) -> None:
    said = run(tmp_path, "newest", list(EXCHANGE))
    require_as_undisturbed(said, EXCHANGE, undisturbed[1])
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["newest"]


@pytest.mark.slow
def test_saved_in_place_the_same_kill_is_taken_over_in_silence(
    tmp_path: Path, undisturbed: tuple[Path, dict[int, str]]
) -> None:
    """The control: these tests can fail, and `torch.distributed.checkpoint.save` alone does."""
    said = run(tmp_path, "in_place", ["before_data:1:5"])
    ((_, torn),) = said.resumed
    assert torn not in undisturbed[1].values()
    assert said.saved[STEPS[-1]] != undisturbed[1][STEPS[-1]]
    assert said.saved[4] == undisturbed[1][4]


def state() -> dict[str, Any]:
    """What one process has to fill, without a process group."""
    return Training(sharded=False).state()


def missing(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def cut_by(count: Callable[[int], int]) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        file = folder / "__1_0.distcp"
        os.truncate(file, file.stat().st_size - count(file.stat().st_size))

    return cut


def unfinished(folder: Path) -> None:
    (folder / ".metadata").rename(folder / ".metadata.tmp")


TORN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a rank's file is missing": (missing, r"__1_0\.distcp is missing"),
    "a byte of it": (cut_by(lambda _: 1), r"__1_0\.distcp has \d+ bytes, .* is cut short"),
    "half of it": (cut_by(lambda size: size // 2), r"__1_0\.distcp has \d+ bytes, .* is cut short"),
    "all of it": (cut_by(lambda size: size), r"__1_0\.distcp: the file is empty"),
    "no metadata": (unfinished, r"\.metadata is missing: |No such file or directory: .*/step-5"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("tear", "message"), TORN.values(), ids=TORN.keys())
def test_a_torn_folder_is_refused_and_nothing_changes(
    tmp_path: Path,
    undisturbed: tuple[Path, dict[int, str]],
    tear: Callable[[Path], None],
    message: str,
) -> None:
    place = shutil.copytree(undisturbed[0] / "step-5", tmp_path / "step-5")
    held = state()
    checkpoints.load_distributed(place, held)
    assert (held["step"], held["average"].count) == (5, 5)
    tear(place)
    held = state()
    before = {name: tensor.clone() for name, tensor in held["model"].state_dict().items()}
    for load in (
        lambda: checkpoints.load_distributed(place, held),
        lambda: polyak.load(place / "average", held["average"]),
        lambda: checkpoints.read(place / "average"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load()
    assert (held["step"], held["average"].count) == (0, 0)
    assert all(torch.equal(held["model"].state_dict()[name], before[name]) for name in before)


def flip(folder: Path, tensor: Tensor) -> None:
    """Changes one bit of some rank's part of a tensor of 8 rows."""
    content = tensor[:4].contiguous().numpy().tobytes()
    (file,) = (f for f in folder.glob("*.distcp") if content in f.read_bytes())
    whole = file.read_bytes()
    file.write_bytes(whole.replace(content, bytes([content[0] ^ 1]) + content[1:], 1))


@pytest.mark.slow
def test_a_flipped_bit_of_an_average_is_refused(
    tmp_path: Path, undisturbed: tuple[Path, dict[int, str]]
) -> None:
    place = shutil.copytree(undisturbed[0] / "step-5", tmp_path / "step-5")
    held = state()
    checkpoints.load_distributed(place, held)
    flip(place, held["average"].average("ema")["1.1.weight"])
    for load in (
        lambda: checkpoints.load_distributed(place, state()),
        lambda: polyak.load(place / "average", state()["average"]),
    ):
        with pytest.raises(ValueError, match=r"__0_0\.distcp: .*1\.1\.weight: .* is damaged"):
            load()
