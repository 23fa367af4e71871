"""The exact average of LoRA adapters as one adapter, whose rank is the sum of theirs.

An adapter adds `s B A` to a weight, with `s = alpha / r`. The mean of products is one product:
`sum_i c_i s_i B_i A_i = s [f_1 B_1, ..., f_k B_k] [A_1; ...; A_k]` with `f_i = c_i s_i / s`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak._checks import difference, report
from polyak._files import writing_folder
from polyak._lazy import LazyTensors, TensorSpec, Where, joined, renamed
from polyak.checkpoints._safetensors import files as tensorfile
from polyak.checkpoints._safetensors.weights import METADATA
from polyak.offline._average import shares_of
from polyak.offline._coefficients import checked, require_list
from polyak.offline._combination import Combination
from polyak.offline._findings import Source
from polyak.offline._lora import CONFIG, Adapter, comparable
from polyak.rules import Rule
from polyak.theory._profiles import Profile

_WEIGHTS = "adapter_model.safetensors"
_SCALE = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}


class Concatenation(LazyTensors):
    """Several adapters as one: the average of what they add, exact but for the rounding of its dtype.

    The scales are in the settings (`config`) where all adapters have one, else in the factors B. What
    else the adapters hold, such as biases and `modules_to_save`, is averaged.

    Attributes:
        paths: the folders of the adapters.
        coefficients: one for each.
        config: the settings of the new adapter.
        ranks: the rank of each module.
        factors: how many of the tensors are factors.
    """

    def __init__(
        self, adapters: Sequence[Adapter], coefficients: Profile, rest: LazyTensors
    ) -> None:
        self.paths = [adapter.path for adapter in adapters]
        self.coefficients = coefficients
        counting = [(a, c) for a, c in zip(adapters, coefficients.tolist(), strict=True) if c]
        self._adapters = [adapter for adapter, _ in counting]
        self._rest, self._factors = rest, adapters[-1].factors
        self.factors = len(self._factors)
        self.ranks: dict[str, int] = {}
        self._shares: dict[str, list[float]] = {}
        scales: dict[str, float] = {}
        for name, factor in self._factors.items():
            if factor.side == "A":
                ranks = [a.tensors.specs[name].shape[0] for a in self._adapters]
                shares = [
                    c * a.scale(factor.module, r) for (a, c), r in zip(counting, ranks, strict=True)
                ]
                scales[factor.module] = scale = abs(max(shares, key=abs)) or 1.0
                self._shares[factor.module] = [share / scale for share in shares]
                self.ranks[factor.module] = sum(ranks)
        alphas = {module: _whole(scales[module] * rank) for module, rank in self.ranks.items()}
        self.config = adapters[-1].config | _settings(self.ranks, alphas)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """name -> shape and dtype: those of the last adapter, but for the rank."""
        last = self._adapters[-1].tensors.specs
        specs = {}
        for name, (module, side, bias) in self._factors.items():
            shape = list(last[name].shape)
            if not bias:
                shape[side == "B"] = self.ranks[module]
            specs[name] = TensorSpec(tuple(shape), last[name].dtype)
        return specs | dict(self._rest.specs)

    def read(self, name: str, where: Where = ()) -> Tensor:
        if name not in self._factors:
            return self._rest.read(name, where)
        module, side, bias = self._factors[name]
        factors = [adapter.tensors[name] for adapter in self._adapters]
        for adapter, tensor in zip(self._adapters, factors, strict=True):
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{adapter.path}: {name} has values that are infinite or NaN: leave it out"
                )
        shares = [1.0] * len(factors) if side == "A" else self._shares[module]
        parts = [t if f == 1 else t.double() * f for t, f in zip(factors, shares, strict=True)]
        made = torch.stack(parts).sum(0) if bias else torch.cat(parts, dim=int(side == "B"))
        made = made.to(self.specs[name].dtype)
        return made[where] if where else made

    def write(self, out: Path | str, *, overwrite: bool = False) -> None:
        """Write a folder as PEFT does, complete or not at all; `peft.PeftModel.from_pretrained` loads it.

        Raises `FileExistsError` if `out` exists, unless `overwrite`.
        """
        with writing_folder(out, overwrite=overwrite) as folder:
            weights = folder / _WEIGHTS
            tensorfile.write(weights, self.specs, lambda name: iter([self.read(name)]), METADATA)
            text = json.dumps(self.config, indent=2, sort_keys=True)
            (folder / CONFIG).write_bytes(text.encode())


def concatenate(
    adapters: Sequence[os.PathLike[str] | str],
    rule: Rule | str | Sequence[float] | Profile = "uniform()",
    *,
    elapsed: Sequence[float] | None = None,
) -> Concatenation:
    """Average LoRA adapters of one model: one adapter whose rank is the sum of their ranks.

    The mean of the factors is not the mean of the products, but one adapter can hold the mean of the
    products: `sum_i c_i s_i B_i A_i = s [f_1 B_1, ..., f_k B_k] [A_1; ...; A_k]`, `f_i = c_i s_i / s`, with
    `s_i = alpha_i / r_i`, or `alpha_i / sqrt(r_i)` (rsLoRA). `merge_and_unload` of PEFT makes it a weight.

    Args:
        adapters: folders that PEFT's `save_pretrained` wrote; they may differ in rank, alpha and rsLoRA.
        rule, elapsed: the coefficients, as for `average`; an adapter with coefficient 0 is left out.

    Raises `ValueError` that names the folder for one that is not a LoRA adapter of PEFT; for variants that
    add something else than such products (DoRA and the like); for adapters of other modules.
    Source: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732).
    """
    require_list("adapters", adapters, "folder")
    given, of_statistics = shares_of(rule, len(adapters), elapsed)
    coefficients = checked(given, len(adapters))
    loaded = [Adapter(Path(path)) for path in adapters]
    for adapter in loaded:
        _require_alike(loaded[0], adapter)
    names = {n: n for n in loaded[0].tensors if n not in loaded[0].factors}
    sources = [Source(str(a.path), renamed(a.tensors, names)) for a in loaded]
    rest: LazyTensors = joined()
    if names:
        rest = Combination(sources, coefficients, statistics=of_statistics, allow_nonfinite=False)
    return Concatenation(loaded, coefficients, rest)


def _require_alike(first: Adapter, other: Adapter) -> None:
    """Raises `ValueError` with the settings and modules in which adapters differ."""
    wanted, got = (_comparable(adapter) for adapter in (first, other))
    if lines := difference(wanted, got):
        raise ValueError(report(f"{other.path} is not of the same model as {first.path}", lines))


def _comparable(adapter: Adapter) -> dict[str, str]:
    """The settings that must be equal, and of each tensor the shape without the rank."""
    shapes = {}
    for name, spec in adapter.tensors.specs.items():
        shape: list[object] = list(spec.shape)
        factor = adapter.factors.get(name)
        if factor and not factor.bias:
            shape[factor.side == "B"] = "r"
        shapes[name] = str(tuple(shape))
    return comparable(adapter.config, without=_SCALE) | shapes


def _settings(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """The settings that give each module its rank and its alpha; the most frequent are the default."""
    if not ranks:
        raise ValueError("adapters have no LoRA factors (lora_A, lora_B), wanted adapters of LoRA")
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """The modules whose value is not the usual one; "^" makes PEFT compare the whole name."""
    return {f"^{re.escape(module)}": one for module, one in values.items() if one != usual}


def _whole(number: float) -> float:
    """An integer, if the number is one but for rounding."""
    return round(number) if math.isclose(round(number), number, rel_tol=1e-12) else number
