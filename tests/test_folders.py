"""Folders: the newest complete save is found beside whatever else lies there; one process saves alone."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from polyak import Averager, checkpoints, load


def fill(path: Path, file: str = "it") -> Path:
    """A file, or a folder with a file: by whether the name has a suffix of a checkpoint."""
    if path.suffix:
        path.write_text("it")
    else:
        path.mkdir()
        (path / file).write_text("it")
    return path


def test_the_newest_is_chosen_among_what_is_a_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path) is None
    for name in ("slurm-123456.out", "log-2026-11-22.txt", ".step-99.0123456789abcdef.part"):
        (tmp_path / name).write_text("no checkpoint")
    for name in ("step-10.stale", "step-11.tmp", "step-12.25", "run-3-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "it").write_text("no checkpoint either")
    (tmp_path / "step-13.tmp").mkdir()
    (tmp_path / "step-13.tmp" / "it.pt").write_text("not yet")
    (tmp_path / "step-1000").symlink_to(tmp_path / "gone")
    assert checkpoints.latest(tmp_path) is None
    for name in ("step-8.safetensors", "step-9.pt", "step-09", "step-100.ckpt"):
        wanted = fill(tmp_path / name)
        assert checkpoints.latest(tmp_path) == wanted


def test_without_numbers_the_newest_is_the_one_that_changed_last(tmp_path: Path) -> None:
    files = {"best": "model.pt", "last": "weights.safetensors", "dcp": ".metadata", "now.ckpt": ""}
    for times in (range(len(files)), reversed(range(len(files)))):
        for name, file, time in zip(files, files.values(), times, strict=True):
            path = tmp_path / name
            if not path.exists():
                fill(path, file)
            os.utime(path, (time, time))
        newest = max(files, key=lambda name: (tmp_path / name).stat().st_mtime)
        assert checkpoints.latest(tmp_path) == tmp_path / newest
    numbered = fill(tmp_path / "step-1")
    os.utime(numbered, (0, 0))
    assert checkpoints.latest(tmp_path) == numbered


def test_interrupted_saves_are_passed_over_with_their_names(tmp_path: Path) -> None:
    (tmp_path / "step-5").mkdir()
    fill(tmp_path / "step-8", "__0_0.distcp")
    with pytest.warns(UserWarning, match=r"skipped step-5, step-8 in .*interrupted"):
        assert checkpoints.latest(tmp_path) is None
    whole = fill(tmp_path / "step-7")
    with pytest.warns(UserWarning, match=r"skipped step-8 in"):
        assert checkpoints.latest(tmp_path) == whole
    newer = fill(tmp_path / "step-9")
    assert checkpoints.latest(tmp_path) == newer  # the older one is no one's concern


def test_older_folders_go_when_the_new_one_is_complete(tmp_path: Path) -> None:
    def save(name: str, keep: int, error: type[Exception] | None = None) -> list[str]:
        with checkpoints.saving(tmp_path / name, keep=keep) as folder:
            (folder / "it").write_text(name)
            if error is not None:
                raise error
        return sorted(each.name for each in tmp_path.iterdir())

    for other in ("step-x", "epoch-1", "step-1.pt", "notes"):
        (tmp_path / other).mkdir()
    (tmp_path / "step-2").write_text("a file")
    others = {"step-x", "epoch-1", "step-1.pt", "notes", "step-2"}
    for step in (98, 99, 100):
        found = save(f"step-{step}", keep=2)
    assert set(found) == others | {"step-99", "step-100"}
    with pytest.raises(KeyError):  # nothing goes for a save that failed
        save("step-101", keep=1, error=KeyError)
    assert {each.name for each in tmp_path.iterdir()} == others | {"step-99", "step-100"}
    assert set(save("step-5", keep=1)) == others | {
        "step-5",
        "step-100",
    }  # what was just saved stays


def test_what_keep_wants(tmp_path: Path) -> None:
    for name, keep, words in (
        ("step-1", 0, "keep is 0, wanted an integer >= 1"),
        ("last", 2, "the name is 'last', wanted a name with a number at its end"),
    ):
        with pytest.raises(ValueError, match=words), checkpoints.saving(tmp_path / name, keep=keep):
            pass
        assert not list(tmp_path.iterdir())


def test_numbers_that_begin_at_odd_places_of_a_file_are_read(tmp_path: Path) -> None:
    """Of 16 bytes each: torch's kernels fault on some of them."""
    torch.manual_seed(0)
    weights = {name: torch.randn(5, 3, dtype=torch.complex128) for name in "abc"}
    averager = Averager(weights, "window(2)")
    for _ in range(3):
        for tensor in weights.values():
            tensor *= 1.5
        averager.update()
    checkpoints.save_distributed(tmp_path / "1", {"average": averager})
    again = Averager(weights, "window(2)")
    load(tmp_path / "1" / "average", again)
    found = checkpoints.read(tmp_path / "1").averages
    for name, tensor in averager.average().items():
        assert torch.equal(again.average()[name], tensor)
        (weights_read,) = found.values()
        assert torch.equal(torch.empty(3, 3, dtype=tensor.dtype).copy_(weights_read[name][1:4]), tensor[1:4])  # fmt: skip


def test_weights_are_not_exported_as_integers(tmp_path: Path) -> None:
    averager = Averager({"w": torch.ones(3)}, "uniform()")
    averager.update()
    with pytest.raises(
        ValueError, match=r"export: dtype is torch\.int32, wanted one of torch\.float64"
    ):
        checkpoints.export(tmp_path / "w.safetensors", averager, dtype=torch.int32)


def test_a_model_may_have_a_tensor_of_our_name(tmp_path: Path) -> None:
    averager = Averager({"w": torch.ones(3)}, "uniform()")
    averager.update()
    model = {"polyak": torch.ones(4, dtype=torch.uint8), "w": torch.ones(3)}
    state = {"model": model, "average": averager}
    checkpoints.save_distributed(tmp_path / "1", state)
    got = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    fresh = Averager({"w": torch.ones(3)}, "uniform()")
    checkpoints.load_distributed(tmp_path / "1", {"model": got, "average": fresh})
    assert torch.equal(got["polyak"], model["polyak"])
    assert fresh.count == 1


class Pickled:
    """An object of a state that calls a function when it is pickled, amid the save."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.then = then

    def __getstate__(self) -> dict[str, str]:
        self.then()
        return {}


def test_saves_that_overlap_leave_the_filters_of_warnings(tmp_path: Path) -> None:
    begun = [threading.Event(), threading.Event()]
    averager = Averager(torch.nn.Linear(2, 2), "exponential(half_life=2)")
    before = list(warnings.filters)
    problems: list[BaseException] = []

    def save(path: str, then: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                state = {"average": averager, "it": Pickled(then)}
                checkpoints.save_distributed(tmp_path / path, state)
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def amid_the_first() -> None:
        begun[0].set()
        assert begun[1].wait(60)

    def amid_the_second() -> None:
        begun[1].set()
        first.join(60)

    first = save("first", amid_the_first)
    assert begun[0].wait(60)
    second = save("second", amid_the_second)
    first.join(60)
    second.join(60)
    assert not problems and not first.is_alive() and not second.is_alive()
    assert warnings.filters == before
