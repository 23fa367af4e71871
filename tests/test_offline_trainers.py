"""Runs of the real trainers: one command averages chosen checkpoints, and the trainer loads the result."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cli_runs import run as command
from polyak import offline
from run_folders import wenet

pytestmark = pytest.mark.slow


def averaged(run: Path, *options: object) -> str:
    done = command("average", run, *options)
    assert done.exit_code == 0, done.output
    assert "the direct sums" in done.stdout
    return str(done.output)


class Module(LightningModule):
    """A small model in a module, whose names it has behind a prefix."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.model(batch[0]).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("valid/loss", self.model(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


@pytest.fixture(scope="module")
def of_lightning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five epochs of ten steps; every checkpoint is kept, and the metrics are in a table too."""
    folder = tmp_path_factory.mktemp("lightning")
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(40, 3)), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_epochs=5, default_root_dir=folder, accelerator="cpu", logger=CSVLogger(folder),
            callbacks=[ModelCheckpoint(monitor="valid/loss", save_top_k=-1, save_last=True)],
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(Module(), data, data)
    return folder


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of a model whose head is tied, with a checkpoint and an evaluation every two."""
    folder = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    )
    rows: Any = [{"input_ids": row, "labels": row} for row in torch.randint(0, 16, (24, 8))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=6, save_steps=2, eval_strategy="steps", eval_steps=2,
            logging_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, learning_rate=0.05,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8]
        )
        trainer.train()
    return folder


class TestLightning:
    def test_the_last_and_load_from_checkpoint(self, of_lightning: Path, tmp_path: Path) -> None:
        files = offline.choose(of_lightning, last=3).files
        assert [file.at for file in files] == [30, 40, 50]
        out = tmp_path / "averaged.ckpt"
        averaged(of_lightning, "--last", 3, "--like", files[-1].path, "--out", out, "--verify")
        states = [torch.load(file.path, weights_only=False)["state_dict"] for file in files]
        loaded = Module.load_from_checkpoint(out, map_location="cpu")
        for name, tensor in loaded.state_dict().items():
            values = torch.stack([state[name].double() for state in states])
            wanted = values.mean(0) if tensor.is_floating_point() else values[-1]
            torch.testing.assert_close(tensor.double(), wanted.double(), rtol=1e-6, atol=1e-7)
        whole = torch.load(out, weights_only=False)
        assert whole["global_step"] == 50 and "optimizer_states" in whole

    def test_the_best_by_what_the_callback_remembers(self, of_lightning: Path) -> None:
        """Also by the CSV, whose steps count from 0."""
        last = offline.choose(of_lightning, last=1).files[0]
        (state,) = (
            s
            for key, s in torch.load(last.path, weights_only=False)["callbacks"].items()
            if "ModelCheckpoint" in key
        )
        scores = {Path(path).name: float(score) for path, score in state["best_k_models"].items()}
        wanted = sorted(scores, key=lambda name: scores[name])[:2]
        choice = offline.choose(of_lightning, best=2, by="valid.loss")
        assert {file.path.name for file in choice.files} == set(wanted)
        for file in choice.files:
            assert file.quality == pytest.approx(scores[file.path.name], rel=1e-6)
        (table,) = of_lightning.rglob("metrics.csv")
        assert "valid/loss" in table.read_text()

    def test_stripped_for_the_plain_model(self, of_lightning: Path, tmp_path: Path) -> None:
        out = tmp_path / "model.safetensors"
        averaged(of_lightning, "--last", 2, "--prefix", "model.", "--out", out, "--verify")
        Module().model.load_state_dict(load_file(out))


class TestTransformers:
    def test_the_last_and_from_pretrained(self, of_transformers: Path, tmp_path: Path) -> None:
        files = offline.choose(of_transformers, last=2).files
        assert [file.path.name for file in files] == ["checkpoint-4", "checkpoint-6"]
        out = tmp_path / "averaged"
        said = averaged(
            of_transformers, "--last", 2, "--like", files[-1].path, "--out", out, "--verify"
        )
        assert "not copied from" in said and "optimizer.pt" in said
        read: Any = transformers.GPT2LMHeadModel.from_pretrained
        loaded, problems = read(out, output_loading_info=True)
        assert not any(problems.values()), problems
        states = [load_file(file.path / "model.safetensors") for file in files]
        for name, tensor in states[0].items():
            wanted = (tensor + states[1][name]) / 2
            torch.testing.assert_close(loaded.state_dict()[name], wanted, rtol=1e-6, atol=1e-7)
        assert (out / "generation_config.json").exists()
        assert loaded.lm_head.weight is loaded.transformer.wte.weight

    def test_the_best_by_the_trainers_state(self, of_transformers: Path) -> None:
        history = json.loads((of_transformers / "checkpoint-6" / "trainer_state.json").read_text())[
            "log_history"
        ]
        losses = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
        wanted = sorted(sorted(losses, key=lambda step: losses[step])[:2])
        choice = offline.choose(of_transformers, best=2, by="eval_loss")
        assert [file.at for file in choice.files] == wanted
        assert [file.quality for file in choice.files] == [losses[step] for step in wanted]


def test_a_speech_toolkits_folder(tmp_path: Path) -> None:
    """The model of a speech toolkit loads the result as it loads its own files: as a bare state dict."""
    wenet(tmp_path / "run")
    out = tmp_path / "run" / "avg_2.pt"
    files = offline.choose(tmp_path / "run", best=2, by="cv_loss").files
    averaged(tmp_path / "run", "--best", 2, "--by", "cv_loss", "--like", files[-1].path, "--out", out, "--verify")  # fmt: skip
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.zeros(3)))
    model.register_buffer("count", torch.tensor(0))
    model.load_state_dict(torch.load(out, weights_only=True))
    assert model.get_parameter("w").tolist() == [10.5] * 3
    assert out not in [file.path for file in offline.choose(tmp_path / "run").files]
