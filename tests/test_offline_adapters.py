"""Adapters averaged as one adapter: it adds to each weight the mean of what they add, by the real PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cli_runs import run
from polyak import offline, theory


class Base(nn.Module):
    """One layer of each kind that PEFT adapts, and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.conv(self.embed(tokens).mT).mT
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]


LAYERS = ["layers.0", "layers.1"]


def adapter(place: Path, seed: int, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A trained adapter as PEFT saves it: all that it can train is random."""
    told: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": LAYERS} | settings
    model = peft.get_peft_model(Base(), peft.LoraConfig(**told)).to(dtype)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(place))
    return place


def dense(place: Path) -> dict[str, Tensor]:
    """The whole model's weights with an adapter merged into them."""
    merged = peft.PeftModel.from_pretrained(Base(), place).merge_and_unload()
    return {name: tensor.double() for name, tensor in merged.state_dict().items()}


def mean_of(adapters: Sequence[Path], coefficients: Sequence[float]) -> dict[str, Tensor]:
    held = [dense(place) for place in adapters]
    return {n: sum(c * one[n] for c, one in zip(coefficients, held, strict=True)) for n in held[0]}  # type: ignore[misc]


def assert_near(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=name)


ALL = {"target_modules": [*LAYERS, "embed", "conv"]}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "alike": ({}, {}, {}),
    "other ranks and alphas": ({"r": 1}, {"r": 3, "lora_alpha": 5}, {"lora_alpha": 2}),
    "rank-stabilised": ({"use_rslora": True, "r": 3}, {}, {"use_rslora": True}),
    "every kind of layer": (ALL, ALL | {"r": 1}, ALL),
    "patterns": (
        {"rank_pattern": {"layers.0": 4}, "alpha_pattern": {"0": 3}}, {}, {"alpha_pattern": {"^layers.1": 7}},
    ),
    "patterns of another kind of layer": (ALL | {"rank_pattern": {"conv": 1}}, ALL, ALL),
    "biases of the layers": tuple({"bias": "lora_only"} for _ in range(3)),
    "biases of the factors": tuple({"lora_bias": True, "lora_alpha": a} for a in (8, 3, 1)),
    "a module that is trained whole": tuple({"modules_to_save": ["head"]} for _ in range(3)),
    "by a regular expression": tuple({"target_modules": r"layers\.\d"} for _ in range(3)),
    "another beginning": ({"init_lora_weights": "gaussian"}, {}, {"lora_dropout": 0.5}),
}  # fmt: skip
COEFFICIENTS = {
    "even": (1 / 3, 1 / 3, 1 / 3),
    "uneven": (-0.5, 1.2, 0.3),
    "one is 0": (0.4, 0.0, 0.6),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes a factor's bias for a shard
@pytest.mark.parametrize("coefficients", COEFFICIENTS.values(), ids=COEFFICIENTS)
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_it_adds_the_mean_of_what_they_add(
    tmp_path: Path, settings: tuple[dict[str, Any], ...], coefficients: tuple[float, ...]
) -> None:
    adapters = [adapter(tmp_path / str(i), i, **told) for i, told in enumerate(settings)]
    made = offline.concatenate(adapters, coefficients)
    made.write(tmp_path / "made")
    assert_near(dense(tmp_path / "made"), mean_of(adapters, coefficients), 2e-6)
    model = peft.PeftModel.from_pretrained(Base(), tmp_path / "made")
    plain = Base()
    plain.load_state_dict(mean_of(adapters, coefficients))
    tokens = torch.arange(11)[None]
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_scales_are_in_the_settings_so_no_number_is_rounded(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    adapters = [adapter(tmp_path / str(i), i, dtype) for i in range(3)]
    made = offline.concatenate(adapters)
    assert (made.config["r"], made.config["lora_alpha"], made.config["alpha_pattern"]) == (6, 8, {})
    assert made.ranks == {"layers.0": 6, "layers.1": 6}
    for side, dim in (("A", 0), ("B", 1)):
        name = f"base_model.model.layers.0.lora_{side}.weight"
        parts = [load_file(place / "adapter_model.safetensors")[name] for place in adapters]
        assert torch.equal(made[name], torch.cat(parts, dim)) and made[name].dtype == dtype
        assert made.specs[name].shape == tuple(made[name].shape)


def test_a_rule_over_files_of_torch(tmp_path: Path) -> None:
    """Older versions of PEFT save `adapter_model.bin`."""
    adapters = [adapter(tmp_path / str(i), i) for i in range(3)]
    for place in adapters:
        torch.save(load_file(place / "adapter_model.safetensors"), place / "adapter_model.bin")
        (place / "adapter_model.safetensors").unlink()
    offline.concatenate(adapters, "exponential(0.5)").write(tmp_path / "made")
    wanted = mean_of(adapters, list(theory.coefficients("exponential(0.5)", [1.0] * 3)))
    assert_near(dense(tmp_path / "made"), wanted, 2e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora is True, whose adapters have no exact average"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes"),
    "parameters": (
        {"target_modules": [], "target_parameters": ["layers.0.weight"]}, "target_parameters are set",
    ),
    "other modules": ({"target_modules": ["layers.0"]}, r"1 is not of the same model as .*0"),
    "another setting": ({"bias": "lora_only"}, r"bias: .*lora_only|bias"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_exact_average_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    adapters = [adapter(tmp_path / "0", 0), adapter(tmp_path / "1", 1, **settings)]
    with pytest.raises(ValueError, match=message):
        offline.concatenate(adapters)


def test_other_kinds_and_other_folders_are_refused(tmp_path: Path) -> None:
    place = adapter(tmp_path / "0", 0)
    with pytest.raises(ValueError, match=r"no adapter_config\.json: wanted a folder that PEFT"):
        offline.concatenate([tmp_path])
    config = json.loads((place / "adapter_config.json").read_text())
    for changed, message in (
        ({"peft_type": "LOHA"}, "of the kind 'LOHA', wanted LORA"),
        ({"lora_alpha": None}, "lora_alpha is None, wanted a number"),
        ({"alpha_pattern": {"(": 3}}, r"alpha_pattern has '\(', wanted a name or a plain pattern"),
        ({"alpha_pattern": {"(.*.*)*x": 3}}, "wanted a name or a plain pattern"),
    ):
        (place / "adapter_config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=message):
            offline.concatenate([place])
    (place / "adapter_config.json").write_text("no json")
    with pytest.raises(ValueError, match="the settings cannot be read"):
        offline.concatenate([place])


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    place = adapter(tmp_path / "0", 0)
    held = load_file(place / "adapter_model.safetensors")
    name = next(iter(held))
    held[name].view(-1)[0] = torch.nan
    torch.save(held, place / "adapter_model.bin")
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{name} has values that are infinite or NaN"):
        offline.concatenate([place]).write(tmp_path / "made")
    assert not (tmp_path / "made").exists()


class TestCommand:
    def test_as_a_user_types_it(self, tmp_path: Path) -> None:
        """Refused as files, with the option that it takes."""
        adapters = [adapter(tmp_path / f"checkpoint-{i}", i) for i in (9, 10, 11)]
        refused = run("average", *adapters, "--out", tmp_path / "it.safetensors")
        assert refused.exit_code == 2 and "--lora concatenate" in refused.output
        done = run(
            "average", tmp_path, "--last", "2", "--lora", "concatenate", "--out", tmp_path / "made"
        )
        assert done.exit_code == 0, done.output
        assert "made: 4 tensors, rank 4: the sum of theirs" in done.stdout
        assert_near(dense(tmp_path / "made"), mean_of(adapters[1:], (0.5, 0.5)), 2e-6)

    def test_json_and_a_dry_run(self, tmp_path: Path) -> None:
        adapters = [adapter(tmp_path / f"{i}", i, modules_to_save=["head"]) for i in (1, 2)]
        fixed = ("average", *adapters, "--lora", "concatenate", "--rule", "exponential(0.25)")
        told = json.loads(run(*fixed, "--dry-run", "--json").stdout)
        assert [term["coefficient"] for term in told["terms"]] == [0.25, 0.75]
        assert (told["ranks"], told["tensors"], told["out"]) == ([4], 6, None)
        done = run(*fixed, "--out", tmp_path / "made")
        assert "2 tensors beside the factors are averaged as weights" in done.stderr

    def test_options_that_do_not_go_with_it(self, tmp_path: Path) -> None:
        place = adapter(tmp_path / "1", 1)
        options = (
            "--lora",
            "concatenate",
            "--key",
            "a",
            "--dtype",
            "bf16",
            "--out",
            tmp_path / "o",
        )
        done = run("average", place, place, *options)
        assert done.exit_code == 2 and "leave --key, --dtype out" in done.output
