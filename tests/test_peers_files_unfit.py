"""Weights whose average would mean nothing are refused by kind, and what only looks alike is averaged."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cli_runs import run
from polyak import checkpoints, offline
from quick import first_quick

State = dict[str, Tensor]


def net(value: float) -> State:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    for tensor in model.state_dict().values():
        tensor.fill_(value)
    return model.state_dict()


def zero3(size: int) -> dict[str, Any]:
    """What DeepSpeed writes for a rank: placeholders, and the shapes that the weights have."""
    shapes = [OrderedDict((f"module.{name}", tensor.shape) for name, tensor in net(1).items())]
    held = {f"module.{name}": torch.ones(size) for name in net(1)}
    return {"module": held, "param_shapes": shapes, "ds_version": "0.14"}


def packed(weight: str, dtype: torch.dtype, *scales: str, rows: int = 4) -> State:
    beside = {name: torch.ones(rows) for name in scales}
    return {weight: torch.ones(rows, 8).to(dtype), **beside, "norm.weight": torch.ones(4)}


def hqq_layer() -> dict[str, Any]:
    packed_rows = torch.ones(16, 8, dtype=torch.uint8)
    return {
        "W_q": packed_rows,
        "meta": {"nbits": 4, "scale": torch.ones(4), "zero": torch.ones(4)},
        "bias": None,
    }


def lora() -> State:
    model = peft.get_peft_model(
        nn.Sequential(OrderedDict(q=nn.Linear(4, 4))), peft.LoraConfig(r=2, target_modules=["q"])
    )
    return dict(peft.get_peft_model_state_dict(model))


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "ZeRO-3, empty": (zero3(0), r"weight has shape \(0,\): DeepSpeed ZeRO-3 .* zero_to_fp32\.py"),
    "ZeRO-3, one element": (zero3(1), r"weight has shape \(1,\): DeepSpeed ZeRO-3"),
    "ZeRO-3 through transformers": (
        {name: torch.ones(0) for name in net(1)}, r"DeepSpeed ZeRO-3",
    ),
    "ZeRO-3, one element, without shapes": (
        {name: torch.ones(1) for name in net(1)}, r"DeepSpeed ZeRO-3",
    ),
    "ZeRO-3, small weights are there": (
        {**net(1), "3.weight": torch.ones(0)}, r"3\.weight has shape \(0,\)",
    ),
    "GPTQ": (packed("l.qweight", torch.int32, "l.qzeros", "l.scales"), r"l\.qweight \(int32 of shape"),
    "AWQ": (packed("model.l.qweight", torch.int32, "model.l.scales"), "Dequantise the model"),
    "bitsandbytes nf4": (
        packed("l.weight", torch.uint8, "l.weight.absmax", "l.weight.quant_map",
               "l.weight.quant_state.bitsandbytes__nf4"), r"l\.weight \(uint8",
    ),
    "bitsandbytes int8": (packed("l.weight", torch.int8, "l.SCB"), r"l\.weight \(int8"),
    "fp8 with scales": (packed("l.weight", torch.float8_e4m3fn, "l.weight_scale"), r"l\.weight \(float8"),
    "fp8 with inverse scales": (
        packed("l.weight", torch.float8_e4m3fn, "l.weight_scale_inv"), r"l\.weight \(float8",
    ),
    "fp8 with scales of inputs": (
        packed("l.weight", torch.float8_e5m2, "l.input_scale"), r"l\.weight \(float8",
    ),
    "compressed-tensors": (packed("l.weight_packed", torch.int32, "l.weight_scale"), "l.weight_packed"),
    "HQQ": (packed("l.W_q", torch.uint8, "l.scale", "l.zero"), r"l\.W_q"),
    "HQQ, by layer": (
        {"model.l": hqq_layer(), "model.norm": {"weight": torch.ones(4)}}, r"model\.l\.W_q \(uint8",
    ),
    "HQQ, by layer under a key": (
        {"model": {"l": hqq_layer(), "norm": {"weight": torch.ones(4)}}}, r"l\.W_q \(uint8",
    ),
    "blocks with scales of integers": (
        {"e.down_proj_blocks": torch.ones(2, 8, dtype=torch.uint8),
         "e.down_proj_scales": torch.ones(2, dtype=torch.uint8)}, "down_proj_blocks",
    ),
    "quanto": ({"l.weight._data": torch.ones(4, 8, dtype=torch.int8), "l.weight._scale": torch.ones(4, 1)},
               r"l\.weight\._data"),
    "AQLM": (packed("l.codes", torch.int16, "l.codebooks", "l.scales"), r"l\.codes"),
    "EXL2": (packed("l.q_weight", torch.int32, "l.q_scale", "l.q_scale_max"), r"l\.q_weight"),
    "at the top": (packed("weight", torch.int8, "weight_scale"), r"weight \(int8"),
    "torchao": (packed("l.weight:qdata", torch.int8, "l.weight:scale"), r"l\.weight:qdata \(int8"),
    "NVFP4": (packed("l.weight", torch.uint8, "l.weight_scale", "l.weight_scale_2"), r"l\.weight \(uint8"),
    "Marlin": (packed("l.B", torch.int32, "l.s"), r"l\.B \(int32"),
    "Marlin, 2:4": (
        {**packed("l.B_24", torch.int32, "l.s"), "l.B_meta": torch.ones(8, 2, dtype=torch.int16)},
        r"l\.B_24",
    ),
    "QQQ": (packed("l.B", torch.int32, "l.s_channel", "l.s_group"), r"l\.B"),
    "QuIP#": (packed("l.Qidxs", torch.int64, "l.SU", "l.Wscale"), r"l\.Qidxs \(int64"),
    "EXL3": (packed("l.trellis", torch.int16, "l.suh", "l.svh"), r"l\.trellis"),
    "VPTQ": (packed("l.indices", torch.int32, "l.centroids.weight"), r"l\.indices"),
    "SqueezeLLM": (packed("l.qweight", torch.int32, "l.lookup_table"), r"l\.qweight"),
    "AQLM without scales": (packed("l.codes", torch.int8, "l.codebooks"), r"l\.codes"),
    "HQQ with nested scales": (packed("l.W_q", torch.uint8, "l.meta.scale"), r"l\.W_q"),
    "SmoothQuant": (packed("l.weight", torch.int8, "l.a", rows=1), r"l\.weight \(int8"),
    "ModelOpt": (
        packed("l.weight", torch.float8_e4m3fn, "l.weight_quantizer._scale"), r"l\.weight \(float8",
    ),
    "quanto, 4 bits": (packed("l.weight._data._data", torch.uint8, "l.weight._scale"), r"_data\._data"),
    "integers called weights": (packed("l.weight", torch.int32), r"l\.weight \(int32"),
    "peft": (lora(), r"lora_A\.weight belongs to an adapter \(LoRA\).* merge_and_unload"),
    "kohya": ({"lora_unet_q.lora_down.weight": torch.ones(2, 4),
               "lora_unet_q.lora_up.weight": torch.ones(4, 2)}, "belongs to an adapter"),
    "diffusers": ({"q.processor.to_q_lora.down.weight": torch.ones(2, 4),
                   "q.lora.up.weight": torch.ones(4, 2)}, "belongs to an adapter"),
    "diffusers' old processors": (
        {"to_q_lora.down.weight": torch.ones(2, 4)}, "belongs to an adapter"),
    "diffusers' layers": ({"q.lora_layer.up.weight": torch.ones(2, 4)}, "belongs to an adapter"),
    "torchtune": ({"q.lora_a.weight": torch.ones(2, 4)}, "belongs to an adapter"),
    "LoKr": ({"q.lokr_w1": torch.ones(2, 4), "q.lokr_w2": torch.ones(4, 2)}, "belongs to an adapter"),
    "VeRA": ({"q.vera_lambda_b": torch.ones(4), "q.vera_lambda_d": torch.ones(2)}, "belongs to an adapter"),
    "LoHa": ({"q.hada_w1_a": torch.ones(2, 4)}, "belongs to an adapter"),
}  # fmt: skip
ALIKE: dict[str, State] = {
    "a scale that is learned beside an index": {
        "attn.logit_scale": torch.ones(2), "attn.relative_position_index": torch.ones(4, 4).long(),
    },
    "a scale that is learned beside a mask": {
        "attn.scale": torch.ones(2), "attn.mask": torch.ones(4, 4, dtype=torch.uint8),
        "attn.weight": torch.ones(2, 2),
    },
    "integers beside a larger weight": {
        "g.faces_of": torch.ones(2, 3, dtype=torch.int32), "g.weight": torch.ones(3, 3),
    },
    "a table for look-up": {"table": torch.ones(64, 8, dtype=torch.int32), "l.weight": torch.ones(4, 4), "l.bias": torch.ones(4)},
    "a table beside a weight": {
        "grid.hashes": torch.ones(64, 8, dtype=torch.int32), "grid.weight": torch.ones(4, 4), "grid.tau": torch.ones(1),
        "grid.embedding": torch.ones(9, 2), "n.running_mean": torch.ones(4), "n.scale": torch.ones(4),
    },
    "a mask of pruning": {"l.weight_mask": torch.ones(4, 4, dtype=torch.uint8), "l.weight_orig": torch.ones(4, 4)},
    "positions": {"e.position_ids": torch.ones(1, 8, dtype=torch.int32), "e.scale": torch.ones(1)},
    "quantization-aware training": {
        "l.weight": torch.ones(2, 2), "l.weight_fake_quant.scale": torch.ones(2),
        "l.weight_fake_quant.zero_point": torch.ones(2, dtype=torch.int32),
        "l.weight_fake_quant.observer_enabled": torch.ones(1, dtype=torch.uint8),
    },
    "a small model": {name: torch.ones(1) for name in "abcde"},
    "a norm of one feature": {"n.weight": torch.ones(1), "n.bias": torch.ones(1), "l.weight": torch.ones(1, 3)},
    "an empty buffer": {**net(1), "cache": torch.ones(0)},
    "8-bit floats alone": {"l.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)},
    "a module called lora": {"flora.a.weight": torch.ones(2), "explorer.weight": torch.ones(2, 2), "lora.weight": torch.ones(2)},
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), UNFIT.values(), ids=UNFIT)
def test_what_has_no_average_is_refused_by_kind(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    torch.save(content, tmp_path / "it.pt")
    with pytest.raises(ValueError, match=rf"it\.pt: .*{message}"):
        offline.average([tmp_path / "it.pt"] * 2)


@pytest.mark.parametrize("content", first_quick((c for c, _ in UNFIT.values()), 5), ids=UNFIT)
def test_every_command_refuses_what_has_no_average(tmp_path: Path, content: dict[str, Any]) -> None:
    """And `inspect` says so of a file that it describes."""
    torch.save(content, tmp_path / "it.pt")
    result = run("average", *[tmp_path / "it.pt"] * 2, "--out", tmp_path / "mean.safetensors")
    assert result.exit_code == 2 and not (tmp_path / "mean.safetensors").exists()
    assert "cannot be averaged: " in run("inspect", tmp_path / "it.pt").output
    listed = ("--checkpoint", f"1={tmp_path / 'it.pt'}", "--checkpoint", f"2={tmp_path / 'it.pt'}")
    options = ("--rule", "uniform()", "--max-error", 1, "--dry-run")
    assert run("synthesize", *listed, *options).exit_code == 2


@pytest.mark.parametrize("content", ALIKE.values(), ids=ALIKE)
def test_what_only_looks_alike_is_averaged(tmp_path: Path, content: State) -> None:
    torch.save(content, tmp_path / "it.pt")
    assert set(offline.average([tmp_path / "it.pt"] * 2)) == set(content)


@pytest.mark.parametrize("name", ["GPTQ", "Marlin", "bitsandbytes nf4", "integers called weights"])
def test_what_the_user_says_is_copied(tmp_path: Path, name: str) -> None:
    """The error names the option; the last file's integers and scales come out, the rest is averaged."""
    first, last = (UNFIT[name][0] for _ in range(2))
    torch.save(first, tmp_path / "1.pt")
    torch.save(
        {n: t + 2 if n == "norm.weight" else t.clone() + 1 for n, t in last.items()},
        tmp_path / "2.pt",
    )
    files, out = [tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "mean.safetensors"
    refused = run("average", *files, "--out", out)
    assert "(--copy 'l." in refused.stderr and refused.exit_code == 2
    made = run("average", *files, "--out", out, "--copy", "l.*", "--verify")
    assert made.exit_code == 0, made.output
    for each, tensor in load_file(out).items():
        assert torch.equal(tensor, torch.load(files[1])[each] - int(each == "norm.weight"))
    with pytest.raises(ValueError, match=r"copy is 'm\.\*', wanted a tensor's name or a pattern"):
        offline.average(files, copy=["l.*", "m.*"])


def test_a_copy_of_floats(tmp_path: Path) -> None:
    for value in (1.0, 3.0):
        torch.save(net(value), tmp_path / f"{value}.pt")
    files = [tmp_path / "1.0.pt", tmp_path / "3.0.pt"]
    made = offline.average(files, copy=["2.*"])
    assert [made[n].flatten()[0].item() for n in ("0.weight", "2.weight", "2.bias")] == [2, 3, 3]
    soup = offline.greedy_soup(files, lambda weights: float(weights["2.bias"][0]), copy=["2.*"])
    assert set(soup.qualities) == {3.0}


def test_placeholders_are_not_exported_either(tmp_path: Path) -> None:
    torch.save(zero3(0), tmp_path / "it.pt")
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
        checkpoints.export(
            tmp_path / "out.safetensors", checkpoints.read(tmp_path / "it.pt"), "live"
        )
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
        found = checkpoints.read(tmp_path / "it.pt", role="average")
        checkpoints.convert(found, tmp_path / "out.safetensors", "exponential(0.9)", count=3)
