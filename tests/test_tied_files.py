"""Tied weights in files: one tensor under two names is averaged and written once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

import polyak
from cli_runs import run
from polyak import checkpoints, offline


class Tied(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(4, 2), nn.LayerNorm(2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            nn.init.constant_(parameter, value)


def own(model: nn.Module, path: Path) -> Path:
    averager = polyak.Averager(model, "uniform()")
    averager.update()
    polyak.save(path.with_suffix(".safetensors"), averager)
    return path.with_suffix(".safetensors")


def saved(held: object, path: Path, *, zipped: bool = True) -> Path:
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    return path


def sharded(model: nn.Module, path: Path) -> Path:
    path.mkdir()
    names = [*model.state_dict()]
    files = {name: f"part-{'norm' in name:d}.bin" for name in names}
    for file in {*files.values()}:
        torch.save({n: t for n, t in model.state_dict().items() if files[n] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return path


FORMS: dict[str, Callable[[nn.Module, Path], Path]] = {
    "of torch.save": lambda model, path: saved(model.state_dict(), path),
    "before 1.6": lambda model, path: saved(model.state_dict(), path, zipped=False),
    "nested": lambda model, path: saved({"model": model.state_dict(), "step": 1}, path),
    "Lightning's": lambda model, path: saved({
        "pytorch-lightning_version": "2.6", "global_step": 1,
        "state_dict": {f"module.{n}": t for n, t in model.state_dict().items()},
    }, path),
    "polyak's": own,
    "in two files": sharded,
}  # fmt: skip


def two(form: str, folder: Path, second: nn.Module | None = None) -> list[Path]:
    models = [Tied(1.0), Tied(3.0) if second is None else second]
    return [FORMS[form](model, folder / f"{i}.pt") for i, model in enumerate(models)]


@pytest.mark.parametrize("shard_bytes", [None, 20])
@pytest.mark.parametrize("form", FORMS)
def test_an_average_is_written_once(form: str, shard_bytes: int | None, tmp_path: Path) -> None:
    made = offline.average(two(form, tmp_path))
    assert made["head.weight"].tolist() == made["embedding.weight"].tolist()
    out = tmp_path / ("out" if shard_bytes else "out.safetensors")
    made.write(out, shard_bytes=shard_bytes)
    found = checkpoints.read(out)
    assert sorted(found.weights()) == ["embedding.weight", "norm.bias", "norm.weight"]
    assert offline.verify(made, found.weights()) == 3
    averager = polyak.Averager(Tied(), "uniform()")
    polyak.load(checkpoints.read(out, role="average"), averager, count=2)
    assert averager.average()["head.weight"].eq(2).all()
    if not shard_bytes:
        model = Tied()
        load_model(model, out)
        assert model.head.weight.eq(2).all() and model.norm.bias.eq(2).all()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_beside_a_file_that_has_it_once(form: str, turned: bool, tmp_path: Path) -> None:
    """Files of save_pretrained, save_model and ours have one name, those of torch.save both."""
    first, second = two(form, tmp_path)
    once = tmp_path / "once.safetensors"
    offline.average([second]).write(once)
    files = [first, once][:: -1 if turned else 1]
    made = offline.average(files)
    assert sorted(made) == ["embedding.weight", "norm.bias", "norm.weight"]
    assert made["embedding.weight"].eq(2).all()
    weights = [
        checkpoints.read(file).weights("average" if form == "polyak's" and file != once else None)
        for file in (second, once)
    ]
    assert offline.compare(*weights[:: -1 if turned else 1]).equal


def test_a_head_of_its_own_is_not_left_out(tmp_path: Path) -> None:
    save_file({"embedding.weight": torch.ones(4, 2)}, tmp_path / "1.safetensors")
    save_file(
        {"embedding.weight": torch.ones(4, 2), "head.weight": torch.ones(4, 2)},
        tmp_path / "2.safetensors",
    )
    with pytest.raises(ValueError, match=r"extra: head\.weight"):
        offline.average([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


COMMANDS = {
    "average": ("{0}", "{1}", "--out", "{out}"),
    "export": ("{0}", "{out}", "--average", "live"),
    "synthesize": ("--checkpoint", "1={0}", "--checkpoint", "2={1}", "--rule", "uniform()", "--max-error", "1",
                   "--out", "{out}"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_say_which_name_is_not_written(name: str, tmp_path: Path) -> None:
    files, out = two("of torch.save", tmp_path), tmp_path / "out.safetensors"
    done = run(name, *(each.format(*files, out=out) for each in COMMANDS[name]))
    assert done.exit_code == 0 and "head.weight" not in load_file(out), done.output
    assert "note: tied tensors are written once, without head.weight: load the file" in done.stderr


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a copy": lambda tensor: tensor.clone(),
    "another part of its storage": lambda tensor: torch.stack((tensor, tensor))[1],
    "the same memory, another stride": lambda tensor: tensor.view(2, 4).T,
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_another_tensor_in_one_file_is_written_too(other: str, tmp_path: Path) -> None:
    files = two("of torch.save", tmp_path)
    state = copy.deepcopy(Tied(3.0).state_dict())
    state["head.weight"] = OTHERS[other](state["embedding.weight"])
    torch.save(state, files[1])
    offline.average(files).write(tmp_path / "out.safetensors")
    assert "head.weight" in load_file(tmp_path / "out.safetensors")


class MadeWhenAsked(Mapping[str, Tensor]):
    """Weights that are made at each call, as by a mapping that reads a file: no address stays."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


WEIGHT = torch.ones(5000)
MORE: dict[str, Mapping[str, Tensor]] = {
    "made when asked": MadeWhenAsked({"w": WEIGHT, "v": WEIGHT + 1}),
    "the same memory, another dtype": {"w": WEIGHT, "v": WEIGHT.view(torch.int32)},
    "no elements": {"w": torch.ones(0), "v": torch.ones(0)},
}


@pytest.mark.parametrize("more", MORE)
def test_a_tensor_of_its_own_in_memory_is_not_left_out(more: str) -> None:
    found = offline.compare(MORE[more], {"w": MORE[more]["w"]})
    assert found.only_a == ("v",) and not found.equal
    tied = offline.compare({"w": WEIGHT, "v": WEIGHT.view(-1)}, {"w": WEIGHT})
    assert tied.equal


@pytest.mark.slow
def test_transformers_loads_what_was_written_once(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    models = [transformers.GPT2LMHeadModel(config) for _ in range(2)]
    files = [saved(model.state_dict(), tmp_path / f"{i}.pt") for i, model in enumerate(models)]
    out = tmp_path / "mean"
    models[0].save_pretrained(out)
    own_names = set(load_file(out / "model.safetensors"))
    made = offline.average(files)
    made.write(out / "model.safetensors", overwrite=True)
    assert set(load_file(out / "model.safetensors")) == own_names
    loaded, told = transformers.GPT2LMHeadModel.from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, made[name])
