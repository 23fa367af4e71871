"""Averages of an adapter of PEFT: in the Trainer, in a loop of Accelerate, and as an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
)
from safetensors.torch import load_file
from transformers import Trainer

import tiny_trainers as tiny
from models import assert_same
from polyak import Averager, checkpoints
from polyak.integrations.accelerate import register
from polyak.integrations.transformers import AveragerCallback
from tiny_trainers import Steps, ema

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

DECAY = 0.75
EMA = {"ema": f"exponential({DECAY})"}
TRAINED = "modules_to_save", "lora_A", "lora_B"


def trained(folder: Path, **options: Any) -> tuple[Trainer, AveragerCallback]:
    one = tiny.trainer(folder, tiny.lora(), **options)
    callback = AveragerCallback(EMA).attach(one)
    one.train()
    return one, callback


def test_only_what_trains_is_averaged_held_and_saved(tmp_path: Path) -> None:
    _, callback = trained(tmp_path, max_steps=2)
    averager = callback.averager
    assert averager is not None
    held = {row.name for row in averager.summary().rows if row.slot_dtype is not None}
    assert held and all(any(part in name for part in TRAINED) for name in held)
    assert sum(
        any(part in n for part in TRAINED) for n, _ in tiny.lora().named_parameters()
    ) == len(held)
    state = tmp_path / "checkpoint-2" / "averages" / "ema.safetensors"
    assert {name.rpartition("/")[2] for name in load_file(state)} == held


LAYERS: Any = {"target_modules": ["query", "value"]}
TOKENS: Any = {"num_virtual_tokens": tiny.VIRTUAL}
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(r=2, **LAYERS),
    "DoRA": lambda: LoraConfig(r=2, use_dora=True, **LAYERS),
    "LoRA of an embedding's rows": lambda: LoraConfig(r=2, trainable_token_indices=[1], **LAYERS),
    "LoRA and every bias": lambda: LoraConfig(r=2, bias="all", **LAYERS),
    "LoRA over other base weights": lambda: LoraConfig(r=2, init_lora_weights="pissa", **LAYERS),
    "IA3": lambda: IA3Config(feedforward_modules=[], **LAYERS),
    "VeRA": lambda: VeraConfig(r=2, **LAYERS),
    "prompt tuning": lambda: PromptTuningConfig(**TOKENS),
    "prefix tuning": lambda: PrefixTuningConfig(**TOKENS),
    "p-tuning": lambda: PromptEncoderConfig(encoder_hidden_size=8, **TOKENS),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(each, marks=[pytest.mark.slow] * (each != "LoRA")) for each in ADAPTERS]
)
def test_the_average_is_an_adapter_that_loads(kind: str, tmp_path: Path) -> None:
    steps = Steps()
    one = tiny.trainer(tmp_path, tiny.adapted(ADAPTERS[kind]()), callbacks=[steps])
    callback = AveragerCallback(EMA).attach(one)
    one.train()
    wanted = ema(steps.taken, DECAY)
    moved = [n for n, tensor in wanted.items() if not torch.equal(tensor, steps.taken[-1][n])]
    assert callback.averager is not None and len(moved) > 2
    for name in moved:
        torch.testing.assert_close(callback.averager.average("ema")[name], wanted[name])
    folder = tmp_path / f"checkpoint-{tiny.STEPS}" / "averages" / "ema"
    loaded = PeftModel.from_pretrained(tiny.bert(), str(folder))
    judged = tiny.trainer(tmp_path / "judged", loaded).evaluate()
    assert judged["eval_loss"] == pytest.approx(one.evaluate()["eval_ema_loss"], rel=1e-6)
    card = (folder / "README.md").read_text()
    assert card.startswith("---") and card.count("# What these weights average") == 1


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit_with_its_adapter_alone(tmp_path: Path) -> None:
    _, whole = trained(tmp_path / "whole", max_steps=2 * tiny.STEPS)
    one = tiny.trainer(tmp_path / "parts", tiny.lora(), max_steps=2 * tiny.STEPS)
    callback = AveragerCallback(EMA).attach(one)
    one.train(str(tmp_path / "whole" / f"checkpoint-{tiny.STEPS}"))
    assert callback.averager is not None and whole.averager is not None
    assert_same(callback.averager.average("ema"), whole.averager.average("ema"))
    assert list(cast(PeftModel, one.model).peft_config) == ["default"]


@pytest.mark.slow
def test_best_by_the_average_loads_the_average_of_the_adapter(tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_ema_loss"}
    one, _ = trained(tmp_path, learning_rate=0.3, **options)
    losses = [e["eval_ema_loss"] for e in one.state.log_history if "eval_ema_loss" in e]
    assert min(losses) != losses[-1]
    found = one.evaluate()
    assert found["eval_loss"] == found["eval_ema_loss"] == min(losses)


@pytest.mark.slow
def test_accelerate_carries_the_average_of_an_adapter(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True), tiny.lora()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    averager, steps = Averager(model, EMA), Steps()
    averager.attach(optimizer)
    register(accelerator, averager)
    for first in range(3):
        batch = [tiny.Sentences()[i] for i in range(first, first + 4)]
        inputs = {name: torch.stack([example[name] for example in batch]) for name in batch[0]}
        accelerator.backward(model(**inputs).loss)
        optimizer.step()
        optimizer.zero_grad()
        steps.on_step_end(model=model)
    accelerator.save_state(str(tmp_path))
    state = tmp_path / "averages" / "ema.safetensors"
    assert all(any(part in name for part in TRAINED) for name in load_file(state))
    wanted = ema(steps.taken, DECAY)
    for name, tensor in checkpoints.read(state).average("ema").items():
        torch.testing.assert_close(tensor, wanted[name])
    with averager.applied("ema"):
        model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny.bert(), str(tmp_path / "adapter")).state_dict()
    average = averager.average("ema")
    assert_same({name: loaded[name] for name in average}, average)


def merged(one: Trainer) -> None:
    cast(Any, one.model).merge_adapter()
    one.evaluate()


def merged_and_saved(one: Trainer) -> None:
    cast(Any, one.model).merge_adapter()
    one.save_model(str(Path(str(one.args.output_dir)) / "final"))


def merged_into_another_model(one: Trainer) -> None:
    one.model = cast(Any, one.model).merge_and_unload()
    one.evaluate()


def another_adapter(one: Trainer) -> None:
    model = cast(Any, one.model)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    one.evaluate()


BAD: list[tuple[Callable[[Trainer], None], str]] = [
    (merged, r"unmerge_adapter\(\)"),
    (merged_and_saved, r"unmerge_adapter\(\)"),
    (merged_into_another_model, "not the model that was trained"),
    (another_adapter, r"(?s)not the tensors.*lora_A\.second\.weight"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "words"), BAD, ids=[each[0].__name__ for each in BAD])
def test_what_averages_cannot_follow_is_an_error_with_its_cure(
    wrong: Callable[[Trainer], None], words: str, tmp_path: Path
) -> None:
    one, _ = trained(tmp_path, max_steps=2)
    with pytest.raises(RuntimeError, match=words):
        wrong(one)
