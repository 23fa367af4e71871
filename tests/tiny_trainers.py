"""Small real Trainers for the tests of the integration: a transformer made from a config, and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

STEPS, EVERY = 6, 2
VOCABULARY, LENGTH = 32, 6
VIRTUAL = 2
"""Tokens that an adapter of PEFT may add to a sentence."""


class Sentences(Dataset[dict[str, Tensor]]):
    """Random tokens; the label says whether the first is among the lower half."""

    def __init__(self, size: int = 64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._tokens = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._tokens[index]
        return {"input_ids": tokens, "labels": (tokens[0] < VOCABULARY // 2).long()}


def config() -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH + VIRTUAL,
    )


def bert() -> BertForSequenceClassification:
    """A small transformer with dropout, always with the same first weights."""
    torch.manual_seed(7)
    return BertForSequenceClassification(config())


def adapted(options: PeftConfig) -> PeftModel:
    """The small transformer with an adapter and a new classifier, which train alone."""
    model = bert()
    torch.manual_seed(1)
    options.task_type = TaskType.SEQ_CLS
    return cast(PeftModel, get_peft_model(model, options))


def lora() -> PeftModel:
    return adapted(LoraConfig(r=2, target_modules=["query", "value"]))


def trainer(
    folder: Path, model: nn.Module | None = None, kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    """A Trainer that evaluates and saves every `EVERY` of `STEPS` steps, quietly."""
    of_trainer = ("callbacks", "compute_metrics", "eval_dataset", "model_init", "optimizers")
    given = {name: options.pop(name) for name in of_trainer if name in options}
    told: dict[str, Any] = {
        "max_steps": STEPS,
        "eval_strategy": "steps",
        "eval_steps": EVERY,
        "save_steps": EVERY,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    given.setdefault("eval_dataset", Sentences(16, seed=1))
    if "model_init" not in given:
        given["model"] = bert() if model is None else model
    args = TrainingArguments(str(folder), **(told | options))
    return kind(args=args, train_dataset=Sentences(), **given)


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of what a model saves."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Steps(TrainerCallback):
    """The weights after each step, of the last training."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Tensor]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.taken.clear()

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:  # type: ignore[override]
        self.taken.append(weights(model))


def ema(trajectory: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The plain formula."""
    average = {name: tensor.clone() for name, tensor in trajectory[0].items()}
    for weights in trajectory[1:]:
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                average[name] += (1 - decay) * (tensor - average[name])
    return average
