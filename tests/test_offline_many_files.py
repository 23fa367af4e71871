"""Many files: averages of more files than a process may have open."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyak import checkpoints, offline
from polyak.checkpoints._open.files import OpenFile

FILES = 120


def saved(path: Path, value: float) -> None:
    torch.save({"w": torch.full((3,), value)}, path)


def saved_by_columns(path: Path, value: float) -> None:
    """Not row by row: such a tensor is read from the mapped file."""
    torch.save({"w": torch.full((3, 2), value).t()}, path)


def saved_plainly(path: Path, value: float) -> None:
    save_file({"w": torch.full((3,), value)}, path.with_suffix(".safetensors"))


def saved_in_shards(path: Path, value: float) -> None:
    path = path.with_suffix("")
    path.mkdir()
    files = {f"w{i}": f"model-{i}-of-3.safetensors" for i in (1, 2, 3)}
    for name, file in files.items():
        save_file({name: torch.full((3,), value)}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def few() -> Iterator[None]:
    """At most 100 files open, those of this process included."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("save", [saved, saved_by_columns, saved_plainly, saved_in_shards])
def test_more_files_than_may_be_open(save: Callable[[Path, float], None], tmp_path: Path) -> None:
    for i in range(FILES):
        save(tmp_path / f"{i}.pt", float(i))
    made = offline.average(offline.choose(tmp_path, steps=(0, FILES - 1, 1)).files)
    for tensor in made.values():
        assert torch.all((tensor - (FILES - 1) / 2).abs() < 1e-4)
    assert open_files() < 100
    made.write(tmp_path / "mean.safetensors")


@pytest.mark.usefixtures("few")
def test_a_file_that_is_replaced_while_its_handle_is_closed_is_refused(tmp_path: Path) -> None:
    """Never the content of another file: what stays open is read as it was."""
    for i in range(FILES):
        saved(tmp_path / f"{i}.pt", float(i))
    read = [checkpoints.read(tmp_path / f"{i}.pt") for i in range(FILES)]
    for i in (0, FILES - 1):
        saved(tmp_path / "new.pt", -1.0)
        (tmp_path / "new.pt").replace(tmp_path / f"{i}.pt")
    with pytest.raises(ValueError, match=r"0\.pt: the file was replaced while it was read"):
        read[0].weights()["w"]
    assert float(read[-1].weights()["w"][0]) == FILES - 1


@pytest.mark.usefixtures("few")
def test_threads_never_read_through_anothers_handle(tmp_path: Path) -> None:
    for i in range(FILES):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 4096)
    files = [OpenFile(tmp_path / str(i)) for i in range(FILES)]

    def wrong(i: int) -> bool:
        content = bytearray(4096)
        files[i].read_into(memoryview(content), 0)
        return content != bytes([i]) * 4096

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(wrong, [i * 7 % FILES for i in range(40 * FILES)])) == 0


def test_handles_are_closed_with_their_files(tmp_path: Path) -> None:
    saved(tmp_path / "0.pt", 0.0)
    before = open_files()
    kept = checkpoints.read(tmp_path / "0.pt").weights()["w"]
    assert open_files() == before
    assert kept.tolist() == [0, 0, 0]


@pytest.mark.slow
def test_300_files_within_256_and_80_folders_of_14_within_1024(tmp_path: Path) -> None:
    for i in range(300):
        saved(tmp_path / f"{i}.pt", float(i))
    for i in range(80):
        folder = tmp_path / "run" / f"checkpoint-{i}"
        folder.mkdir(parents=True)
        files = {f"w{n}": f"model-{n:05d}-of-00014.safetensors" for n in range(1, 15)}
        for name, file in files.items():
            save_file({name: torch.full((3,), float(i))}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    listed = sorted(map(str, tmp_path.glob("*.pt")))
    for limit, inputs, mean in ((256, listed, 149.5), (1024, ["run", "--last", "80"], 39.5)):
        command = [
            sys.executable,
            "-m",
            "polyak",
            "average",
            *inputs,
            "--out",
            f"{limit}.safetensors",
        ]
        done = subprocess.run(
            ["bash", "-c", f'ulimit -n {limit}; exec "$@"', "-", *command],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for tensor in load_file(tmp_path / f"{limit}.safetensors").values():
            assert torch.allclose(tensor, torch.full((3,), mean), rtol=1e-5)
