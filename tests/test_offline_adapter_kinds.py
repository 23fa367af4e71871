"""Kinds of adapters: averaged as weights exactly where the average adds the mean of what they add, by PEFT."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polyak import checkpoints, offline

LINEAR: dict[str, dict[str, Any]] = {
    "BEFT": {},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 40},
    "FROD": {"save_projection": True},
    "IA3": {"feedforward_modules": ["ff"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "MISS": {"r": 4},
    "MISS, bat": {"r": 4, "init_weights": "bat"},
    "SHIRA": {"r": 2, "random_seed": 1},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"target_modules": ["embed"], "token_indices": [1, 2]},
    "WAVEFT": {"n_frequency": 40},
}
NOT_LINEAR: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 100, "init_r": 4},
    "ADAMSS": {},
    "BOFT": {"boft_block_size": 4},
    "DEFT": {},
    "DELORA": {},
    "GLORA": {},
    "GRALORA": {},
    "HIRA": {},
    "HRA": {"r": 2},
    "HRA, orthogonal": {"r": 2, "apply_GS": True},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "LOKR, both": {"r": 2, "decompose_both": True},
    "LORA": {"r": 2},
    "LORA, of magnitudes": {"r": 2, "use_dora": True},
    "OFT": {"oft_block_size": 4},
    "OFT, Cayley": {"oft_block_size": 4, "use_cayley_neumann": False},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {"r": 8},
    "PVERA": {},
    "RANDLORA": {"r": 4},
    "ROAD": {},
    "ROAD, 4": {"variant": "road_4"},
    "UNILORA": {},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2},
    "VERA": {},
}
UNTRIED = {  # PEFT cannot merge these into a weight, or they want a language model
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA", "BONE",
}  # fmt: skip


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 64)
        self.norm = nn.LayerNorm(64)
        self.q = nn.Linear(64, 64)
        self.ff = nn.Linear(64, 64)


def adapter(place: Path, kind: str, settings: dict[str, Any], seed: int) -> Path:
    """A trained adapter as PEFT saves it: what it can train is moved at random."""
    torch.manual_seed(1)
    config = CONFIGS[peft.PeftType(kind.partition(",")[0])]
    model = peft.get_peft_model(Base(), config(**{"target_modules": ["q", "ff"], **settings}))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.3)
    model.save_pretrained(str(place))
    return place


def added(place: Path) -> Tensor:
    """What an adapter adds to all weights of its model, in one row."""
    torch.manual_seed(1)
    made = peft.PeftModel.from_pretrained(Base(), place).merge_and_unload().state_dict()
    return torch.cat([(made[n] - t).double().flatten() for n, t in Base().state_dict().items()])


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # each kind of PEFT has its own
@pytest.mark.parametrize(("kind", "settings"), LINEAR.items(), ids=LINEAR)
def test_a_linear_kind_adds_the_mean(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    both = [adapter(tmp_path / str(seed), kind, settings, seed) for seed in (5, 6)]
    checkpoints.write_like(tmp_path / "mean", both[0], offline.average(both))
    wanted = (added(both[0]) + added(both[1])) / 2
    assert distance(added(tmp_path / "mean"), wanted) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "settings"), NOT_LINEAR.items(), ids=NOT_LINEAR)
def test_every_other_kind_is_refused_by_its_name(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    """And the mean of its tensors is indeed not what is wanted."""
    both = [adapter(tmp_path / str(seed), kind, settings, seed) for seed in (5, 6)]
    with pytest.raises(ValueError, match=r"belongs to an adapter .* Merge each") as caught:
        offline.average(both)
    assert ("--lora concatenate" in str(caught.value)) == (kind == "LORA")
    wanted = (added(both[0]) + added(both[1])) / 2
    held = [load_file(place / "adapter_model.safetensors") for place in both]
    mean = {n: (t + held[1][n]) / 2 if t.is_floating_point() else t for n, t in held[0].items()}
    save_file(mean, both[0] / "adapter_model.safetensors")
    assert distance(added(both[0]), wanted) > 0.05


def test_every_kind_of_peft_is_decided() -> None:
    tried = {kind.partition(",")[0] for kind in (*LINEAR, *NOT_LINEAR)}
    assert {kind.value for kind in peft.PeftType} - UNTRIED == tried


UNLIKE: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "other seeds": ("FOURIERFT", {"random_loc_seed": 1}, {"random_loc_seed": 2}, "random_loc_seed: 2, wanted 1"),
    "other places": ("SHIRA", {"random_seed": 1}, {"random_seed": 2}, "shira_indices: other values"),
    "other tokens": ("TRAINABLE_TOKENS", {"token_indices": [1, 2]}, {"token_indices": [1, 3]}, "token_indices"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "one", "other", "message"), UNLIKE.values(), ids=UNLIKE)
def test_linear_kinds_with_other_constants_are_refused(
    tmp_path: Path, kind: str, one: dict[str, Any], other: dict[str, Any], message: str
) -> None:
    both = [
        adapter(tmp_path / str(seed), kind, {**LINEAR[kind], **settings}, seed)
        for seed, settings in enumerate((one, other))
    ]
    with pytest.raises(
        ValueError, match=rf"(?s)1 is an adapter that adds something else than .*0\n.*{message}"
    ):
        offline.average(both)
    if "indices" in message:  # the tensors tell without the settings
        for place in both:
            settings = json.loads((place / "adapter_config.json").read_text())
            (place / "adapter_config.json").write_text(json.dumps(settings | {"random_seed": 0}))
        with pytest.raises(ValueError, match=message):
            offline.average([place / "adapter_model.safetensors" for place in both])


@pytest.mark.parametrize(
    "name",
    [
        "lily_A.weight", "poly_lora_A", "prompt_encoder.prefix_task_cols", "adaption_gate", "unet.q.oft_diag",
        "q.lora_down.weight", "q.hada_w1_a", "q.dora_scale", "oft_blocks",
    ],
)  # fmt: skip
def test_kinds_that_cannot_be_merged_here_are_refused_by_their_names(
    name: str, tmp_path: Path
) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file(OrderedDict({f"base.{name}": torch.ones(2)}), file)
    with pytest.raises(ValueError, match=f"{name} belongs to an adapter"):
        offline.average([file, file])


def test_an_embedded_prompt_is_averaged(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in (1, 3)]
    for i, file in zip((1.0, 3.0), files, strict=True):
        save_file({"prompt_embeddings": torch.full((2, 3), i)}, file)
    assert offline.average(files)["prompt_embeddings"].unique().tolist() == [2.0]
