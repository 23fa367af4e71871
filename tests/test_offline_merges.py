"""Merges of pre-training runs: WSM, QAM and minus-sqrt over sharded and distributed checkpoints."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from alone import ALONE
from cli_runs import run as command
from launching import launched
from polyak import offline, theory

STEPS = (900, 1000, 1100, 1200)
HANG = 100


def weights(step: int, rows: int = 6) -> dict[str, Tensor]:
    """Names of Megatron: layers are stacked along the first dimension."""
    generator = torch.Generator().manual_seed(step)
    shapes = {
        "embedding.word_embeddings.weight": (rows, 5),
        "decoder.layers.mlp.linear_fc1.weight": (2, 4, rows),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def saved(held: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        save(held, checkpoint_id=folder, **ALONE)


def hugging_face(run: Path, step: int, held: dict[str, Tensor]) -> None:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    files = {
        name: f"model-{i:05d}-of-{len(held):05d}.safetensors" for i, name in enumerate(held, 1)
    }
    for name, file in files.items():
        save_file({name: held[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    torch.save({}, folder / "optimizer.pt")


def distributed(run: Path, step: int, held: dict[str, Tensor]) -> None:
    saved(dict(held), run / f"step-{step}")


def megatron(run: Path, step: int, held: dict[str, Tensor]) -> None:
    """As its `torch_dist` format: optimizer states by name, extra states as bytes, plain objects beside."""
    folder = run / f"iter_{step:07d}"
    moments = {
        f"optimizer.state.{state}.{name}": tensor.square()
        for state in ("exp_avg", "exp_avg_sq", "fp32_param")
        for name, tensor in held.items()
    }
    extra = {
        f"decoder.layers.mlp.linear_fc1._extra_state/shard_{i}_2": io.BytesIO(b"") for i in (0, 1)
    }
    saved({**held, **moments, **extra, "rng_state/shard_0.0_1.1": io.BytesIO(b"rng")}, folder)
    torch.save({"iteration": step, "args": {"seed": 1}}, folder / "common.pt")
    (run / "latest_checkpointed_iteration.txt").write_text(str(step))


FORMS = {"hugging face": hugging_face, "distributed": distributed, "megatron": megatron}


def minus_sqrt(checkpoints: int) -> Any:
    """What a learning rate that falls as 1 - sqrt(t) over the window gives each of its checkpoints."""
    left = 1 - np.sqrt(np.arange(1, checkpoints + 1) / checkpoints)
    return -np.diff(np.concatenate([[1.0], left]))


MERGES: dict[str, tuple[tuple[str, ...], Callable[[int], Any]]] = {
    "wsm": (("--wsm", "sqrt"), lambda n: theory.wsm(theory.learning_rate_decay("sqrt", n))),
    "wsm linear": (("--wsm", "linear"), lambda n: np.full(n, 1 / n)),
    "qam": (("--qam", "cosine"), lambda n: theory.qam(theory.learning_rate_decay("cosine", n))),
    "minus-sqrt": (("--wsm", "sqrt"), minus_sqrt),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("merge", MERGES)
def test_it_is_the_plain_sum(merge: str, form: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in STEPS:
        FORMS[form](run, step, weights(step))
    options, coefficients = MERGES[merge]
    tokens = ("--window-tokens", "1.2B", "--tokens-per-step", "4M")  # 300 steps
    out = tmp_path / "merged.safetensors"
    done = command("average", run, *tokens, *options, "--out", out, "--verify")
    assert done.exit_code == 0, done.output
    got, shares = load_file(out), coefficients(3)
    assert set(got) == set(weights(0))
    for name, tensor in got.items():
        terms = [
            share * weights(step)[name].double()
            for share, step in zip(shares, STEPS[1:], strict=True)
        ]
        torch.testing.assert_close(tensor.double(), torch.stack(terms).sum(0), rtol=1e-6, atol=1e-6)


def test_optimizer_states_of_megatron_are_no_weights(tmp_path: Path) -> None:
    for step in STEPS:
        megatron(tmp_path, step, weights(step))
    done = command("average", tmp_path, "--last", 2, "--dry-run")
    assert "optimizer" in done.stderr and "2 tensors of 2 files" in done.stdout


MEASURED = """
import sys
from pathlib import Path
from polyak import offline, theory

def peak():
    status = Path("/proc/self/status").read_text()  # ru_maxrss counts the parent's memory too
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

files = offline.choose(sys.argv[1]).files
before = peak()
made = offline.average(files, theory.qam(theory.learning_rate_decay("sqrt", len(files))))
made.write(sys.argv[2], shard_bytes=20_000_000)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_many_checkpoints_need_little_memory(form: str, tmp_path: Path) -> None:
    """12 checkpoints of 64 MB (with states of optimizers 256) are merged in less than 100 MB."""
    held = {f"layer{i}.weight": torch.randn(2000, 1000) for i in range(8)}
    FORMS[form](tmp_path / "run", 1000, held)
    (first,) = (path for path in (tmp_path / "run").iterdir() if path.is_dir())
    for step in range(1100, 2200, 100):
        folder = tmp_path / "run" / first.name.replace("1000", str(step))
        folder.mkdir()
        for file in first.iterdir():
            os.link(file, folder / file.name)
    script: list[Any] = [sys.executable, "-c", MEASURED, tmp_path / "run", tmp_path / "out"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100
    written = {
        k: v
        for file in (tmp_path / "out").glob("*.safetensors")
        for k, v in load_file(file).items()
    }
    assert all(torch.equal(written[name], tensor) for name, tensor in held.items())


@pytest.mark.slow
def test_processes_of_torchrun_share_a_merge(tmp_path: Path) -> None:
    for step in STEPS:
        megatron(tmp_path / "run", step, weights(step, 500))
    options = ["average", str(tmp_path / "run"), "--last", "3", "--qam", "sqrt", "--out"]
    alone, shared = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert command(*options, alone).exit_code == 0
    arguments = [*options, str(shared), "--torchrun"]
    with launched(Path("-m"), "polyak", *arguments, log=tmp_path / "log", ranks=2) as launch:
        said = launch.wait(HANG)
    assert alone.read_bytes() == shared.read_bytes()
    assert said.count(str(shared)) == 1


def test_shares_of_the_mean_are_not_those_of_the_shell(tmp_path: Path) -> None:
    """step-1000 comes before step-900 in a shell."""
    for step in STEPS:
        distributed(tmp_path, step, weights(step))
    files = offline.choose(sorted(tmp_path.iterdir())).files
    assert [file.at for file in files] == list(STEPS)
