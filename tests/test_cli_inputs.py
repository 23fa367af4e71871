"""Every command takes every form in which a checkpoint lies on the disk: a new form is one entry."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cli_runs import run
from corrupting import save_folder
from polyak import checkpoints, offline
from quick import some_quick

LOSS = "def loss(weights):\n    return float((weights['enc.w'] - 2.5).abs().max())\n"


def state(value: float) -> dict[str, Tensor]:
    return {
        "enc.w": torch.full((3, 2), value),
        "enc.b": torch.full((2,), value),
        "n": torch.tensor(7),
    }


def put(path: Path, held: Any, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(held, path, **options)


def beside(folder: Path, *names: str) -> None:
    """What trainers leave beside the weights, without any of them."""
    for name in names:
        put(folder / name, {"state": {}, "step": 3})


def safe(path: Path, held: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(held), path, metadata={"format": "pt"})


def in_shards(folder: Path, held: dict[str, Tensor], form: str) -> None:
    files = {name: f"model-0000{i}-of-00003.{form}" for i, name in enumerate(held, 1)}
    for name, file in files.items():
        (safe if form == "safetensors" else put)(folder / file, {name: held[name]})
    (folder / f"model.{form}.index.json").write_text(json.dumps({"weight_map": files}))


def archive(path: Path, held: dict[str, Tensor]) -> None:
    saved = io.BytesIO()
    torch.save(held, saved)
    with tarfile.open(path, "w") as tar:
        entry = tarfile.TarInfo("./model_weights.ckpt")
        entry.size = saved.tell()
        tar.addfile(entry, io.BytesIO(saved.getvalue()))


def with_others(
    save: Callable[[Path, float], object], *others: str
) -> Callable[[Path, float], None]:
    def made(place: Path, value: float) -> None:
        save(place, value)
        beside(place, *others)

    return made


def hub_cache(place: Path, value: float) -> None:
    """As the cache of the Hugging Face hub: links to contents beside the snapshots."""
    root = place.with_name(f"cache-{place.name}")
    safe(root / "blobs" / "abc", state(value))
    snapshot = root / "snapshots" / "1a2b"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    place.symlink_to(snapshot)


def linked(place: Path, value: float) -> None:
    put(place.with_name(f"real-{place.name}") / "model.pt", state(value))
    place.symlink_to(place.with_name(f"real-{place.name}"))


FORMS: dict[str, tuple[str, Callable[[Path, float], object]]] = {
    # what its name ends in, and what makes it
    "torch": (".pt", lambda p, v: put(p, state(v))),
    "torch before 1.6": (".pth", lambda p, v: put(p, state(v), _use_new_zipfile_serialization=False)),
    "a training": (".ckpt", lambda p, v: put(p, {"state_dict": state(v), "global_step": 3})),
    "a tuple": (".pt", lambda p, v: put(p, (state(v), {"state": {}, "param_groups": []}, 3))),
    "safetensors": (".safetensors", lambda p, v: safe(p, state(v))),
    "nemo": (".nemo", lambda p, v: archive(p, state(v))),
    "Hugging Face": ("", with_others(lambda p, v: safe(p / "model.safetensors", state(v)), "optimizer.pt", "rng_state.pth")),
    "Hugging Face in shards": ("", lambda p, v: in_shards(p, state(v), "safetensors")),
    "Hugging Face in shards of torch": ("", lambda p, v: in_shards(p, state(v), "bin")),
    "Hugging Face of torch": ("", with_others(lambda p, v: put(p / "pytorch_model.bin", state(v)), "training_args.bin")),
    "one file of torch": ("", with_others(lambda p, v: put(p / "whatever.pt", state(v)), "optimizer.pt")),
    "fairseq2 0.4": ("", with_others(
        lambda p, v: put(p / "model.pt", {"model": state(v), "fs2": True}),
        "optimizer.pt", "trainer/state_0.pt", "data_reader/state_0.pt",
    )),
    "fairseq2": ("", with_others(
        lambda p, v: put(p / "model/pp_00/tp_00/sdp_00.pt", state(v)),
        "optimizer/pp_00/tp_00/sdp_00.pt", "trainer/rank_00.pt", "data_reader/dp_00.pt",
    )),
    "speechbrain": ("", with_others(lambda p, v: put(p / "model.ckpt", state(v)), "optimizer.ckpt", "brain.ckpt")),
    "DeepSpeed": ("", with_others(
        lambda p, v: put(p / "mp_rank_00_model_states.pt", {"module": state(v), "global_steps": 3}),
        "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    )),
    "Megatron before torch_dist": ("", lambda p, v: put(p / "mp_rank_00/model_optim_rng.pt", {"model": state(v)})),
    "torch.distributed.checkpoint": ("", lambda p, v: save_folder({"model": state(v), "step": 3}, p)),
    "accelerate with FSDP": ("", with_others(
        lambda p, v: save_folder({"model": state(v)}, p / "pytorch_model_fsdp_0"),
        "optimizer_0/__0_0.pt", "random_states_0.pkl", "scheduler.bin",
    )),
    "NeMo 2": ("", with_others(lambda p, v: save_folder(state(v), p / "weights"), "context/io.json")),
    "OLMo-core": ("", with_others(lambda p, v: save_folder({"model": state(v)}, p / "model_and_optim"), "train/rank0.pt")),
    "the hub's cache": ("", hub_cache),
    "a link to a folder": ("", linked),
}  # fmt: skip


@pytest.fixture(params=FORMS)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of one form, in a folder of their own: all 1, and all 3."""
    end, make = FORMS[request.param]
    places = tmp_path / "run" / f"step-1{end}", tmp_path / "run" / f"step-2{end}"
    (tmp_path / "run").mkdir()
    for place, value in zip(places, (1.0, 3.0), strict=True):
        make(place, value)
    return places


def held(path: Path) -> dict[str, Tensor]:
    return dict(checkpoints.read(path).weights())


def assert_value(weights: Mapping[str, Tensor], value: float) -> None:
    wanted = state(value)
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(weights[name], tensor), name


def done(*arguments: object) -> str:
    found = run(*arguments)
    assert found.exit_code == 0, found.output
    return str(found.output)


QUICK = (
    "torch",
    "nemo",
    "Hugging Face in shards",
    "torch.distributed.checkpoint",
    "a link to a folder",
)


@pytest.mark.parametrize("both", some_quick(FORMS, QUICK), indirect=True)
def test_every_command_takes_it(both: tuple[Path, Path], tmp_path: Path) -> None:
    a, b, mean = *both, tmp_path / "mean.safetensors"
    assert "3 " in done("inspect", a, "--verify")
    done("average", a, b, "--out", mean)
    assert_value(load_file(mean), 2)
    done("export", b, tmp_path / "live.safetensors", "--average", "live")
    assert_value(load_file(tmp_path / "live.safetensors"), 3)
    rule = ("--as", "average", "--rule", "exponential(0.9)", "--count", "5")
    done("convert", a, tmp_path / "ours.safetensors", *rule)
    assert_value(checkpoints.read(tmp_path / "ours.safetensors").average(), 1)
    assert run("diff", a, b).exit_code == 1
    assert "equal: 3 tensors" in done("diff", a, a)
    listed = ("--checkpoint", f"1={a}", "--checkpoint", f"2={b}")
    options = ("--rule", "uniform()", "--max-error", "1", "--out", tmp_path / "made.safetensors")
    done("synthesize", *listed, *options)
    assert_value(load_file(tmp_path / "made.safetensors"), 2)


@pytest.mark.slow
def test_a_sweep_takes_it(
    both: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(LOSS)
    judged = ("--evaluate", "judge:loss", "--windows", "2", "--out", tmp_path / "sweep")
    assert "best" in done("sweep", both[0].parent, *judged)


def test_it_is_one_of_a_run(both: tuple[Path, Path], tmp_path: Path) -> None:
    chosen = offline.choose(both[0].parent, last=2)
    assert [file.at for file in chosen.files] == [1, 2]
    done("average", both[0].parent, "--last", 2, "--out", tmp_path / "mean.safetensors")
    assert_value(load_file(tmp_path / "mean.safetensors"), 2)


@pytest.mark.parametrize("both", some_quick(FORMS, QUICK), indirect=True)
def test_the_average_can_be_written_like_it(both: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = both
    out = tmp_path / f"out{a.suffix}"
    done("average", a, b, "--like", b, "--out", out, "--verify")
    assert_value(held(out), 2)
    assert_value(held(b), 3)  # of which the bytes were not changed
    shutil.rmtree(tmp_path / "run")  # and it needs nothing of it
    assert_value(held(out), 2)
