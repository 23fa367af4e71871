"""Averages in the form of their inputs: the weights are new, and everything else is what it was."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import polyak
from alone import ALONE
from cli_runs import run as command
from polyak import Averager, checkpoints, offline
from polyak.checkpoints._dcp.tensors import DistributedTensors
from polyak.checkpoints._torch_save.checksums import _far_place
from test_distributed import TILINGS, WHOLE, split
from test_reading import saved_bytes, tarred


class Strange:
    """An object that the reader knows nothing of."""

    def __init__(self) -> None:
        self.settings = {"lr": 0.1, "names": ["a", "b"]}


def training(value: float) -> dict[str, Any]:
    """Weights of every kind, and what trainings save beside them."""
    tied, whole = torch.full((5, 2), value), torch.arange(20.0) + value
    model = OrderedDict(
        plain=torch.full((3, 4), value),
        by_columns=(torch.arange(6.0) * value).reshape(2, 3).t(),
        within_another=whole[4:8],
        embedding=tied,
        head=tied,
        half=torch.full((7,), value, dtype=torch.bfloat16),
        count=torch.tensor(int(value)),
        empty=torch.ones(0),
        complex=torch.full((2,), value * 1j),
    )
    return {
        "model": model,
        "args": argparse.Namespace(lr=0.1),
        "strange": Strange(),
        "optimizer": {"state": {0: {"exp_avg": torch.full((3, 4), 7.0)}}, "param_groups": [{}]},
        "rest": whole[8:],
        "step": int(value),
    }


def zipped(path: Path, held: Any) -> None:
    torch.save(held, path)


def before_1_6(path: Path, held: Any) -> None:
    torch.save(held, path, _use_new_zipfile_serialization=False)


def without_checksums(path: Path, held: Any) -> None:
    from torch.serialization import set_crc32_options

    set_crc32_options(False)
    try:
        torch.save(held, path)
    finally:
        set_crc32_options(True)


def flat(value: Any) -> dict[str, Any]:
    """Every part of a structure by its place."""
    parts = value if isinstance(value, dict) else {}
    if isinstance(value, (argparse.Namespace, Strange)):
        parts = vars(value)
    if isinstance(value, list):
        parts = dict(enumerate(value))
    within = {f"{key}.{k}": v for key, part in parts.items() for k, v in flat(part).items()}
    return within or {"": value}


@pytest.mark.parametrize("save", [zipped, before_1_6, without_checksums])
class TestFilesOfTorch:
    @pytest.fixture
    def files(self, save: Callable[[Path, Any], None], tmp_path: Path) -> list[Path]:
        for value in (1.0, 2.0, 6.0):
            save(tmp_path / f"step-{value:g}.pt", training(value))
        return sorted(tmp_path.iterdir())

    def test_only_the_weights_change(self, files: list[Path], tmp_path: Path) -> None:
        made = offline.average(files, [0.5, 0.25, 0.25])
        assert checkpoints.write_like(tmp_path / "new.pt", files[1], made) == []
        new, old = (torch.load(p, weights_only=False) for p in (tmp_path / "new.pt", files[1]))
        assert list(new) == list(old) and type(new["model"]) is OrderedDict
        for name, tensor in made.items():
            assert torch.equal(new["model"][name], tensor), name
        for part in ("args", "strange", "optimizer", "rest", "step"):
            got, wanted = flat({part: new[part]}), flat({part: old[part]})
            assert got.keys() == wanted.keys()
            for place, value in wanted.items():
                assert (
                    torch.equal(got[place], value)
                    if torch.is_tensor(value)
                    else got[place] == value
                )
        for name in made:
            assert new["model"][name].stride() == old["model"][name].stride()
        assert new["model"]["head"].data_ptr() == new["model"]["embedding"].data_ptr()

    def test_its_checksums_are_those_of_its_content(
        self, files: list[Path], tmp_path: Path
    ) -> None:
        checkpoints.write_like(tmp_path / "new.pt", files[0], offline.average(files))
        checkpoints.read(tmp_path / "new.pt").verify()
        if zipfile.is_zipfile(files[0]):
            with zipfile.ZipFile(files[0]) as archive:
                summed = any(entry.CRC for entry in archive.infolist())
            with zipfile.ZipFile(tmp_path / "new.pt") as archive:
                assert (archive.testzip() is None) == summed
                entries = archive.infolist()
            content = (tmp_path / "new.pt").read_bytes()
            filled = [entry for entry in entries if entry.file_size and summed]
            for entry in filled:  # torch writes a descriptor behind each record
                crc = b"PK\7\10" + entry.CRC.to_bytes(4, "little")
                assert crc + entry.file_size.to_bytes(4, "little") in content

    def test_by_the_command(self, files: list[Path], tmp_path: Path) -> None:
        out = tmp_path / "new.ckpt"
        done = command(
            "average", tmp_path, "--steps", "1:2", "--like", files[-1], "--out", out, "--verify"
        )
        assert done.exit_code == 0, done.output
        assert "9 tensors are the direct sums" in done.stdout
        new = torch.load(out, weights_only=False)
        assert new["model"]["plain"].unique().tolist() == [1.5] and new["step"] == 6
        again = command("average", *files, "--like", files[-1], "--out", out)
        assert again.exit_code == 2 and "--force replaces it" in again.stderr


WRONG = {
    "a name is missing": ({"a": torch.ones(2)}, "b"),
    "a name too many": ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "c"),
    "a shape": ({"a": torch.ones(2), "b": torch.ones(4)}, "b"),
    "a dtype": ({"a": torch.ones(2), "b": torch.ones(3).double()}, "b"),
}


class TestWhatIsRefused:
    @pytest.fixture
    def like(self, tmp_path: Path) -> Path:
        torch.save({"model": {"a": torch.ones(2), "b": torch.ones(3)}}, tmp_path / "like.pt")
        return tmp_path / "like.pt"

    @pytest.mark.parametrize("what", WRONG)
    def test_other_weights(self, what: str, like: Path, tmp_path: Path) -> None:
        weights, name = WRONG[what]
        with pytest.raises(
            ValueError, match=rf"the weights are not those of .*like.pt(.|\n)*{name}"
        ):
            checkpoints.write_like(tmp_path / "new.pt", like, weights)
        assert [path.name for path in tmp_path.iterdir()] == ["like.pt"]

    def test_tied_weights_that_differ(self, tmp_path: Path) -> None:
        one = torch.ones(2)
        torch.save({"a": one, "b": one}, tmp_path / "like.pt")
        with pytest.raises(
            ValueError, match="a and b are one tensor there, and the new ones differ"
        ):
            checkpoints.write_like(
                tmp_path / "new.pt", tmp_path / "like.pt", {"a": one, "b": torch.zeros(2)}
            )
        assert [path.name for path in tmp_path.iterdir()] == ["like.pt"]
        checkpoints.write_like(tmp_path / "new.pt", tmp_path / "like.pt", {"a": torch.zeros(2)})
        assert torch.load(tmp_path / "new.pt")["b"].tolist() == [0, 0]

    def test_a_form_that_cannot_be_filled(self, tmp_path: Path) -> None:
        averager = Averager(nn.Linear(2, 1), "uniform()")
        averager.update()
        polyak.save(tmp_path / "ours.safetensors", averager)
        weights = dict(checkpoints.read(tmp_path / "ours.safetensors").averages["average"])
        with pytest.raises(ValueError, match="so it cannot be replaced there; wanted a file"):
            checkpoints.write_like(tmp_path / "new", tmp_path / "ours.safetensors", weights)
        assert not (tmp_path / "new").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of Hugging Face's with two files of weights, and what its Trainer leaves there."""
    like = tmp_path / "checkpoint-1"
    like.mkdir()
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in files.items():
        save_file({name: torch.ones(3, dtype=torch.bfloat16)}, like / file, {"format": "pt"})
    (like / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "vocab.txt",
        "spm.model",
    ):
        (like / name).write_text(json.dumps({"of": name}))
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
        (like / name).write_text("the training's")
    return like


def test_a_folder_of_hugging_face(folder: Path, tmp_path: Path) -> None:
    one = torch.ones(3, dtype=torch.bfloat16)
    out = tmp_path / "new"
    left = checkpoints.write_like(out, folder, {"a": 2 * one, "b": 3 * one})
    assert sorted(left) == [
        "optimizer.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
    ]
    assert load_file(out / "model-00001-of-00002.safetensors")["a"].tolist() == [2, 2, 2]
    assert load_file(out / "model-00002-of-00002.safetensors")["b"].tolist() == [3, 3, 3]
    kept = {path.name for path in folder.iterdir()} - set(left)
    assert {path.name for path in out.iterdir()} == kept
    for name in kept:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_a_tied_head_of_the_inputs_is_written_once(folder: Path, tmp_path: Path) -> None:
    """A file of torch.save may have both names; the folder has one."""
    for step in (1.0, 3.0):
        tied = torch.full((3,), step, dtype=torch.bfloat16)
        torch.save({"a": tied, "head": tied, "b": tied.clone()}, tmp_path / f"step-{step:g}.pt")
    made = offline.average([tmp_path / "step-1.pt", tmp_path / "step-3.pt"])
    checkpoints.write_like(tmp_path / "new", folder, made)
    written = checkpoints.read(tmp_path / "new").weights()
    assert sorted(written) == ["a", "b"] and written["a"].tolist() == [2, 2, 2]
    assert offline.verify(made, written) == 2
    files = [tmp_path / "step-1.pt", tmp_path / "step-3.pt"]
    done = command("average", *files, "--like", folder, "--out", tmp_path / "by", "--verify")
    assert done.exit_code == 0, done.output
    assert "not copied from" in done.stderr and "optimizer.pt" in done.stderr


BESIDE = {
    "2_Dense/model.safetensors": True,  # modules.json lists its folder
    "context/model.yaml": True, "context/nemo_tokenizer/vocab.txt": True,
    "runs/Nov30/events.out.tfevents.1": False, "checkpoint-1/optimizer.pt": False, "other/model.bin": False,
}  # fmt: skip
"""A file in a folder of the model's -> whether its folder is copied: not one with other weights or states."""


def test_folders_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    """As NeMo's `context` and the modules of sentence-transformers."""
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    for name in BESIDE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    left = checkpoints.write_like(tmp_path / "new", folder, checkpoints.read(folder).weights())
    for name, copied in BESIDE.items():
        assert (tmp_path / "new" / name).exists() is copied
        assert (name.split("/")[0] in left) is not copied


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_in_a_tar_archive(tmp_path: Path, old: bool) -> None:
    for value in (1.0, 3.0):
        weights = saved_bytes(value, old=old)
        tarred(
            tmp_path / f"{value:g}.nemo", {"config.yaml": b"a: 1", "model_weights.ckpt": weights}
        )
    files, out = [tmp_path / "1.nemo", tmp_path / "3.nemo"], tmp_path / "new.nemo"
    made = offline.average(files)
    checkpoints.write_like(out, files[1], made)
    checkpoints.read(out).verify()
    assert offline.verify(made, checkpoints.read(out).weights()) == len(made)
    with tarfile.open(out) as archive:
        assert archive.getnames() == ["config.yaml", "model_weights.ckpt"]


CUTS = {
    "by rows": (2, 1, 1),
    "by columns": (1, 1, 3),
    "in the middle": (1, 4, 1),
    "in all": (3, 2, 2),
    "not": (1, 1, 1),
}
MEASURED = """
import sys
from pathlib import Path
from pathlib import Path
from polyak import checkpoints, offline

def peak():
    status = Path("/proc/self/status").read_text()  # ru_maxrss counts the parent's memory too
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

place = Path(sys.argv[1])
made = offline.average([place / "like", place / "other"])
before = peak()
checkpoints.write_like(place / "new", place / "like", made)
print(peak() - before)
"""


def chunks(whole: Tensor, cut: tuple[int, ...]) -> list[tuple[list[int], Tensor]]:
    """A tensor in so many chunks along each dimension, with where each begins."""
    found = [([0] * whole.dim(), whole)]
    for along, count in enumerate(cut):
        found = [
            ([*at[:along], at[along] + start, *at[along + 1 :]], part)
            for at, held in found
            for start, part in zip(
                range(0, held.shape[along], -(-held.shape[along] // count)),
                held.split(-(-held.shape[along] // count), along),
                strict=True,
            )
        ]
    return [(at, part.clone()) for at, part in found]  # each has a storage of its own


def saved_plain(path: Path, held: dict[str, Tensor]) -> Path:
    torch.save(held, path)
    return path


@pytest.mark.parametrize(
    ("like", "out"),
    [("it.pt", "out.safetensors"), ("it.safetensors", "out.pt"), ("folder", "out.safetensors")],
)
def test_a_name_says_what_the_file_is(tmp_path: Path, like: str, out: str) -> None:
    weights = {"w": torch.ones(2)}
    (tmp_path / "folder").mkdir()
    torch.save(weights, tmp_path / "it.pt")
    save_file(weights, tmp_path / "it.safetensors")
    save_file(weights, tmp_path / "folder" / "model.safetensors")
    with pytest.raises(ValueError, match=r"wanted a name that .*: it has the form of"):
        checkpoints.write_like(tmp_path / out, tmp_path / like, weights)
    assert not (tmp_path / out).exists()
    for name in ("it.pt", "it.safetensors", "folder"):
        named = tmp_path / f"new-{name}"
        checkpoints.write_like(named, tmp_path / name, weights)
        checkpoints.write_like(
            tmp_path / f"new-{Path(name).stem}-{Path(name).suffix[1:]}", tmp_path / name, weights
        )


class TestFoldersOfTorchDistributed:
    """Chunks of ranks, an optimizer and objects stay as they are, but for the weights' own bytes."""

    def loaded(self, folder: Path, like: dict[str, Any]) -> dict[str, Any]:
        """What torch itself loads, in the form of `like`."""
        found: dict[str, Any] = {
            k: torch.empty_like(v) if torch.is_tensor(v) else v for k, v in like.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            load(found, checkpoint_id=folder, **ALONE)
        return found

    def saved(self, folder: Path, value: float) -> Path:
        """As Megatron's `torch_dist` lays it out."""
        w = torch.arange(6.0).reshape(2, 3) + value
        held: dict[str, Any] = {"decoder.w": w, "half": torch.full((5,), value, dtype=torch.bfloat16),
                                "by_columns": (w * 2).t(), "step": int(value),
                                "optimizer.state.fp32_param.decoder.w": w + 100}  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            save(held, checkpoint_id=folder, **ALONE)
        torch.save({"iteration": int(value)}, folder / "common.pt")
        return folder

    def test_only_the_weights_change(self, tmp_path: Path) -> None:
        files = [self.saved(tmp_path / f"iter_000000{v:g}", v) for v in (1.0, 2.0, 6.0)]
        made = offline.average(files, [0.5, 0.25, 0.25])
        assert checkpoints.write_like(tmp_path / "new", files[1], made) == []
        names = {path.name for path in files[1].iterdir()}
        assert {path.name for path in (tmp_path / "new").iterdir()} == names
        for name in names - {"__0_0.distcp"}:
            assert (tmp_path / "new" / name).read_bytes() == (files[1] / name).read_bytes()
        old, w = dict(DistributedTensors(files[1])), torch.arange(6.0).reshape(2, 3)
        found = self.loaded(tmp_path / "new", {**old, "step": 0})
        assert torch.equal(found["decoder.w"], w + 2.5) and torch.equal(
            found["half"], torch.full_like(found["half"], 2.5)
        )
        assert torch.equal(found["by_columns"], (2 * (w + 2.5)).t()) and found["step"] == 2
        assert torch.equal(found["optimizer.state.fp32_param.decoder.w"], w + 102)
        checkpoints.read(tmp_path / "new").verify()

    @pytest.mark.parametrize("parts", TILINGS.values(), ids=TILINGS)
    def test_tensors_in_chunks(self, tmp_path: Path, parts: list[tuple[list[int], Tensor]]) -> None:
        split(tmp_path / "like", parts, [4, 6])
        split(tmp_path / "other", [(o, 3 * part.clone() + 1) for o, part in parts], [4, 6])
        made = offline.average([tmp_path / "like", tmp_path / "other"])
        checkpoints.write_like(tmp_path / "new", tmp_path / "like", made)
        assert torch.equal(self.loaded(tmp_path / "new", {"w": WHOLE})["w"], 2 * WHOLE + 0.5)
        checkpoints.read(tmp_path / "new").verify()

    @pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
    def test_tensors_of_many_pieces(self, tmp_path: Path, cut: tuple[int, int, int]) -> None:
        """A piece ends anywhere, also within a row, along whichever dimension the chunks are cut."""
        whole = torch.arange(600_000.0).reshape(3, 40, 5000)
        split(tmp_path / "like", chunks(whole, cut), list(whole.shape))
        weights = {"w": whole.flip(0)}
        made = offline.average([checkpoints.read(saved_plain(tmp_path / "it.pt", weights))] * 2)
        checkpoints.write_like(tmp_path / "new", tmp_path / "like", made)
        assert torch.equal(self.loaded(tmp_path / "new", {"w": whole})["w"], weights["w"])
        checkpoints.read(tmp_path / "new").verify()

    @pytest.mark.slow
    def test_a_large_tensor_is_never_held_whole(self, tmp_path: Path) -> None:
        """Its 100 MB in chunks of columns are written in pieces of 1 MiB."""
        whole = torch.ones(2500, 10_000)
        for name in ("like", "other"):
            split(tmp_path / name, chunks(whole, (1, 2)), [2500, 10_000])
        script: list[Any] = [sys.executable, "-c", MEASURED, tmp_path]
        done = subprocess.run(script, capture_output=True, text=True, check=True)
        assert float(done.stdout) < 50

    def test_a_folder_with_the_settings_beside(self, tmp_path: Path) -> None:
        """As NeMo 2: `weights` and `context`."""
        like, w = self.saved(tmp_path / "step=9" / "weights", 1.0), torch.arange(6.0).reshape(2, 3)
        (like.parent / "context").mkdir()
        (like.parent / "context" / "io.json").write_text("{}")
        made = offline.average([like.parent, self.saved(tmp_path / "other", 3.0)])
        assert checkpoints.write_like(tmp_path / "new", like.parent, made) == []
        assert (tmp_path / "new" / "context" / "io.json").read_text() == "{}"
        found = self.loaded(tmp_path / "new" / "weights", dict(DistributedTensors(like)))
        assert torch.equal(found["decoder.w"], w + 2)

    def test_by_the_command(self, tmp_path: Path) -> None:
        """What is kept of the training is said: an optimizer's own copy of the weights is the old one."""
        files = [self.saved(tmp_path / f"iter_000000{v:g}", v) for v in (1.0, 2.0, 6.0)]
        options = ("--wsm", "sqrt", "--like", files[-1], "--out", tmp_path / "new", "--verify")
        done = command("average", tmp_path, "--last", "3", *options)
        assert done.exit_code == 0, done.output
        assert "verified: 3 tensors are the direct sums" in done.stdout
        assert f"kept as in {files[-1]}: optimizer (1 tensor)" in done.stderr
        assert checkpoints.read(tmp_path / "new").left == {"optimizer": 1}


def test_places_of_archives_beyond_4_gib() -> None:
    """ZIP64: the extra field has the sizes that do not fit, then the place."""
    aligned = b"FB\2\0ZZ"
    sizes = (5 << 32).to_bytes(8, "little")
    place = (6 << 32).to_bytes(8, "little")
    assert _far_place(aligned + b"\1\0\x18\0" + sizes + sizes + place) == 6 << 32
    assert _far_place(b"\1\0\x08\0" + place) == 6 << 32
    with pytest.raises(ValueError, match="points at no record"):
        _far_place(aligned)
