"""Adapters as PEFT saves them: their settings; for LoRA the tensors and the scale of each product."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from polyak._checks import difference, report, require
from polyak.checkpoints._read import read, settings
from polyak.checkpoints._unfit import CONSTANTS
from polyak.offline._findings import Source

CONFIG = "adapter_config.json"
_LONGEST = 1000  # characters of a pattern
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.(?P<leaf>weight|bias))?"
)
# Of the training and of its first step: they change nothing of what a finished adapter adds.
_OF_TRAINING = {"lora_dropout", "inference_mode", "peft_version", "auto_mapping", "loftq_config", "eva_config",
                "corda_config", "lora_ga_config", "init_lora_weights"}  # fmt: skip
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")


class Factor(NamedTuple):
    """The meaning of a tensor's name in an adapter: its module, the side A or B, and whether it is a bias."""

    module: str
    side: str
    bias: bool


class Adapter:
    """A folder of PEFT with a LoRA adapter: its tensors by name, and its settings.

    Raises `ValueError` that names the folder for an adapter of another kind, or of a variant that adds
    something else than `s B A`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path if path.is_dir() else path.parent
        self.config = _config(self.path)
        self.tensors = read(path).weights()
        self.factors = {name: factor for name in self.tensors if (factor := _factor(name))}
        if problem := self._problem():
            raise ValueError(
                f"{self.path}: {problem}; merge each adapter into its model, and average those"
            )

    def scale(self, module: str, rank: int) -> float:
        """The factor of the product of a module: `alpha / r`, or `alpha / sqrt(r)`."""
        alpha = _of_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha"))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _problem(self) -> str:
        """The reason why the adapter is more than products of two factors; "" if it is not."""
        for name, setting in self.config.items():
            if name.startswith("use_") and name != "use_rslora" and setting:
                return f"{name} is {setting!r}, whose adapters have no exact average as one adapter"
        start = self.config.get("init_lora_weights", True)
        if start not in _HARMLESS_STARTS:
            return f"init_lora_weights is {start!r}, which changes the model's weights by the rank"
        if self.config.get("target_parameters"):
            return "target_parameters are set, whose factors belong to several weights each"
        for name in self.tensors:
            if "lora_" in name and name not in self.factors:
                return f"{name} is not a factor of a product"
        ranks = {(f.module, f.side): self.tensors.specs[n].shape[f.side == "B"]
                 for n, f in self.factors.items() if not f.bias}  # fmt: skip
        for (module, _), rank in ranks.items():
            if {ranks.get((module, "A")), ranks.get((module, "B"))} != {rank}:
                return f"the factors of {module} have no common rank"
        return ""


def _factor(name: str) -> Factor | None:
    found = _FACTOR.fullmatch(name)
    return Factor(found["module"], found["side"], found["leaf"] == "bias") if found else None


def comparable(config: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, str]:
    """The settings that say what an adapter adds, as text; but for some."""
    return {
        name: str(sorted(map(str, value)) if isinstance(value, list) else value)
        for name, value in config.items()
        if name not in _OF_TRAINING and name not in without and value not in (None, False, [], {})
    }


def require_same_constants(sources: Sequence[Source]) -> None:
    """Raises `ValueError` for adapters that differ in settings, or in tensors that are not trained.

    Their mean would combine values that belong to other places or to other random numbers.
    """
    first, *others = sources
    constants = [name for name in first.weights if CONSTANTS.search(name)]
    for other in others:
        lines = difference(_settings_beside(first), _settings_beside(other))
        lines += [
            f"{n}: other values"
            for n in constants
            if not torch.equal(first.weights[n], other.weights[n])
        ]
        if lines:
            title = f"{other.label} is an adapter that adds something else than {first.label}"
            raise ValueError(report(title, lines))


def _settings_beside(source: Source) -> dict[str, str]:
    path = Path(source.label)
    if path.name.startswith("adapter_model."):
        path = path.parent
    return comparable(settings(path / CONFIG)) if path.is_dir() else {}


def _config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter of LoRA; raises `ValueError` for a folder without them."""
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG}: wanted a folder that PEFT's save_pretrained wrote"
        )
    config = settings(folder / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder / CONFIG}: the adapter is of the kind {kind!r}, wanted LORA")
    alpha = config.get("lora_alpha")
    require(isinstance(alpha, (int, float)), f"{folder / CONFIG}: lora_alpha", alpha, "a number")
    pattern = config.get("alpha_pattern")
    for key in pattern if isinstance(pattern, dict) else ():
        if not _is_plain(key):
            raise ValueError(
                f"{folder / CONFIG}: alpha_pattern has {key!r:.100}, wanted a name or a plain pattern"
            )
    return config


def _is_plain(pattern: str) -> bool:
    """Whether a regular expression repeats no group, which may take for ever."""
    with suppress(re.error):
        re.compile(pattern)
        return len(pattern) <= _LONGEST and re.search(r"\)[*+?{]", pattern) is None
    return False


def _of_pattern(pattern: object, module: str, otherwise: Any) -> Any:
    """The value of the first key that fits the end of a module's name, as PEFT finds it."""
    for key, value in pattern.items() if isinstance(pattern, Mapping) else ():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise
