"""Weights that have no meaningful average: placeholders, packed numbers, most adapters.

They are known by names, shapes and dtypes: no content is read.

The mean of the tensors of `NOT_LINEAR` adapters does not add the mean of what they add to a weight. The other kinds
are linear in their tensors, so they are averaged as weights are: IA3, LN tuning, BEFT, MiSS, C3A, FourierFT, WaveFT,
SHiRA, FRoD, TinyLoRA, SuperTuning, trainable tokens, prompt tuning. Some of those add `values x constants`, so the
constants, which lie beside or follow from a seed in the settings, must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch

from polyak._lazy import TensorSpec

_FLOAT8 = frozenset(
    {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
)
_SCALES = re.compile(
    r"(^|[._:]|q|w|weight)(scales?|scale_inv|scale_and_zeros?|absmax|amax|scb|zeros|zero_points?|zero"
    r"|quant_map|quant_state\w*|centroids)($|[._])",
    re.IGNORECASE,
)
_WEIGHT = re.compile(
    r"weight|data|packed|blocks|compress|kernel|codes|qidx|^(res_)?indices$|(^|_)w(_|$)|(^|_)q(_|$)",
    re.IGNORECASE,
)
_CALLED = re.compile(r"weight[^.]*$|[.]weight[._:]", re.IGNORECASE)
_BUFFER = re.compile(
    r"mask|bias|index|indices|pos(ition)?_|(^|_)(idxs?|ids?|perm|state|tokens?|labels?|anchors?|edges?|faces|neighbou?rs?)(_|$)",
    re.IGNORECASE,
)
_OF_LAYER = re.compile(r"weight|bias|kernel|embed|running_|(^|_)w(_|$)", re.IGNORECASE)
_FEW = 4  # up to this many numbers are a small model's, not placeholders


class AdapterKind(NamedTuple):
    """How its tensors are named, what its authors call it, and what it does to a weight W."""

    names: re.Pattern[str]
    title: str
    does: str


def _kind(names: str, title: str, does: str) -> AdapterKind:
    return AdapterKind(re.compile(rf"(?<![a-z])({names})", re.IGNORECASE), title, does)


LORA = _kind(
    r"lora(_(a|b|embedding_[ab]|down|up)\b|\w*\.(up|down|a|b)\b)", "LoRA", "adds a product B A"
)
# Variants of LoRA come before it, since they have its tensors too.
NOT_LINEAR = (
    _kind(r"lora_magnitude_vector|dora_scale", "DoRA", "makes m (W + B A) / |W + B A|"),
    _kind(r"lora_e\b", "AdaLoRA", "adds a product B E A"),
    _kind(r"poly_lora_[ab]\b", "Poly", "adds a product B A, chosen by a router"),
    LORA,
    _kind(r"lokr_w", "LoKr", "adds a Kronecker product"),
    _kind(r"hada_w", "LoHa", "adds a product of two products"),
    _kind(r"p?vera_lambda", "VeRA", "adds a product b B d A"),
    _kind(r"randlora_(lambda|gamma)\b", "RandLoRA", "adds products B l A g"),
    _kind(r"vblora_(vector_bank|logits)", "VB-LoRA", "adds a product B A"),
    _kind(r"unilora_theta_d\b", "Uni-LoRA", "adds a product B A"),
    _kind(r"gralora_[ab]\b", "GraLoRA", "adds products B A"),
    _kind(r"hira_[ab]\b", "HiRA", "adds W * (B A)"),
    _kind(r"delora_(lambda|[ab])\b", "DeLoRA", "adds a product B A of a given norm"),
    _kind(r"glora_[a-e]\.", "GLoRA", "adds products"),
    _kind(r"deft_[pr]\b", "DEFT", "projects W"),
    _kind(r"adamss_(newb|[ab])\b", "AdaMSS", "adds a product B A"),
    _kind(r"lily_([ab]|router)\b", "Lily", "adds a product B A, chosen by a router"),
    _kind(r"peanut_[ab]\b", "PEANuT", "adds what a network makes of W"),
    _kind(r"osf_svd_params\b", "OSF", "makes a product U S V"),
    _kind(r"oft_(r\b|blocks|diag)", "OFT", "rotates W"),
    _kind(r"boft_[rs]\b", "BOFT", "rotates W"),
    _kind(r"psoft_r\b", "PSOFT", "rotates a part of W"),
    _kind(r"hra_u\b", "HRA", "reflects W"),
    _kind(r"road_(theta|alpha)\b", "RoAd", "rotates the outputs"),
    _kind(r"adaption_gate\b", "LLaMA-Adapter", "adds a gate times a prompt's attention"),
    _kind(r"prefix_task_(cols|rows)\b", "multitask prompt tuning", "multiplies the prompt by a product"),
)  # fmt: skip
CONSTANTS = re.compile(r"(shira|supertuning)_indices\b|frod_(v|s_indices|s_size)\b|tinylora_[abp]\b", re.I)  # fmt: skip
"""Tensors of linear kinds that are not trained: a mean exists only where they are equal."""


def unfit(specs: Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why weights cannot be averaged, and what to do; "" if they can.

    `shapes` are those that the file stores beside its tensors, as DeepSpeed does.
    """
    if name := placeholder(specs, shapes):
        return (
            f"{name} has shape {specs[name].shape}: DeepSpeed ZeRO-3 saved placeholders instead of weights. "
            "Run its zero_to_fp32.py in the checkpoint's folder, or save with "
            "stage3_gather_16bit_weights_on_model_save"
        )
    return _of_kind(tuple(specs.items()))


@lru_cache(maxsize=4)  # all files of a run have the same tensors
def _of_kind(tensors: tuple[tuple[str, TensorSpec], ...]) -> str:
    specs = dict(tensors)
    if name := packed(specs):
        return (
            f"{name} ({specs[name]}) holds quantised numbers, whose mean is not the mean of the weights "
            "that they encode. Dequantise the model, and average that; or if it is not quantised, take it from the "
            f"last file: copy=[{name!r}] (--copy {name!r})"
        )
    return _of_adapter(specs)


def packed(specs: Mapping[str, TensorSpec]) -> str:
    """The name of a tensor that holds quantised numbers; or ""."""
    return next(_packed(specs), "")


def placeholder(specs: Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The name of a tensor that is a placeholder for a weight, without its content; or ""."""
    for name, shape in shapes.items():
        if name in specs and specs[name].shape != shape and specs[name].numel <= 1:
            return name
    floats = {name: spec for name, spec in specs.items() if spec.dtype.is_floating_point}
    empty = [name for name, spec in floats.items() if spec.shape == (0,)]
    if any(name.endswith("weight") for name in empty) or 2 * len(empty) > len(floats):
        return empty[0]
    single = [name for name, spec in floats.items() if spec.shape == (1,)]
    weights = [name for name in single if name.endswith("weight")]
    alone = len(single) == len(floats) >= _FEW and len(weights) > 1
    return weights[0] if alone else ""


def _packed(specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    """The tensors of integers or of 8-bit floats that are weights in another form.

    They have scales beside them, or they are integers that are called weights, or those of a module that has
    floating-point numbers other than weights and biases, and no weight of at least their size.
    """
    narrow = {n: spec for n, spec in specs.items() if spec.shape and _may_be_packed(spec.dtype)}
    scaled: set[str] = set()
    among: set[str] = set()  # the modules with numbers that may be scales by another name
    for name, spec in specs.items():
        module, _, leaf = name.rpartition(".")
        if found := _SCALES.search(name):
            base = name[: found.start()].rstrip("._:").removesuffix("_quantizer")
            scaled |= {module, base}
            among |= {module, base, module.rpartition(".")[0]}
        elif spec.dtype.is_floating_point and spec.numel > 1 and not _OF_LAYER.search(leaf):
            among.add(module)
    largest = _largest_floats(specs)
    for name, spec in narrow.items():
        module, _, leaf = name.rpartition(".")
        matrix = len(spec.shape) > 1 and spec.dtype not in _FLOAT8 and not _BUFFER.search(leaf)
        smaller = module in among and spec.dtype != torch.int64
        smaller = smaller and largest.get(module, spec.numel) < spec.numel
        if _SCALES.search(leaf):
            continue
        by_scales = name in scaled or (module in scaled and _WEIGHT.search(leaf))
        if by_scales or (matrix and (_CALLED.search(name) or smaller)):
            yield name


def _may_be_packed(dtype: torch.dtype) -> bool:
    number = not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool
    return number or dtype in _FLOAT8


def _largest_floats(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """The size of the largest floating-point tensor in each module, with those within it."""
    largest: dict[str, int] = {}
    for name, spec in specs.items():
        if spec.dtype.is_floating_point:
            parts = name.split(".")
            for module in (".".join(parts[:i]) for i in range(len(parts))):
                largest[module] = max(largest.get(module, 0), spec.numel)
    return largest


def _of_adapter(names: Iterable[str]) -> str:
    """Why adapters with these tensors are not averaged as weights are, and what to do; "" if they are."""
    names = list(names)
    for kind in NOT_LINEAR:
        if name := next(filter(kind.names.search, names), ""):
            instead = "; or write one adapter whose rank is the sum of theirs (offline.concatenate, polyak "
            return (
                f"{name} belongs to an adapter ({kind.title}) that {kind.does}, so the mean of its tensors does "
                "not add the mean of what they add. Merge each adapter into its model (peft: merge_and_unload), "
                "and average those"
            ) + (f"{instead}average ... --lora concatenate)" if kind is LORA else "")
    return ""
