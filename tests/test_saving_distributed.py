"""Averages saved by several ranks: taken over by any number of them and by one, bit for bit, or refused."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import polyak
import replicas_ranks
import saving_distributed_ranks as ranks
from corrupting import same, save_folder
from launching import said_by
from patience import HANG
from polyak import checkpoints
from polyak._lazy import Held, LazyTensors, TensorSpec, Where, spec_of
from polyak._ranks.shard_geometry import Box
from polyak.checkpoints._dcp.tensors import DistributedTensors, chunks_part
from polyak.offline import average, describe
from polyak.offline._summation import Summand, Summation, Threads
from sharding_ranks import RULES, Net

RANKS_FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata")


def run(phase: str, world: int, folder: Path) -> list[str]:
    """What each of so many ranks says of a phase."""
    (folder / "phase").write_text(phase)
    (folder / "store").unlink(missing_ok=True)
    return said_by(ranks.__file__, world, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 2 ranks and what 4 have saved; and beside, the same in a file of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in (2, 4):
        run("save", world, folder)
    for place in places(folder):
        whole = averager(place)
        polyak.load(place / "alone", whole)
        polyak.save(place / "file", whole)
    return folder


def places(folder: Path) -> list[Path]:
    return sorted((folder / "saved").iterdir())


def model_of(place: Path) -> torch.nn.Module:
    made = replicas_ranks.Net() if place.name.startswith("replicas") else Net()
    made.double().load_state_dict(wanted(place)["model"])
    return made


def averager(place: Path, **options: Any) -> polyak.Averager:
    return polyak.Averager(model_of(place), RULES, **{**ranks.OPTIONS, **options})


def wanted(place: Path) -> Any:
    return torch.load(place / "wanted.pt", weights_only=True)["now"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_takes_it_over(folder: Path, world: int) -> None:
    names = [place.name for place in places(folder)]
    assert len(names) == 8
    for said in run("load", world, folder):
        assert said.splitlines() == [*names, "load"]


@pytest.mark.slow
def test_one_process_takes_it_over(folder: Path) -> None:
    """Without a process group, into plain tensors."""
    for place in places(folder):
        held = wanted(place)
        for path in ("alone", "file", "training/average", "state", "state/average"):
            whole = averager(place)
            polyak.load(place / path, whole)
            ranks.require_equal(whole.state_dict(), held["average"])
        state: dict[str, Any] = {
            "model": {n: torch.zeros_like(t) for n, t in held["model"].items()},
            "average": averager(place),
            "other": polyak.Averager(model_of(place), ranks.OTHER, every=2),
            "step": 0,
        }
        checkpoints.load_distributed(place / "training", state)
        ranks.require_equal(state["model"], held["model"])
        for key in ("average", "other"):
            ranks.require_equal(state[key].state_dict(), held[key])
        assert state["step"] == 5


@pytest.mark.slow
def test_every_reader_reads_it(folder: Path, tmp_path: Path) -> None:
    """As they read the file of one process: reading, exports, averages of files, descriptions."""
    for place in places(folder):
        of_one = checkpoints.read(place / "file")
        live = wanted(place)["model"]
        for path in ("alone", "training/average"):
            found = checkpoints.read(place / path)
            assert found.format == "polyak" and found.count == 5
            assert found.rules == of_one.rules and found.dtypes == of_one.dtypes
            for name in RULES:
                require_same(found.average(name), of_one.average(name))
            told, of_file = describe(place / path), describe(place / "file")
            assert told.averages == of_file.averages and told.tensors == of_file.tensors
            for name in ("last", "bema"):
                files = [tmp_path / f"{place.name}-{kind}-{name}.safetensors" for kind in "ab"]
                checkpoints.export(files[0], found, name, overwrite=True)
                checkpoints.export(files[1], of_one, name, overwrite=True)
                assert files[0].read_bytes() == files[1].read_bytes()
            assert found.live is not None
            require_same(found.live, {name: live[name] for name in found.live})
        both = [place / "alone", place / "training" / "average"]
        require_same(average(both, which="ema"), average([place / "file"] * 2, which="ema"))
        with pytest.raises(ValueError, match="has the averagers average, other: give one, such as"):
            checkpoints.read(place / "training")
        with pytest.raises(FileNotFoundError, match="has no averager 'third'"):
            checkpoints.read(place / "training" / "third")


def require_same(got: Any, wanted: Any) -> None:
    assert list(got) == list(wanted)
    for name in wanted:
        assert same(got[name], wanted[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("path", ["alone", "state", "training/average"])
def test_torn_folders_are_refused(folder: Path, tmp_path: Path, path: str) -> None:
    """A lost file, one of another save, a cut one, a bit of a tensor: refused. Any bit: if it matters."""
    place = folder / "saved" / "fsdp-2"
    right = wanted(place)["average"]
    other = folder / "saved" / "tensor_parallel-2"
    kind, _, key = path.partition("/")
    for number, (spoil, matters) in enumerate(spoilt(place / kind, other / kind, random.Random(0))):
        torn = tmp_path / str(number)
        shutil.copytree(place / kind, torn)
        spoil(torn)
        whole = averager(place)
        try:
            polyak.load(torn / key, whole)
        except (ValueError, FileNotFoundError) as error:
            assert str(torn) in str(error)
            assert whole.count == 0
        else:
            assert not matters, number
            ranks.require_equal(whole.state_dict(), right)
        shutil.rmtree(torn)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["alone", "training/average"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_file_of_another_save_is_refused(
    folder: Path, tmp_path: Path, path: str, rank: int
) -> None:
    """Of the same layout, so that all else fits: what a save that overwrites in place can leave."""
    kind, _, key = path.partition("/")
    for place in places(folder):
        later = place / f"{kind}-later"
        torn = tmp_path / place.name
        shutil.copytree(later, torn)
        polyak.load(torn / key, averager(place))
        shutil.copy(place / kind / f"__{rank}_0.distcp", torn)
        whole = averager(place)
        with pytest.raises(ValueError, match=r"comes from another save than|ends beyond|damaged"):
            polyak.load(torn / key, whole)
        assert whole.count == 0


def spoilt(
    place: Path, other: Path, chosen: random.Random
) -> Iterator[tuple[Callable[[Path], object], bool]]:
    """What is done to a copy of a folder, and whether the averager in it must be lost by it."""
    contents = {name: (place / name).read_bytes() for name in RANKS_FILES}
    for name, content in contents.items():
        yield lambda torn, n=name: (torn / n).unlink(), True  # type: ignore[misc]
        yield replaced(name, (other / name).read_bytes()), True
        for cut in (0, 1, len(content) // 2, len(content) - 1):
            yield replaced(name, content[:cut]), True
        for _ in range(20):
            yield flipped(name, content, chosen.randrange(len(content)), chosen), False
    held = DistributedTensors(place)
    ours = [n for n in held if n.removeprefix("average.").startswith(("averages", "copies"))]
    pieces = [piece for name in ours for piece in held.places(name) if piece.nbytes]
    for piece in chosen.sample(pieces, 30):
        name, at = piece.path.name, piece.start + chosen.randrange(piece.nbytes)
        yield flipped(name, contents[name], at, chosen), True
    first, second, _ = RANKS_FILES
    yield replaced(first, contents[second]), True
    yield replaced(second, contents[first]), True


def replaced(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda torn: (torn / name).write_bytes(content)


def flipped(name: str, content: bytes, at: int, chosen: random.Random) -> Callable[[Path], object]:
    byte = content[at] ^ 1 << chosen.randrange(8)
    return replaced(name, content[:at] + bytes([byte]) + content[at + 1 :])


def test_several_states_are_asked_for(tmp_path: Path) -> None:
    made = polyak.Averager({"w": torch.ones(2)}, "exponential(0.9)")
    made.update()
    fresh = polyak.Averager({"w": torch.zeros(2)}, "exponential(0.9)")
    save_folder({"a": made.state_dict(), "b": made.state_dict()}, tmp_path / "two")
    with pytest.raises(
        ValueError, match=r"states of several averagers, a, b: give the path of one, .*two/b"
    ):
        polyak.load(tmp_path / "two", fresh)
    polyak.load(tmp_path / "two" / "b", fresh)
    assert fresh.count == 1
    save_folder(made.state_dict(), tmp_path / "top")
    polyak.load(tmp_path / "top", fresh)
    fresh = polyak.Averager({"w": torch.zeros(2)}, "exponential(0.5)")
    with pytest.raises(ValueError, match=r"top: load_state_dict: .*other rules"):
        polyak.load(tmp_path / "top", fresh)
    fresh = polyak.Averager({"w": torch.zeros(3)}, "exponential(0.9)")
    with pytest.raises(ValueError, match=r"w: .*\(2,\).*wanted .*\(3,\)"):
        polyak.load(tmp_path / "two" / "a", fresh)


def test_objects_come_back_under_the_keys_that_they_had(tmp_path: Path) -> None:
    """Also where these are no text, as those of an optimizer and of a schedule are."""

    def made(steps: int) -> dict[str, Any]:
        weight = torch.full((2,), 1.0, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], history_size=2)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 40])
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.step(lambda: weight.square().sum())
            schedule.step()
        return {
            "optimizer": optimizer,
            "schedule": schedule,
            "d": {0: steps, "a": {1: torch.full((2,), float(steps)), 2: [{"b": steps}]}},
        }

    saved, into = made(4), made(3)
    checkpoints.save_distributed(tmp_path / "it", saved)
    checkpoints.load_distributed(tmp_path / "it", into)
    for key in ("optimizer", "schedule"):
        got, wanted = into[key].state_dict(), saved[key].state_dict()
        ranks.require_equal(got, wanted)
    assert into["d"].keys() == {0, "a"} and into["d"][0] == 4
    assert torch.equal(into["d"]["a"][1], torch.full((2,), 4.0))
    assert into["d"]["a"][2] == [{"b": 4}]
    averager = polyak.Averager({"w": torch.ones(2)}, "uniform()")
    for state, told in (
        ({"d": {0: 1, "0": 2}}, "d has the keys 0 and '0'"),
        ({"all": {"mine": averager}}, r"all\.mine is an averager; put it at the top"),
    ):
        with pytest.raises(ValueError, match=told):
            checkpoints.save_distributed(tmp_path / "no", state)
    assert not (tmp_path / "no").exists()


def test_a_torch_that_cannot_copy_a_state_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("torch.distributed.checkpoint.staging.DefaultStager", raising=False)
    averager = polyak.Averager({"w": torch.ones(2)}, "uniform()")
    averager.update()
    told = rf"save_distributed_async: torch {re.escape(torch.__version__)} cannot copy.*call save_distributed,"
    with pytest.raises(RuntimeError, match=told):
        checkpoints.save_distributed_async(tmp_path / "it", {"average": averager})
    assert not list(tmp_path.iterdir())


FAILS_UNTOLD = """
import sys, torch, polyak
from polyak import checkpoints
averager = polyak.Averager({"w": torch.ones(2)}, "uniform()")
averager.update()
checkpoints.save_distributed_async(sys.argv[1], {"average": averager})
"""


@pytest.mark.slow
def test_a_save_that_fails_untold_is_told_at_exit(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, told in ((tmp_path / "file" / "it", True), (tmp_path / "it", False)):
        command = [sys.executable, "-c", FAILS_UNTOLD, str(place)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
        assert done.returncode == 0, done.stderr
        assert (
            f"RuntimeWarning: save_distributed_async: {place} was not saved" in done.stderr
        ) == told
    assert (tmp_path / "it" / ".metadata").exists()


def test_the_live_weights_are_those_of_the_model(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    made = polyak.Averager(model, "exponential(0.9)")
    made.update()
    torch.nn.init.constant_(model.weight, 7)
    checkpoints.save_distributed(tmp_path / "it", {"model": model, "average": made})
    found = checkpoints.read(tmp_path / "it")
    assert found.live is not None
    require_same(found.live, model.state_dict())
    require_same(found.average(), made.average())
    checkpoints.export(tmp_path / "a.safetensors", found)
    require_same(load_file(tmp_path / "a.safetensors"), made.average())


def test_a_folder_takes_the_place_of_a_file(tmp_path: Path) -> None:
    """And the other way round it does not: a folder may hold more than an average."""
    made = polyak.Averager({"w": torch.ones(2)}, "exponential(0.9)")
    made.update()
    polyak.save(tmp_path / "it", made)
    checkpoints.save_distributed(tmp_path / "it", {"average": made}, overwrite=True)
    assert (tmp_path / "it").is_dir()
    with pytest.raises(IsADirectoryError):
        polyak.save(tmp_path / "it", made, overwrite=True)


@pytest.mark.slow
@pytest.mark.parametrize("phase", list(ranks.LAWS))
@pytest.mark.parametrize("world", [2, 4])
def test_laws(tmp_path: Path, phase: str, world: int) -> None:
    names = [law.__name__ for law in ranks.LAWS[phase]]
    for said in run(phase, world, tmp_path):
        assert said.splitlines() == names


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Tensor, list[Box]]:
    """A tensor, and boxes that it is cut into, as ranks cut: dimension after dimension."""
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 3)) if shape else 0):
        dimension, parts = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 4))
        boxes = [part for box in boxes for part in halves(box, dimension, parts)]
    return tensor, [box for box in boxes if box.numel]


def halves(box: Box, dimension: int, parts: int) -> Iterator[Box]:
    length = -(-box.shape[dimension] // parts)
    for start in range(0, box.shape[dimension], max(length, 1)):
        offsets, shape = list(box.offsets), list(box.shape)
        offsets[dimension] += start
        shape[dimension] = min(length, shape[dimension] - start)
        yield Box(tuple(offsets), tuple(shape))


class Chunked(LazyTensors):
    """One tensor `w` in chunks, as a folder's; `chunks` are those that were read."""

    def __init__(self, tensor: Tensor, boxes: list[Box]) -> None:
        self._specs = {"w": spec_of(tensor)}
        self._tensor, self._boxes = tensor, boxes
        self.chunks: list[Box] = []

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self._specs

    def read(self, name: str, where: Where = ()) -> Tensor:
        return chunks_part(self._specs[name], self._boxes, self._chunk, where)

    def _chunk(self, box: Box) -> Tensor:
        self.chunks.append(box)
        everything = Box((0,) * self._tensor.dim(), tuple(self._tensor.shape))
        return self._tensor[box.within(everything)].clone()


@given(tilings(), st.data())
def test_parts_are_those_of_the_whole(made: tuple[Tensor, list[Box]], data: st.DataObject) -> None:
    """And of the chunks only those are read that the part lies in."""
    tensor, boxes = made
    held = Chunked(tensor, boxes)
    assert same(held["w"], tensor)
    held.chunks.clear()
    begins = [data.draw(st.integers(0, n)) for n in tensor.shape]
    ends = [data.draw(st.integers(b, n)) for b, n in zip(begins, tensor.shape, strict=True)]
    wanted = Box(tuple(begins), tuple(e - b for b, e in zip(begins, ends, strict=True)))
    slices = tuple(slice(*each) for each in zip(begins, ends, strict=True))
    assert same(held.read("w", slices), tensor[slices])
    read = held.chunks
    assert all(box.overlap(wanted).numel for box in read) and len(read) == len(set(read))
    if tensor.numel():
        start = data.draw(st.integers(0, tensor.numel() - 1))
        stop = data.draw(st.integers(start + 1, tensor.numel()))
        out = torch.empty(stop - start, dtype=tensor.dtype)
        held.elements("w").read_(out, start)
        assert same(out, tensor.reshape(-1)[start:stop])


@pytest.mark.parametrize("shape", [(700, 901), (3, 210_000), (630_000,)])
def test_sums_of_chunks_are_those_of_the_whole(shape: tuple[int, ...]) -> None:
    """In several pieces, and bit for bit."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for _ in range(3)]
    everything = Box((0,) * len(shape), shape)
    boxes = list(halves(everything, 0, 4))
    if len(shape) == 2:
        boxes = [part for box in boxes for part in halves(box, 1, 3)]
    shares = (1.0, 0.3, -0.2)
    threads = Threads()
    results = []
    for cut in (False, True):
        terms = [
            Summand((Chunked(t, boxes) if cut else Held({"w": t})).elements("w"), s)
            for t, s in zip(tensors, shares, strict=True)
        ]
        made = Summation(terms, torch.float64, torch.float32).pieces(threads)
        results.append(torch.cat([piece.clone() for piece in made]))
    assert same(results[1], results[0])
