"""Archives with weights in them, as NeMo writes: read where they lie, or the command that unpacks them is told."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import warnings
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save

from alone import ALONE
from cli_runs import run
from polyak import checkpoints, offline

FORMATS: dict[str, Literal[1, 2]] = {"pax": 2, "gnu": 1}


def nemo(path: Path, held: dict[str, bytes], mode: str = "w:", form: str = "pax") -> Path:
    with tarfile.open(path, mode, format=FORMATS[form]) as archive:  # type: ignore[call-overload]
        for name, content in {"./model_config.yaml": b"a: 1", **held}.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def saved(value: float) -> bytes:
    buffer = io.BytesIO()
    torch.save({"enc.weight": torch.full((3, 2), value)}, buffer)
    return buffer.getvalue()


def distributed(folder: Path, value: float) -> dict[str, bytes]:
    """The files of a sharded `.nemo` of Megatron: with what it writes beside them."""
    held = {
        "enc.weight": torch.full((3, 2), value),
        "enc._extra_state/shard_0_1": io.BytesIO(b""),
        "optimizer.state.exp_avg.enc.weight": torch.full((3, 2), 9.0),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        save(held, checkpoint_id=folder, **ALONE)
    torch.save({"iteration": 1}, folder / "common.pt")
    return {f"./model_weights/{path.name}": path.read_bytes() for path in folder.iterdir()}


def told_command(message: str) -> str:
    """What an error says to type."""
    found = re.search(r"\(((?:gunzip|mkdir) .*?)\)(?:,|$)", message)
    assert found is not None, message
    return found[1]


@pytest.mark.parametrize("name", ["a b.nemo", "c.tar.gz"])
def test_a_packed_archive_is_read_after_the_command_that_is_told(name: str, tmp_path: Path) -> None:
    path = nemo(tmp_path / name, {"./model_weights.ckpt": saved(3.0)}, "w:gz")
    with pytest.raises(ValueError, match=r"packed by .*: unpack it first") as caught:
        offline.average([path])
    subprocess.run(told_command(str(caught.value)), shell=True, check=True)
    (unpacked,) = set(tmp_path.iterdir()) - {path}
    assert offline.average([unpacked])["enc.weight"].unique().tolist() == [3.0]


@pytest.mark.parametrize("form", FORMATS)
def test_a_sharded_archive_is_read_where_it_lies(form: str, tmp_path: Path) -> None:
    files = [
        nemo(tmp_path / f"{value:g}.nemo", distributed(tmp_path / str(value), value), form=form)
        for value in (1.0, 3.0)
    ]
    done = run("average", *files, "--out", tmp_path / "mean.safetensors", "--verify")
    assert done.exit_code == 0, done.output
    assert "note: not used: optimizer" in done.stderr
    mean = load_file(tmp_path / "mean.safetensors")
    assert {name: t.unique().tolist() for name, t in mean.items()} == {"enc.weight": [2.0]}
    assert (
        run("inspect", files[0]).exit_code == 0 and run("diff", files[0], files[0]).exit_code == 0
    )
    assert checkpoints.read(files[0]).verify().unchecked == 0
    checkpoints.write_like(tmp_path / "new.nemo", files[1], mean)
    assert checkpoints.read(tmp_path / "new.nemo").weights()["enc.weight"].unique().item() == 2.0
    assert checkpoints.read(tmp_path / "new.nemo").verify().unchecked == 0
    with tarfile.open(tmp_path / "new.nemo") as new, tarfile.open(files[1]) as old:
        assert new.getnames() == old.getnames()


def test_a_damaged_or_missing_shard_in_an_archive_is_named(tmp_path: Path) -> None:
    held = distributed(tmp_path / "folder", 7.0)
    content = nemo(tmp_path / "whole.nemo", held).read_bytes()
    place = content.index(torch.full((6,), 7.0).numpy().tobytes())
    (tmp_path / "bad.nemo").write_bytes(content[:place] + b"\1" + content[place + 1 :])
    with pytest.raises(ValueError, match=r"bad\.nemo: enc\.weight: .* is damaged"):
        offline.average([tmp_path / "bad.nemo"])["enc.weight"]
    del held["./model_weights/__0_0.distcp"]
    with pytest.raises(FileNotFoundError, match=r"__0_0\.distcp is missing in the archive"):
        checkpoints.read(nemo(tmp_path / "less.nemo", held))


@pytest.mark.parametrize(
    "parts",
    [
        ("tp_rank_00_pp_rank_000/model_weights.ckpt", "tp_rank_01_pp_rank_000/model_weights.ckpt"),
        ("mp_rank_00/model_weights.ckpt", "mp_rank_01/model_weights.ckpt"),
        ("encoder.ckpt", "decoder.ckpt"),
    ],
)
def test_several_files_of_weights_are_unpacked_by_the_command_that_is_told(
    parts: tuple[str, str], tmp_path: Path
) -> None:
    path = nemo(tmp_path / "it.nemo", {f"./{part}": saved(1.0) for part in parts})
    with pytest.raises(ValueError, match="a tar archive with several files of weights") as caught:
        checkpoints.read(path)
    assert ("let NeMo merge the parts" in str(caught.value)) == ("rank" in parts[0])
    subprocess.run(told_command(str(caught.value)), shell=True, check=True)
    assert checkpoints.read(tmp_path / "it-unpacked" / parts[1]).live is not None


@pytest.mark.parametrize("form", FORMATS)
def test_members_of_more_than_8_gib_and_with_long_names(form: str, tmp_path: Path) -> None:
    """Their sizes and names do not fit the header, so they stand before it."""
    path, large, content = tmp_path / "it.nemo", 9 * 2**30, saved(5.0)
    tokenizer = tarfile.TarInfo("./tokenizer.bin")
    tokenizer.size = large
    weights = tarfile.TarInfo(f"./{'long/' * 60}Größe/model_weights.ckpt")
    weights.size = len(content)
    with path.open("wb") as file:
        file.write(tokenizer.tobuf(FORMATS[form]))
        file.seek(large, io.SEEK_CUR)  # a hole: nothing is written there
        file.write(weights.tobuf(FORMATS[form]) + content + bytes(-len(content) % 512 + 1024))
    assert offline.average([path])["enc.weight"].unique().tolist() == [5.0]
